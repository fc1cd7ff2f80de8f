"""Float8 products on a GPU are those on a CPU, where the rest of the tests holds them."""

from __future__ import annotations

import pytest
import torch

from titan.kernels.float8_cast import Scaled, scaled
from titan.precision.float8 import E4M3, E5M2, RECIPES, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with Float8 products"
    ),
]


@pytest.mark.parametrize("tokens", [1, 7, 48])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_products(tokens: int, by_row: bool, dtype: torch.dtype, kind: torch.dtype) -> None:
    if by_row and kind == E5M2:
        pytest.skip("rows are e4m3 on both sides")
    torch.manual_seed(tokens)
    a, b = scaled(torch.randn(tokens, 64), kind, by_row), scaled(torch.randn(48, 64), E4M3, by_row)
    odd = torch.ones(5, device="cuda")  # a scale that lies anywhere in a larger tensor
    odd[1] = a.unscale.flatten()[0]
    here = [Scaled(t.data.cuda(), t.unscale.cuda()) for t in (a, b)]
    if not by_row:
        here[0] = Scaled(here[0].data, odd[1])
    exact = product(a, b, torch.float32)
    for fast in (False, True):
        got = product(here[0], here[1], dtype, fast).float().cpu()
        # Fast accumulation keeps some 14 bits; bfloat16 rounds the result.
        assert (got - exact).norm() <= (2**-8 if dtype == torch.bfloat16 else 2**-10 if fast else 2**-12) * exact.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_is_a_cpu_s_to_the_bit(recipe: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96, dtype=torch.bfloat16) * 100
    for kind in (E4M3, E5M2):
        on_cpu, on_gpu = (scaled(t, kind, recipe == "rowwise") for t in (x, x.cuda()))
        assert torch.equal(on_cpu.data.view(torch.uint8), on_gpu.data.view(torch.uint8).cpu())
        assert torch.equal(on_cpu.unscale, on_gpu.unscale.cpu())
