"""What one plan saves, another loads: weights and optimizer states to the bit, whatever was cut or shared how; and the training
goes on as if nothing had happened: the same data, and the losses of one process within 1e-5."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plans import small

from titan import ranks as between
from titan.batch import reader
from titan.build import build
from titan.checkpoint.manager import Manager, Progress
from titan.config import Config, degrees
from titan.data.dataset import TokenDataset
from titan.data.mixture import Samples
from titan.data.tokenizer import BytesTokenizer
from titan.data.windows import Contiguous
from titan.optim import set_lr
from titan.parallel.mesh import make_mesh
from titan.pool import Pool
from titan.schedule import lr_share
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


PAIRS = (
    ("tp=2", "pp=2"),
    ("dp_shard=2,cp=2", "dp_replicate=2,dp_shard=2"),
    ("pp=2,pp_split=[3,5]", "pp=4,pp_schedule=ZBVZeroBubble,pp_split=[1,1,1,1,1,1,1,1]"),
    ("dp_shard=8", "dp_shard=3"),
    ("dp_shard=2", "dp_shard=4"),
    ("dp_shard=4", "tp=1"),
    ("tp=1", "dp_replicate=2,tp=2"),
    ("cp=2", "tp=4"),
    ("tp=2,async_tp=true,recompute.mode=full", "cp=2,cp_method=ulysses"),
    ("dp_shard=2,pp=2,pp_schedule=Interleaved1F1B", "dp_shard=2,tp=2,pp=2,pp_schedule=DualPipeV"),
    ("tp=2,cp=2,pp=2", "dp_replicate=2"),
    ("pp=2,pp_schedule=GPipe", "dp_shard=2,cp=2,cp_method=allgather"),
    ("dp_replicate=2,dp_shard=2,tp=2", "dp_shard=6"),
    ("dp_shard=3", "tp=2,pp=2,pp_schedule=InterleavedZeroBubble"),
)
"""Plan before and after, on 1 to 8 ranks, most with another world size."""
SHAPE = ("--training.global_batch_size=24", "--model.n_layers=8", "--model.dropout=0.1")


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*pair, marks=() if i < 4 else pytest.mark.slow) for i, pair in enumerate(PAIRS)]
)
def test_training_goes_on_under_another_plan(
    pool: Pool, short_documents: Path, tmp_path: Path, before: str, after: str
) -> None:
    model = ("llama3", "gpt2")[PAIRS.index((before, after)) % 2]
    words = [word for word in SHAPE if model == "gpt2" or "dropout" not in word]
    done: list[list[Steps]] = []
    for plan, folder, until in (("tp=1", "whole", 10), (before, "run", 5), (after, "run", 10)):
        shards = re.findall(r"dp_\w+=(\d)", plan)
        micro = 3 if "pp=" in plan else 24 // math.prod(map(int, shards))
        own = (f"--job.output={tmp_path / folder}", f"--training.micro_batch_size={micro}")
        config = small(short_documents, plan, model, *own, *words)
        done.append(pool.run(degrees(config.parallel, 1).world, go_on, config, until))
    whole, first, second = ([together(ranks, step) for step in sorted(ranks[0].losses)] for ranks in done)
    assert (len(whole), len(first), len(second)) == (10, 5, 5)
    for (loss, data), (expected, same) in zip(first + second, whole, strict=True):
        assert (data == same).all()
        assert loss == pytest.approx(expected, rel=1e-5)


class Steps(NamedTuple):
    """What a rank did: its share of the loss, and the tokens of its part of the batch, by step."""

    data_rank: int
    losses: dict[int, float]
    tokens: dict[int, np.ndarray]


def together(ranks: list[Steps], step: int) -> tuple[float, np.ndarray]:
    """The loss of all ranks, and the global batch."""
    parts = {rank.data_rank: rank.tokens[step] for rank in ranks}
    return sum(rank.losses[step] for rank in ranks), np.concatenate([parts[i] for i in range(len(parts))])


def go_on(rank: int, config: Config, until: int) -> Steps:
    """On a worker: train from what was saved to this step, and save."""
    ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
    mesh = make_mesh("cpu", degrees(config.parallel, ranks.world), 30)
    parts = build(config, ranks.device, mesh)
    manager = Manager(Path(config.job.output), ranks, parts, {}, config, BytesTokenizer())
    progress, done = manager.resume(), Steps(mesh.data_rank, {}, {})
    data = Contiguous(TokenDataset(config.data.path, "train"), config.training.seq_len)
    batches = reader(config, mesh)(Samples({"data": data}, config.training.seed), start_sample=progress.samples, workers=0)
    for step in range(progress.step + 1, until + 1):
        batch = next(batches)
        done.tokens[step] = batch["tokens"].numpy().copy()
        (valid,) = between.agree(ranks, parts.step.count(batch))
        loss = parts.step.forward_backward(batch, valid, step)
        done.losses[step] = loss.item()
        parts.norms.clip(config.training.clip_norm, loss)
        set_lr(parts.optimizer, config.optimizer.lr * lr_share(config.schedule, step, config.training.steps))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        progress = Progress(step, progress.samples + config.training.global_batch_size, progress.tokens + valid)
    manager.prepare(progress, None, [], copy=False)()
    batches.close()
    return done
