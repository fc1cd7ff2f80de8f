"""Dropout by position: the share, the mean, independence, and that a mask is a function of global indices alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from titan.dropout import Noise, replace_dropouts

SEQ = 32


class Parts(nn.Module):
    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.first = nn.Dropout(p)
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p))


def kept(dropout: nn.Module, noise: Noise, step: int, rows: Tensor, indices: Tensor, channels: int = 64) -> Tensor:
    """Which elements of [rows, indices, channels] stay."""
    with noise.at(step, rows, indices):
        return dropout(torch.ones(len(rows), len(indices), channels)) != 0


def parts(seed: int = 1, p: float = 0.25, rank: int = 0, degree: int = 1) -> tuple[Parts, Noise]:
    model, noise = Parts(p), Noise(seed, rank, degree)
    replace_dropouts(model, noise)
    return model, noise


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_a_share_p_is_dropped_and_the_mean_stays(p: float) -> None:
    model, noise = parts(p=p)
    n = 8 * 256 * 255
    with noise.at(3, torch.arange(8), torch.arange(256)):
        out = model.first(torch.ones(8, 256, 255))
    assert abs((out == 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n) + 2**-17
    if p < 1:
        assert out.double().mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))
        assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-3)


def test_a_mask_is_a_function_of_global_indices() -> None:
    """However a batch is cut and ordered over ranks and micro batches, also where a rank holds a part of a local sequence."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    batch, p, step = 12, draw.uniform(0.05, 0.95), draw.randrange(10**6)
    model, noise = parts(seed, p)
    whole = kept(model.inside[1], noise, step, torch.arange(batch), torch.arange(SEQ))
    rows = torch.tensor(draw.sample(range(batch), 5))
    indices = torch.tensor(draw.sample(range(SEQ), 16))
    part = kept(model.inside[1], noise, step, rows, indices)
    assert torch.equal(part, whole[rows][:, indices]), f"seed {seed}"
    assert torch.equal(kept(model.inside[1], noise, step, rows, indices, channels=61), part[..., :61])
    for rank in range(4):  # the module's input is a quarter of the local sequence
        other, noise = parts(seed, p, rank, 4)
        mine = indices[rank * 4 : rank * 4 + 4]
        with noise.at(step, rows, indices):
            out = other.inside[1](torch.ones(5, 4, 64)) != 0
            assert torch.equal(out, whole[rows][:, mine]), f"seed {seed}, rank {rank}"
            gathered = other.inside[1](torch.ones(5, 16, 64)) != 0  # or all of it
            assert torch.equal(gathered, part)


def test_masks_are_independent_over_everything_they_depend_on() -> None:
    """Two masks that differ in one thing agree as often as two of coins do; so do neighbours within one."""
    model, noise = parts(p=0.5)
    rows, indices = torch.arange(64), torch.arange(SEQ)
    base = kept(model.first, noise, 5, rows, indices)
    other_seed, _ = parts(seed=2, p=0.5)
    changed = {
        "step": kept(model.first, noise, 6, rows, indices),
        "row": kept(model.first, noise, 5, rows + 1, indices),
        "far row": kept(model.first, noise, 5, rows + 2**33, indices),
        "index": kept(model.first, noise, 5, rows, indices + 1),
        "row and index": kept(model.first, noise, 5, rows + 1, indices - 1),
        "step and row": kept(model.first, noise, 6, rows - 1, indices),
        "module": kept(model.inside[1], noise, 5, rows, indices),
        "seed": kept(other_seed.first, other_seed.first.noise, 5, rows, indices),  # type: ignore[arg-type]
        "channel": base.roll(1, -1),
        "word": base.roll(4, -1),
    }
    allowed = 5 * 0.5 / math.sqrt(base.numel())
    for name, mask in changed.items():
        assert abs((mask == base).double().mean().item() - 0.5) < allowed, name
    counts = base.double().mean((0, 1))  # per channel
    assert (counts - 0.5).abs().max() < 5 * 0.5 / math.sqrt(64 * SEQ)
    per_row = base.double().sum((1, 2))  # a binomial's spread, not less and not more
    assert 0.6 < per_row.var().item() / (SEQ * 64 / 4) < 1.6


def test_gradients_pass_where_values_do() -> None:
    model, noise = parts()
    x = torch.randn(2, SEQ, 16, requires_grad=True)
    with noise.at(0, torch.arange(2), torch.arange(SEQ)):
        y = model.first(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, x * x.grad)
    assert 0.1 < (x.grad == 0).float().mean() < 0.4


def test_it_takes_the_place_of_dropout() -> None:
    model, noise = parts()
    assert [name for name, m in model.named_modules() if type(m).__name__ == "Dropout"] == ["first", "inside.1"]
    assert not list(model.first.state_dict())
    x = torch.randn(1, 1, 8)
    with pytest.raises(RuntimeError, match=r"Noise\.at"):
        model.first(x)
    with noise.at(0, torch.arange(2), torch.arange(5)), pytest.raises(RuntimeError, match=r"\[1, 1\] tokens"):
        model.first(x)
    assert model.eval().first(x) is x
    off = Parts(p=0.0)
    replace_dropouts(off, noise)
    assert type(off.first) is nn.Dropout
    with pytest.raises(ValueError, match=r"^0 is Dropout2d"):
        replace_dropouts(nn.Sequential(nn.Dropout2d()), noise)


def test_keys_can_be_set_again_after_an_error_too() -> None:
    model, noise = parts()
    first = noise.at(0, torch.arange(1), torch.arange(4))
    with first:
        keys = noise.keys
        with pytest.raises(ZeroDivisionError), noise.at(1, torch.arange(1), torch.arange(4)):
            raise ZeroDivisionError
        assert noise.keys is keys
    assert noise.keys is None
    with noise.using(keys):
        again = model.first(torch.ones(1, 4, 8)) != 0
    assert torch.equal(again, kept(model.first, noise, 0, torch.arange(1), torch.arange(4), 8))


def test_it_takes_the_global_random_state_nowhere() -> None:
    model, noise = parts()
    before = torch.get_rng_state()
    kept(model.first, noise, 0, torch.arange(2), torch.arange(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_compiled_masks_are_the_same_and_new_at_each_step() -> None:
    blocks = nn.ModuleList(Parts() for _ in range(3))
    noise = Noise(1)
    replace_dropouts(blocks, noise)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = [torch.compile(block.first.forward, backend=backend, dynamic=False) for block in blocks]  # type: ignore[union-attr]
    x = torch.ones(2, SEQ, 16)
    seen = []
    for step in range(3):
        with noise.at(step, torch.arange(2) + 2 * step, torch.arange(SEQ)):
            for block, fast in zip(blocks, compiled, strict=True):
                seen.append(fast(x))
                assert torch.equal(seen[-1], block.first(x))  # type: ignore[union-attr, operator]
    assert len(graphs) == 1, "each block, or each step, was compiled anew"
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 9
