"""The kernels, forward and backward, against float64: their plain lines, and the Triton ones in Triton's interpreter.

The interpreter runs a kernel's programs one after another on the CPU, in a process that was started for it. It computes
bfloat16 and Float8 wrongly, so the Triton ones are tested in float32 here, and on a GPU in tests/gpu.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan.kernels import float8_cast, linear_cross_entropy, rms_norm, rope, swiglu
from titan.kernels.float8_cast import scale_for, scaled
from titan.models.llama3.model import AddNorm, Rotation, SummedCrossEntropy, SwiGLU

Call = Callable[..., Any]
MODULES = (float8_cast, linear_cross_entropy, rms_norm, rope, swiglu)
IN_TRITON = {
    "rms_norm": "rms_norm_triton.forward",
    "rms_norm_backward": "rms_norm_triton.backward",
    "rope": "rope_triton.turn",
    "swiglu": "swiglu_triton.forward",
    "swiglu_backward": "swiglu_triton.backward",
    "cross_entropy_add_block": "linear_cross_entropy_triton.add_block",
    "cross_entropy_gradient": "linear_cross_entropy_triton.gradient",
    "float8_cast": "float8_cast_triton.cast",
}


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _in_triton(where: str, arguments: tuple[Any, ...]) -> Any:
    module, name = where.split(".")
    found = getattr(import_module(f"titan.kernels.{module}"), name)(*arguments)
    return tuple(t.view(torch.uint8) if t.element_size() == 1 else t for t in found) if isinstance(found, tuple) else found


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        yield pool


@pytest.fixture(params=["plain", "triton"])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls one of the kernels' operations by its name."""
    if request.param == "plain":
        return lambda name, *arguments: getattr(torch.ops.titan, name)(*arguments)
    pool = request.getfixturevalue("interpreter")
    return lambda name, *arguments: pool.submit(_in_triton, IN_TRITON[name], arguments).result(timeout=60)


def close(found: Tensor, wanted: Tensor, within: float = 2e-6) -> None:
    """Within so much of the largest, float32 rounding in sums of a few hundred."""
    assert found.shape == wanted.shape
    if found.numel():
        assert (found.double() - wanted).abs().max() <= within * wanted.abs().max().clamp(min=1e-30)


def in_torch(data: Tensor) -> bool:
    """Whether PyTorch cast it, and not the interpreter, whose bytes come back."""
    return data.dtype != torch.uint8


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape) * 2


SHAPES = [(1, 5), (1, 257), (7, 16), (2, 5, 13), (300, 3), (0, 8), (2, 0, 4)]


@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(call: Call, shape: tuple[int, ...], with_branch: bool) -> None:
    torch.manual_seed(sum(shape))
    x, weight, dy = numbers(*shape), numbers(shape[-1]), numbers(*shape)
    branch, dh = (numbers(*shape), numbers(*shape)) if with_branch else (None, None)
    h, y, r = call("rms_norm", x, branch, weight, 1e-5)
    dx, dw = call("rms_norm_backward", dy, dh, h if with_branch else x, r, weight)

    norm = AddNorm(shape[-1], eps=1e-5, dtype=torch.float64)
    norm.weight.data = weight.double()
    input_ = x.double().requires_grad_()
    h_wanted, y_wanted = norm(input_, branch.double() if branch is not None else torch.zeros(()))
    torch.autograd.backward((h_wanted, y_wanted), (dh.double() if dh is not None else torch.zeros_like(h_wanted), dy.double()))
    assert input_.grad is not None
    assert norm.weight.grad is not None
    for found, wanted in ((y, y_wanted), (dx, input_.grad), (dw, norm.weight.grad)):
        close(found, wanted.detach())
    if with_branch:
        close(h, h_wanted.detach())


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 14), (1, 7, 11, 4), (2, 3, 2, 130), (2, 0, 3, 4)], ids=str)
def test_rope(call: Call, shape: tuple[int, ...], by_batch: bool) -> None:
    torch.manual_seed(sum(shape))
    batch, seq, heads, width = shape
    angle = numbers(*((batch,) if by_batch else ()), seq, 1, width // 2)
    x = numbers(batch, heads, seq, width).transpose(1, 2)  # as gradients of attention lie
    dy = numbers(*shape)
    wanted = x.double().requires_grad_()
    turned = Rotation().double()(wanted, angle.cos(), angle.sin())
    turned.backward(dy.double())
    assert wanted.grad is not None
    close(call("rope", x, angle.cos(), angle.sin(), False), turned.detach(), 3e-7)
    close(call("rope", dy, angle.cos(), angle.sin(), True), wanted.grad, 3e-7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1031), (2, 5, 13), (0, 4)], ids=str)
