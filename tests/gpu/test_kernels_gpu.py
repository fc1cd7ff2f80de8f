"""The Triton kernels on a GPU are their plain lines on a CPU, which the unit tests hold against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from titan.kernels.linear_cross_entropy import linear_cross_entropy
from titan.kernels.rms_norm import add_rms_norm, rms_norm
from titan.kernels.rope import rope
from titan.kernels.swiglu import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DTYPES = [torch.float32, torch.bfloat16]


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
        off = (a.cpu().float() - b.float()).abs()
        assert off.norm() <= bound * b.float().norm()
        assert (off <= 4 * bound * (b.float().abs() + b.float().square().mean().sqrt())).all(), "each element"


def on_both(function: Any, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients on the GPU, and on the CPU."""
    both = []
    for device in ("cuda", "cpu"):
        here = [t.to(device).detach().requires_grad_(t.is_floating_point()) for t in inputs]
        out = function(*here)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(7)
        along = [torch.randn(o.shape).to(o.dtype).to(device) for o in out]
        leaves = [t for t in here if t.requires_grad]
        both.append([*out, *torch.autograd.grad(out, leaves, along, allow_unused=False)])
    return both[0], both[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 301, 128), (3, 7, 4096), (1, 5, 16384), (2, 600, 1031)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, branch, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(*on_both(lambda x, w: rms_norm(x, w, 1e-5), x, weight), dtype)
    close(*on_both(lambda x, b, w: add_rms_norm(x, b, w, 1e-5), x, branch, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 301, 3, 64), (1, 17, 32, 128)], ids=str)
def test_rope(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angle = torch.randn(shape[1], 1, shape[-1] // 2)
    cos, sin = angle.cos(), angle.sin()
    close(*on_both(lambda x: rope(x, cos.to(x.device), sin.to(x.device)), torch.randn(shape).to(dtype)), dtype)
    of_each = torch.randn(shape[0], *angle.shape)
    turned = torch.randn(shape).to(dtype).transpose(1, 2)  # [batch, heads, seq, head_dim] in memory
    close(*on_both(lambda x: rope(x.transpose(1, 2), of_each.cos().to(x.device), of_each.sin().to(x.device)), turned), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1031), (2, 77, 14336)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    close(*on_both(swiglu, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("most", [0, 300 * 256])
def test_the_loss(most: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, weight = torch.randn(300, 64).to(dtype), torch.randn(1009, 64).to(dtype)
    labels = torch.randint(0, 1009, (300,))
    labels[::7] = -100

    def loss(h: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight, labels.to(h.device), z_loss=1e-3, most=most, fused=True)

    close(*on_both(loss, h, weight), dtype)


@pytest.mark.skipif(not FLOAT8, reason="no GPU with Float8")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (301, 1031), (4096, 512)], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_casts_to_float8_are_equal_to_the_bit(shape: tuple[int, int], by_row: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("Ada casts float32 by way of float16, and cuts bits off on the way")
    torch.manual_seed(0)
    x = (torch.randn(shape).exp() * torch.randn(shape)).to(dtype)
    for operand in (x, x.t().contiguous().t()):
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
            found = torch.ops.titan.float8_cast(operand.cuda(), kind, by_row, True)
            wanted = torch.ops.titan.float8_cast(operand, kind, by_row, True)
            for a, b in zip(found, wanted, strict=True):
                assert a.shape == b.shape
                assert torch.equal(a.cpu().float(), b.float())


@pytest.mark.skipif(not FLOAT8, reason="no GPU with Float8")
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_broken_number_stays_broken(by_row: bool, broken: float) -> None:
    x = torch.ones(16, 32)
    x[3, 4] = broken
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        data, unscale, turned, turned_unscale = torch.ops.titan.float8_cast(x.cuda(), kind, by_row, True)
        assert (data.float() * unscale)[3, 4].isnan()
        assert (turned.float() * turned_unscale)[4, 3].isnan()


def test_a_float32_weight_of_narrow_activations() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 96).to(torch.bfloat16), torch.randn(96)
    for a, b in zip(*on_both(lambda x, w: rms_norm(x, w, 1e-5), x, weight), strict=True):
        close([a], [b], torch.bfloat16)


def test_beyond_two_thousand_million_numbers() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("takes 26 GiB")
    gate = torch.ones(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    assert swiglu(gate, gate)[-1].item() == pytest.approx(0.731, rel=0.01)
    del gate
    rows = torch.ones(2**19 + 1, 4096, dtype=torch.bfloat16, device="cuda")
    assert rms_norm(rows, rows[0], 1e-5)[-1, -1].item() == 1
    x = torch.ones(1, 16, 2**20, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    cos = torch.ones(2**20, 1, 64, device="cuda")
    assert rope(x, cos, torch.zeros_like(cos))[0, -1, -1, -1].item() == 1


def test_a_compiler_takes_them_as_they_are() -> None:
    torch.manual_seed(0)

    def block(x: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        h, y = add_rms_norm(x, branch, weight, 1e-5)
        return h * 2 + swiglu(y, x)

    inputs = [torch.randn(2, 33, 256), torch.randn(2, 33, 256), torch.randn(256)]
    plain, compiled = (on_both(f, *inputs)[0] for f in (block, torch.compile(block, fullgraph=True)))
    close(compiled, [t.cpu() for t in plain], torch.float32)
