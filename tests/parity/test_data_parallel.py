"""FSDP2, HSDP and replication against one process: same weights, same gradients, same losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import Pool, WorkerFailed
from runs import ROOT, Run, gradient_error, loss_error, run

from titan.build import build
from titan.config import Config, degrees
from titan.parallel.mesh import make_mesh
from titan.toml import load

GRADIENT_TOLERANCE = 3e-6  # fp32: 7e-7 against float64 was measured for one process alone
LOSS_TOLERANCE = 1e-5  # over five steps; AdamW amplifies rounding where a second moment is tiny
FINAL_TOLERANCE = 1e-3  # of the way that a parameter went in five steps
SMALL = ("--model.n_layers=3", "--training.seq_len=64", "--schedule.warmup_steps=5")

PLANS: dict[str, tuple[int, list[str]]] = {
    "shard2": (2, ["--parallel.dp_shard=2"]),
    "replicate2": (2, ["--parallel.dp_shard=1", "--parallel.dp_replicate=2"]),
    "shard4": (4, ["--parallel.dp_shard=4"]),
    "replicate4": (4, ["--parallel.dp_shard=1", "--parallel.dp_replicate=4"]),
    "hsdp2x2": (4, ["--parallel.dp_shard=2", "--parallel.dp_replicate=2"]),
}


@pytest.fixture(scope="module")
def references(pool: Pool, topics: Path) -> dict[int, Run]:
    return {
        seed: run(pool, 1, topics, 5, *SMALL, f"--training.seed={seed}", "--training.micro_batch_size=16") for seed in (1, 2, 3)
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_computes_what_one_process_computes(
    pool: Pool, topics: Path, references: dict[int, Run], plan: str, seed: int
) -> None:
    world, words = PLANS[plan]
    micro = (1, 2, 4)[seed - 1]  # each plan meets each micro batch, each with a seed of its own
    got = run(pool, world, topics, 5, *SMALL, *words, f"--training.seed={seed}", f"--training.micro_batch_size={micro}")
    reference = references[seed]
    for name, weight in reference.initial.items():
        assert np.array_equal(got.initial[name], weight), f"{name} starts differently"
    error, name = gradient_error(got, reference)
    assert error < GRADIENT_TOLERANCE, f"gradient of {name} is off by {error:.2e}"
    assert loss_error(got, reference) < LOSS_TOLERANCE
    assert got.norms == pytest.approx(reference.norms, rel=1e-5)
    moved = {name: np.linalg.norm(reference.final[name] - start) for name, start in reference.initial.items()}
    off = {name: np.linalg.norm(got.final[name] - reference.final[name]) / moved[name] for name in moved}
    assert max(off.values()) < FINAL_TOLERANCE, max(off, key=off.__getitem__)


def test_tied_embeddings_and_odd_widths(pool: Pool, topics: Path) -> None:
    """Shards of uneven length, one rank with less, and one weight used at both ends of the model."""
    odd = (
        "--model.tied_embeddings=true",
        "--model.vocab_size=259",
        "--model.dim=72",
        "--model.n_heads=6",
        "--model.n_kv_heads=3",
    )
    reference = run(pool, 1, topics, 5, *SMALL, *odd)
    for world, words in (PLANS["shard4"], PLANS["hsdp2x2"], PLANS["replicate2"]):
        got = run(pool, world, topics, 5, *SMALL, *odd, *words)
        assert all(np.array_equal(got.initial[name], weight) for name, weight in reference.initial.items())
        assert gradient_error(got, reference)[0] < GRADIENT_TOLERANCE
        assert loss_error(got, reference) < LOSS_TOLERANCE


@pytest.mark.parametrize("plan", ["shard2", "replicate2", "hsdp2x2"])
def test_bfloat16_under_a_plan_is_as_good_as_on_one_rank(
    pool: Pool, topics: Path, references: dict[int, Run], plan: str
) -> None:
    """bf16 rounds differently where sums are cut differently; a plan must not be further from fp32 than one rank is."""
    world, words = PLANS[plan]
    bf16 = "--precision.param=bfloat16"
    alone = run(pool, 1, topics, 5, *SMALL, bf16)
    got = run(pool, world, topics, 5, *SMALL, *words, bf16)
    for name, weight in references[1].initial.items():
        assert np.array_equal(got.initial[name], weight), f"the master of {name} is not the float32 one"
    assert gradient_error(got, references[1])[0] < 1.5 * gradient_error(alone, references[1])[0]
    assert loss_error(got, references[1]) < 5e-3


def test_a_rank_that_fails_ends_the_call_with_its_traceback(pool: Pool) -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)rank 1: .*planted on rank 1"):
        pool.run(2, fail_on_rank_one, timeout=60)


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("planted on rank 1")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("plan", ["shard2", "hsdp2x2", "replicate2"])
def test_validation_gives_the_one_process_loss_and_leaves_the_shards(pool: Pool, topics: Path, plan: str) -> None:
    losses = []
    for world, words in ((1, []), PLANS[plan]):
        data = [f"--data.path={topics}", "--data.tokenizer=bytes"]
        config = load(ROOT / "train_configs" / "debug.toml", [*data, *SMALL, *words])
        results = pool.run(world, validate, config)
        assert all(same for _, same in results), "validation left another kind of parameters behind"
        losses.append(sum(loss for loss, _ in results))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def validate(rank: int, config: Config) -> tuple[float, bool]:
    """On a worker: this rank's summed loss of one batch, and whether its parameters are what they were."""
    world = dist.get_world_size()
    parts = build(config, torch.device("cpu"), make_mesh("cpu", degrees(config.parallel, world), 30))
    before = {name: (type(p), tuple(p.shape)) for name, p in parts.model.named_parameters()}
    tokens = torch.randint(257, (8, 65), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    loss = parts.step.evaluate({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    return loss.item(), before == {name: (type(p), tuple(p.shape)) for name, p in parts.model.named_parameters()}
