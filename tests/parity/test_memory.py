"""Memory over a step: every storage from birth to death, and what plans, recompute and offload leave of it, by formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plans import small

from titan.config import degrees
from titan.drawing.memory import KINDS, Story, amount, on_device
from titan.memory import Memory, watch_step
from titan.pool import Pool


def sizes(memory: Memory) -> dict[str, int]:
    return {kind: size for kind, size in zip(KINDS, memory.story().points[-1][1], strict=True) if size}


def test_storages_are_followed_to_the_byte() -> None:
    memory = Memory()
    with memory.patched(), memory.at("forward"):
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]
        c = b + 1
        assert sizes(memory) == {"activations": 4000 + 3200}
        del a
        assert sizes(memory) == {"activations": 7200}, "a view keeps it"
        del b
        assert sizes(memory) == {"activations": 3200}
        c.untyped_storage().resize_(0)
        assert sizes(memory) == {}
        c.untyped_storage().resize_(3200)
        assert sizes(memory) == {"gathered": 3200}
        x = torch.ones(50, requires_grad=True)
        y = (x * x).sum()
        y.backward()
    assert x.grad is not None
    assert sizes(memory) == {"gathered": 3200, "activations": 200 + 4, "backward": 200}
    memory.label(x.grad, "gradients")
    assert sizes(memory)["gradients"] == 200
    assert max(on_device(point) for _, point in memory.story().points) >= 7200
    del c, x, y
    assert sizes(memory) == {}


def watched(pool: Pool, data: Path, plan: str, *words: str) -> list[Story]:
    config = small(data, plan, "llama3", "--model.vocab_size=260", *words)  # even: FSDP would fill an odd one up
    return pool.run(degrees(config.parallel, 1).world, watch_step, config, pool.group_seconds)


def of(kind: str, sizes: tuple[int, ...]) -> int:
    return sizes[KINDS.index(kind)]


@pytest.mark.parametrize("plan", ["training.micro_batch_size=2", "dp_shard=2", "tp=2", "pp=2", "dp_shard=2,pp=2"])
def test_states_are_what_the_formula_says_and_nothing_stays(pool: Pool, short_documents: Path, plan: str) -> None:
    alone = watched(pool, short_documents, "training.micro_batch_size=2")
    whole = of("parameters", alone[0].points[0][1])
    stories = watched(pool, short_documents, plan)
    held = sum(of("parameters", story.points[0][1]) for story in stories)
    assert held == whole if plan != "tp=2" else whole < held < 1.1 * whole, "tensor parallelism repeats the norms"
    for story in stories:
        moments = story.points[0][1], story.points[-1][1], story.peak[1]
        first, last, most = (dict(zip(KINDS, at, strict=True)) for at in moments)
        assert first["optimizer"] == pytest.approx(2 * first["parameters"], rel=0.02), "and a step count each"
        assert last["buffers"] in (0, 8), "gloo's thread may still hold the last message: a norm and a loss"
        for kind in ("gradients", "gathered", "activations", "backward", "host"):
            assert last[kind] == 0, kind
        assert (first["parameters"], first["optimizer"]) == (last["parameters"], last["optimizer"])
        assert most["activations"] > 0
        at_norm = max(of("gradients", at) for _, at in story.points)
        assert at_norm >= first["parameters"]
    assert any(of("gathered", at) for story in stories for _, at in story.points) == ("dp_shard" in plan)


def test_a_block_keeps_what_the_formula_says(pool: Pool, short_documents: Path) -> None:
    """The peak of two more blocks: per token 8 d + 2 k + 4 f numbers each (titan/parallel/recompute.py), or d."""
    for mode, numbers in (("none", 8 * 32 + 2 * 16 + 4 * 50), ("full", 32)):
        plan = f"training.micro_batch_size=2,recompute.mode={mode}"
        peaks = []
        for layers in (2, 4):
            (story,) = watched(pool, short_documents, plan, f"--model.n_layers={layers}")
            peaks.append(max(of("activations", at) for _, at in story.points))
        tokens = 2 * 32
        assert peaks[1] - peaks[0] == pytest.approx(2 * tokens * numbers * 4, rel=0.02), mode


def test_offload_leaves_the_device_empty(pool: Pool, short_documents: Path) -> None:
    words = ("--model.n_layers=8",)
    (usual,) = watched(pool, short_documents, "training.micro_batch_size=8", *words)
    (states,) = watched(pool, short_documents, "training.micro_batch_size=8,offload.states=true", *words)
    (activations,) = watched(pool, short_documents, "training.micro_batch_size=8,offload.activations=true", *words)
    first = usual.points[0][1]
    assert of("host", states.points[0][1]) == on_device(first)
    assert on_device(states.points[0][1]) == 0
    assert max(of("host", at) for _, at in states.points) >= 4 * of("parameters", first), "and gradients"
    kept, left = (max(of("activations", at) for _, at in story.points) for story in (usual, activations))
    assert left < 0.45 * kept, "two or three of eight blocks', and the ends"
    assert max(of("host", at) for _, at in activations.points) > 0.5 * kept


def test_amounts_are_for_people() -> None:
    assert [amount(size) for size in (0, 999, 1000, 52_400, 999_400, 4_800_000_000)] == [
        *("0 B", "999 B", "1 kB", "52.4 kB", "999 kB", "4.8 GB")
    ]
