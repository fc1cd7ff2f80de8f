"""A sample in the middle of training: every rank writes what one process writes, and training does not notice."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from runs import ROOT

from titan.build import build
from titan.config import Config, degrees
from titan.data.tokenizer import BytesTokenizer
from titan.generate import Draw, continuations
from titan.parallel.mesh import make_mesh
from titan.toml import load

SMALL = ["--model.n_layers=3", "--data.tokenizer=bytes", "--model.vocab_size=272"]
PLANS = {
    "shard2": (2, ["--parallel.dp_shard=2"]),
    "replicate2": (2, ["--parallel.dp_shard=1", "--parallel.dp_replicate=2"]),
    "hsdp2x2": (4, ["--parallel.dp_shard=2", "--parallel.dp_replicate=2"]),
    "bf16": (1, ["--precision.param=bfloat16"]),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_rank_writes_what_one_process_writes(pool: Pool, plan: str) -> None:
    world, words = PLANS[plan]
    configs = [load(ROOT / "train_configs" / "debug.toml", [*SMALL, *more]) for more in ([], words)]
    ((alone, _, _),) = pool.run(1, write, configs[0])
    for texts, same, loss_moved in pool.run(world, write, configs[1]):
        assert same, "sampling left another kind of parameters behind"
        assert not loss_moved, "sampling changed the next step"
        if plan != "bf16":
            assert texts == alone
    assert len(set(alone)) == len(alone) > 1


def write(rank: int, config: Config) -> tuple[list[str], bool, bool]:
    """On a worker: samples, whether the parameters are what they were, and whether a step's loss is another one after them."""
    world = dist.get_world_size()
    parts = build(config, torch.device("cpu"), make_mesh("cpu", degrees(config.parallel, world), 30))
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(3)  # away from the uniform distribution, where rounding would choose
    before = {name: (type(p), tuple(p.shape)) for name, p in parts.model.named_parameters()}
    tokens = torch.randint(257, (4, 65), generator=torch.Generator().manual_seed(rank))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    first = parts.step.forward_backward(batch, 256).item()
    prompts, draw = ["The with", "x = ", "a longer one than those"], Draw(0.8, 0.95, 5, 257)
    with parts.step.inference() as model:
        texts = continuations(model, parts.table.core, BytesTokenizer(), 256, prompts, 24, draw)
    after = {name: (type(p), tuple(p.shape)) for name, p in parts.model.named_parameters()}
    as_it_was = before == after and parts.model.training
    second = parts.step.forward_backward(batch, 256).item()
    return texts, as_it_was, first != second