def test_swiglu(call: Call, shape: tuple[int, ...]) -> None:
    torch.manual_seed(sum(shape))
    gate, dy = numbers(*shape) * 5, numbers(*shape)
    up = numbers(*reversed(shape)).permute(*reversed(range(len(shape))))  # columns first
    gate64, up64 = gate.double().requires_grad_(), up.double().requires_grad_()
    wanted = SwiGLU()(gate64, up64)
    wanted.backward(dy.double())
    assert gate64.grad is not None
    assert up64.grad is not None
    close(call("swiglu", gate, up), wanted.detach(), 1e-6)
    d_gate, d_up = call("swiglu_backward", dy, gate, up)
    close(d_gate, gate64.grad, 1e-6)
    close(d_up, up64.grad, 1e-6)


@pytest.mark.parametrize(("tokens", "cuts"), [(1, (0, 1)), (5, (0, 131)), (7, (0, 40, 300, 301)), (3, (0, 2500)), (0, (0, 9))])
def test_cross_entropy_of_blocks(call: Call, tokens: int, cuts: tuple[int, ...]) -> None:
    """Blocks of words one after another; in the second place a label that does not count. Many words' logits may be -inf."""
    torch.manual_seed(tokens)
    z, words = numbers(tokens, cuts[-1]) * 10, cuts[-1]
    z[:1, : words // 10 * 9] = -torch.inf
    labels = torch.stack((torch.randint(words // 10 * 9, words, (tokens,)),) * 2, 1)[:, 0]  # not contiguous
    labels[1:2] = -100
    g = (labels >= 0) * torch.rand(tokens)
    found = torch.full((tokens,), -torch.inf), torch.zeros(tokens), torch.zeros(tokens)
    for begin, end in pairwise(cuts):
        found = call("cross_entropy_add_block", *found, z[:, begin:end].contiguous(), labels, begin)
    largest, total, target = found
    wide = z.double().requires_grad_()
    wanted = F.cross_entropy(wide, labels, reduction="none")
    wanted.backward(g.double())
    assert wide.grad is not None
    lse = largest + total.log()
    close((lse - target) * (labels >= 0), wanted.detach())
    for begin, end in pairwise(cuts):
        dz = call("cross_entropy_gradient", z[:, begin:end].contiguous(), labels, lse, g, g, begin)
        close(dz, wide.grad[:, begin:end], 1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (67, 65), (0, 3)], ids=str)
def test_float8_cast(call: Call, shape: tuple[int, int], by_row: bool, turned: bool) -> None:
    """Scales are equal. Triton's interpreter may round a number to a neighbour of the nearest, loses the carry of one that
    is rounded up to a power of two, and knows no numbers below the smallest with all bits."""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).exp() * torch.randn(shape)
    x = x.t().contiguous().t() if turned else x
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found = call("float8_cast", x, dtype, by_row, True)
        for (data, unscale), operand in zip((found[:2], found[2:]), (x, x.t()), strict=True):
            wanted = scaled(operand, dtype, by_row)
            assert torch.equal(unscale, wanted.unscale)
            assert data.shape == wanted.data.shape
            code, least = wanted.data.view(torch.uint8).int(), 8 if dtype == torch.float8_e4m3fn else 4
            off = data.view(torch.uint8).int() - code
            if not in_torch(data):
                off = off[(code & 127) > least]
            assert torch.isin(off, torch.tensor((0,) if in_torch(data) else (-1, 0, 1, -least))).all()


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_broken_number_stays_broken(call: Call, broken: float) -> None:
    x = torch.ones(3, 5)
    x[1, 2] = broken
    data, unscale, turned, turned_unscale = call("float8_cast", x, torch.float8_e4m3fn, False, True)
    assert torch.equal(unscale, scaled(x, torch.float8_e4m3fn, False).unscale)
    assert torch.equal(turned_unscale, unscale)
    if in_torch(data) or broken == torch.inf:  # the interpreter makes a number of what is none
        for found in (data, turned):
            assert not (found.view(torch.float8_e4m3fn).float() * unscale).isfinite().all()


def test_powers_of_two_have_their_own_scale(call: Call) -> None:
    """A scale that is a little off would be half as large there."""
    exponents = torch.arange(-60, 60)
    x = (448 * 2.0**exponents)[:, None].float()
    unscale = call("float8_cast", x, torch.float8_e4m3fn, True, False)[1]
    assert torch.equal(unscale[:, 0], 2.0**exponents)
    assert torch.equal(unscale.reciprocal(), scale_for(x, torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_public_functions_have_gradients(dtype: torch.dtype) -> None:
    """Through autograd, in the format of training; off by one rounding of what comes out."""
    torch.manual_seed(1)
    x, branch, gate, up = (numbers(2, 6, 4, 10).to(dtype).requires_grad_() for _ in range(4))
    weight, angle = numbers(10).to(dtype).requires_grad_(), numbers(6, 1, 5)
    inputs = [x, branch, gate, up, weight]

    def through(norm: Any, add: Any, turn: Any, gated: Any, inputs: list[Tensor]) -> list[Tensor]:
        x, branch, gate, up, weight = inputs
        h, y = add(x, branch, weight)
        out = [h, y, norm(x, weight), turn(x, angle.cos(), angle.sin()), gated(gate, up)]
        loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in out)
        return [*out, *torch.autograd.grad(loss, inputs)]  # type: ignore[arg-type]

    norm, add = (partial(function, eps=1e-5) for function in (rms_norm.rms_norm, rms_norm.add_rms_norm))
    found = through(norm, add, rope.rope, swiglu.swiglu, inputs)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (10,), w, 1e-5)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = through(plain, lambda x, b, w: (x + b, plain(x + b, w)), Rotation().double(), SwiGLU(), wide)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        close(a, b, 2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("most", [0, 700])
def test_the_fused_loss_is_the_plain_one(most: int) -> None:
    torch.manual_seed(2)
    h, weight, labels = numbers(5, 8).requires_grad_(), numbers(300, 8).requires_grad_(), torch.randint(0, 300, (5,))
    labels[2] = -100
    loss = linear_cross_entropy.linear_cross_entropy(h, weight, labels, most=most, fused=True)
    wide = [t.detach().double().requires_grad_() for t in (h, weight)]
    wanted = SummedCrossEntropy()(wide[0].float(), wide[1].float(), labels)
    close(loss.detach(), wanted.detach().double())
    for a, b in zip(torch.autograd.grad(loss, (h, weight)), torch.autograd.grad(wanted, wide), strict=True):
        close(a, b)


def test_what_pytorch_is_told_of_the_operations_is_true() -> None:
    """Schemas, shapes without data, gradients, and all of it under a compiler's tracing."""
    x, weight = numbers(2, 3, 4, 8).requires_grad_(), numbers(8).requires_grad_()
    cos, tokens = numbers(3, 1, 4), numbers(5)
    ops, z, labels = torch.ops.titan, numbers(5, 300), torch.randint(0, 300, (5,))
    for operation, arguments in (
        (ops.rms_norm, (x, None, weight, 1e-5)),
        (ops.rms_norm, (x, x.detach().clone().requires_grad_(), weight, 1e-5)),
        (ops.rms_norm_backward, (numbers(2, 8), numbers(2, 8), numbers(2, 8), numbers(2, 1), numbers(8))),
        (ops.rope, (x, cos, cos, False)),
        (ops.rope, (x.detach().transpose(1, 2).contiguous().transpose(1, 2), cos, cos, True)),
        (ops.swiglu, (x, x.detach().clone().requires_grad_())),
        (ops.swiglu_backward, (numbers(2, 8), numbers(2, 8), numbers(2, 8))),
        (ops.cross_entropy_add_block, (tokens, tokens, tokens, z, labels, 0)),
        (ops.cross_entropy_gradient, (z, labels, tokens, tokens, tokens, 0)),
        (ops.float8_cast, (numbers(16, 32), torch.float8_e4m3fn, True, True)),
        (ops.float8_cast, (numbers(16, 32), torch.float8_e5m2, False, False)),
    ):
        torch.library.opcheck(operation.default, arguments)
