"""Recompute: the same gradients to the bit, fewer tensors kept, the dropouts' masks again, words that are wrong."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan.config import Recompute
from titan.dropout import Noise, replace_dropouts
from titan.fields import SAVED
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer, rope_tables
from titan.parallel.recompute import GROUPS, recompute
from titan.parallel.weight_gradients import WeightGradients
from titan.precision.mixed import compute_in

MODES = [
    Recompute(mode="full"),
    Recompute(mode="block", every=2),
    Recompute(mode="selective"),
    Recompute(mode="selective", save=["attention", "aten.silu"]),
    Recompute(mode="selective", save=[]),
]
SIZES = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64}


def make(config: Recompute, layers: int = 3, narrow: bool = False) -> tuple[Transformer, Noise]:
    """A Llama with dropouts after its blocks' first norms and attentions."""
    torch.manual_seed(0)
    model, noise = Transformer(Config(n_layers=layers, **SIZES)), Noise(1)  # type: ignore[arg-type]
    model.init_weights()
    blocks = list(model.layers.values())
    for name in [f"layers.{i}.{part}" for i in range(layers) for part in ("attention_norm", "attention.o")]:
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), nn.Dropout(0.2)))
    replace_dropouts(model, noise)
    if narrow:
        compute_in([*blocks, model], torch.bfloat16)
    recompute(blocks, config, noise)
    return model, noise


def gradients(model: Transformer, noise: Noise, steps: int = 2) -> list[Tensor]:
    """Losses and gradients of two micro batches a step, of which the second's forward runs before the first's backward."""
    found = []
    for step in range(steps):
        losses = []
        for first in (0, 2):
            tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(step + first))
            with noise.at(step, torch.arange(2) + first, torch.arange(16)):
                losses.append(model(tokens[:, :-1], labels=tokens[:, 1:]))
        for loss in losses:
            loss.backward()
        found += [*(loss.detach() for loss in losses), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{'-'.join(c.save)}")
def test_gradients_are_equal_to_the_bit(config: Recompute, narrow: bool) -> None:
    wanted = gradients(*make(Recompute(), narrow=narrow))
    found = gradients(*make(config, narrow=narrow))
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Calls(TorchDispatchMode):
    """Counts the operations of a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def computed_again(config: Recompute) -> dict[str, int]:
    """Forward operations in the backward pass of two layers."""
    model, noise = make(config, layers=2)
    tokens = torch.randint(64, (2, 17))
    with noise.at(0, torch.arange(2), torch.arange(16)):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    with Calls() as calls:
        loss.backward()
    return calls.counts


def test_what_is_saved_is_not_computed_again() -> None:
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    none, full, block = (computed_again(Recompute(mode=mode)) for mode in ("none", "full", "block"))  # type: ignore[arg-type]
    default = computed_again(Recompute(mode="selective"))
    silu = computed_again(Recompute(mode="selective", save=["aten.silu"]))
    assert flash not in none
    assert "silu" not in none
    assert (full[flash], full["silu"]) == (2, 2)
    assert (block[flash], block["silu"]) == (1, 1)
    assert flash not in default
    assert (default["silu"], default["mm"]) == (2, none["mm"])
    assert full["mm"] == none["mm"] + 2 * 7 - 2, "the last matrix of a block is not needed again"
    assert "silu" not in silu
    assert silu[flash] == 2


def saved(config: Recompute, d: int = 32, k: int = 16, f: int = 48) -> tuple[float, float]:
    """Elements per token that one block keeps outside of recompute, and what `none` keeps by the docstring's formula."""
    model, _ = make(config, layers=1)
    block = model.layers["0"].eval()  # without the dropouts' masks
    tokens, kept = 2 * 16, dict[int, Tensor]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    cos, sin = rope_tables(torch.arange(16), model.config)

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(torch.randn(2, 16, d, requires_grad=True), cos=cos, sin=sin)
    others = own | {cos.untyped_storage().data_ptr(), sin.untyped_storage().data_ptr()}
    return sum(x.untyped_storage().nbytes() / 4 for at, x in kept.items() if at not in others) / tokens, 8 * d + 2 * k + 4 * f


def test_fewer_elements_are_kept() -> None:
    none, formula = saved(Recompute())
    assert formula <= none < formula + 8, "norms and attention keep a few numbers a token besides"
    assert saved(Recompute(mode="full"))[0] == 32


class Keep(torch.autograd.Function):
    """An operation of its own, as attention over documents is: the dispatcher sees what it calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        return grad * x * out


def test_selective_sees_into_functions_of_ones_own() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Keep.apply(F.silu(x)).sin()

    found = []
    for config in (Recompute(), Recompute(mode="selective")):
        block = Block()
        recompute([block], config, Noise(0))
        x = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = block(x).sum()
        with Calls() as calls:
            y.backward()
        assert x.grad is not None
        found.append(x.grad)
        assert "_scaled_dot_product_flash_attention_for_cpu" not in calls.counts
    assert calls.counts["silu"] == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{'-'.join(c.save)}")
def test_gradients_of_weights_can_be_made_later(config: Recompute) -> None:
    """The zero-bubble pipeline's mode is active in the forward pass, and again around the backward pass that recomputes."""
    tokens = torch.randint(64, (2, 17))
    found = []
    for mode in (None, WeightGradients()):
        model, noise = make(config)
        with noise.at(0, torch.arange(2), torch.arange(16)), mode or nullcontext():
            loss = model(tokens[:, :-1], labels=tokens[:, 1:])
        edge = torch.autograd.graph.get_gradient_edge(loss)
        with mode or nullcontext():
            torch.autograd.backward(edge)  # given the loss itself, PyTorch takes the mode off
        if mode is not None:
            assert model.get_parameter("layers.1.ffn.up.weight").grad is None
            mode.run()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        made = found[1][name]
        assert made is not None
        assert not made.requires_grad, "or it would keep all that it was made of"
        torch.testing.assert_close(made, grad, msg=name)


def test_nothing_is_kept_or_doubled_without_gradients() -> None:
    model, _ = make(Recompute(mode="selective"))
    plain, _ = make(Recompute())
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("aten.sillu", "no operation 'aten.sillu'; did you mean 'aten.silu'?"),
        ("aten.Qqqqqqqq", "expected an ATen operation"),
        ("aten.silu_", "'aten.silu_' changes its input"),
        ("aten.no way", "no operation 'aten.no way'"),
    ],
)
def test_words_that_name_no_operation(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^recompute\.save: ") as error:
        recompute([nn.Identity()], Recompute(mode="selective", save=["mm", word]), Noise(0))
    assert said in str(error.value)


def test_the_words_are_the_configs() -> None:
    assert tuple(GROUPS) == SAVED
