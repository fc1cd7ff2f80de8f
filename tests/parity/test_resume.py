"""What one plan saves, another loads: weights and optimizer states to the bit, whatever was cut or shared how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import small

from titan import ranks as between
from titan.build import build
from titan.checkpoint.manager import Manager, Progress
from titan.config import Config, degrees
from titan.data.tokenizer import BytesTokenizer
from titan.parallel.mesh import make_mesh
from titan.pool import Pool
from titan.verify import assemble, blocks_of

PLANS = (
    "tp=1",
    "tp=4",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,tp=2",
    "tp=2,pp=2",
    "dp_shard=2,cp=2",
    "dp_replicate=2,pp=2,pp_split=[1,3]",
    "dp_replicate=2,dp_shard=2,tp=2",
    "tp=1",
)


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_each_plan_goes_on_from_what_the_one_before_saved(
    pool: Pool, short_documents: Path, tmp_path: Path, model: str
) -> None:
    words = ["--model.tied_embeddings=true"]
    states = []
    for step, plan in enumerate(PLANS):
        config = small(short_documents, plan, model, f"--job.output={tmp_path / 'run'}", *words)
        found = pool.run(degrees(config.parallel, 1).world, load_and_save, config, step)
        states.append(assemble(found, 0))
    for plan, state in zip(PLANS[1:], states[1:], strict=True):
        assert state.keys() == states[0].keys()
        for name, array in state.items():
            assert (array == states[0][name]).all(), f"{plan}: {name} was not what was saved"


def load_and_save(rank: int, config: Config, step: int) -> object:
    """On a worker: load what is there (for the first, make it), give it back, and save it as the next step."""
    ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
    parts = build(config, ranks.device, make_mesh("cpu", degrees(config.parallel, ranks.world), 30))
    manager = Manager(Path(config.job.output), ranks, parts, {"a": 1}, config, BytesTokenizer())
    if step == 0:
        for state in parts.optimizer.state.values():
            for tensor in state.values():
                tensor.copy_(torch.rand_like(tensor))
    else:
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.fill_(float("nan"))
        assert manager.resume() == Progress(step, step, step)
    manager.prepare(Progress(step + 1, step + 1, step + 1), None, [], copy=step % 2 == 0)()
    tensors = dict(parts.model.named_parameters())
    for name, parameter in tensors.copy().items():
        for key, state in parts.optimizer.state[parameter].items():
            tensors[f"{key} of {name}"] = state
    cuts = {name: parts.cuts.get(name.rpartition(" of ")[2]) for name in tensors}
    return blocks_of(tensors, {name: cut for name, cut in cuts.items() if cut is not None})
