"""Offloaded activations: the same gradients to the bit, each storage copied once, weights never, memory let go of."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan.config import Recompute
from titan.dropout import Noise
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.parallel.offload import LEAST_BYTES, Link, offload_activations
from titan.parallel.recompute import recompute
from titan.precision.mixed import compute_in

CPU = torch.device("cpu")
SIZES = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64}


def make(offloaded: bool, mode: Any = "none", narrow: bool = False) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Config(n_layers=3, **SIZES))  # type: ignore[arg-type]
    model.init_weights()
    blocks = list(model.layers.values())
    if narrow:
        compute_in([*blocks, model], torch.bfloat16)
    recompute(blocks, Recompute(mode=mode), Noise(0))
    if offloaded:
        offload_activations([blocks], CPU)
    return model


def losses(model: Transformer, seed: int) -> list[Tensor]:
    """Of two micro batches."""
    draw = torch.Generator().manual_seed(seed)
    return [model(row[:, :-1], labels=row[:, 1:]) for row in torch.randint(64, (2, 4, 65), generator=draw)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["none", "full", "block"])
def test_gradients_are_equal_to_the_bit(mode: str, narrow: bool, seed: int) -> None:
    found = []
    for offloaded in (False, True):
        model = make(offloaded, mode, narrow)
        for loss in reversed(losses(model, seed)):  # as in a pipeline, the other way round than they were made
            loss.backward(retain_graph=True)
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy to the host."""
    sizes: list[int] = []
    original = Link.to_host

    def counting(link: Link, flat: Tensor) -> Tensor:
        sizes.append(flat.nbytes)
        return original(link, flat)

    monkeypatch.setattr(Link, "to_host", counting)
    return sizes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.made: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight
        self.made.append(weakref.ref(hidden.untyped_storage()))
        return hidden.sin() + hidden.view(-1, 32).cos().view_as(x) + (hidden * hidden.flip(0))


def test_a_storage_is_copied_once_and_goes_and_a_weight_is_not(copied: list[int]) -> None:
    block = Block()
    offload_activations([[block]], CPU)
    x = torch.randn(64, 64, requires_grad=True)
    y = block(x)
    size = 64 * 64 * 4
    assert copied == [size] * 3, "x, hidden for its four uses, hidden.flip"
    assert block.made[0]() is None, "nothing keeps what lies with the host"
    y.sum().backward()
    assert x.grad is not None
    found, other, block.weight.grad = x.grad, Block(), None
    other.load_state_dict(block.state_dict())
    z = x.detach().clone().requires_grad_()
    other(z).sum().backward()
    assert torch.equal(found, z.grad)  # type: ignore[arg-type]


class Changing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.ones_like(x)
        first = x * buffer
        with torch.no_grad():
            buffer.mul_(3)
        return first + x * buffer


def test_what_is_kept_may_not_change_as_without_offload() -> None:
    block, x = Changing(), torch.randn(64, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        block(x).sum().backward()
    offload_activations([[block]], CPU)
    with pytest.raises(RuntimeError, match="in place"):
        block(x)


def test_a_narrow_copy_of_a_weight_is_not_copied(copied: list[int]) -> None:
    model = Transformer(Config(n_layers=1, **{**SIZES, "dim": 96, "ffn_dim": 160}))  # type: ignore[arg-type]
    model.init_weights()
    compute_in([model.layers["0"], model], torch.bfloat16)  # type: ignore[index, list-item]
    offload_activations([list(model.layers.values())], CPU)
    losses(model, 0)[0].backward()
    assert copied
    matrices = {p.numel() * 2 for p in model.layers.parameters() if p.dim() > 1}
    assert not matrices & set(copied)


def test_without_gradients_and_small_tensors_nothing_happens(copied: list[int]) -> None:
    block = Block()
    offload_activations([[block]], CPU)
    with torch.no_grad():
        block(torch.randn(64, 64))
    small = nn.Tanh()
    offload_activations([[small]], CPU)
    small(torch.randn(LEAST_BYTES // 4 - 1, requires_grad=True)).sum().backward()
    assert copied == []


def test_nothing_is_held_after_a_step() -> None:
    model = make(offloaded=True)
    live = []
    for seed in range(4):
        for loss in losses(model, seed):
            loss.backward()
        del loss
        model.zero_grad()
        gc.collect()
        live.append(sum(issubclass(type(item), Tensor) for item in gc.get_objects()))
    assert live[1] == live[2] == live[3]
