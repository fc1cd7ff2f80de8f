"""Float8 products: scales, rounding, what a GPU would refuse, and PyTorch's own library as the measure."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan import zoo
from titan.config import Precision
from titan.kernels.float8_cast import Scaled, rounded, scale_for, scaled
from titan.linear import compute_by
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.precision.float8 import E4M3, E5M2, RECIPES, product, swap
from titan.precision.float8_layers import float8_layers
from titan.precision.float8_weight import Float8Weight

SHAPES = [(1, 16, 16), (7, 48, 32), (16, 16, 112), (48, 80, 16), (0, 32, 16)]
"""Tokens, inputs, outputs. Tokens of a backward pass are in sixteens."""


def numbers(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    """Normals whose rows and columns differ in size, as activations do."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=source)
    for dim in range(len(shape)):
        x = x * torch.exp2(spread * torch.randn([n if d == dim else 1 for d, n in enumerate(shape)], generator=source))
    return x


@pytest.mark.parametrize("name", zoo.names())
def test_a_table_names_all_linear_layers_of_the_blocks_with_their_widths(name: str) -> None:
    config = replace(zoo.config_class(name)(), n_layers=2, ffn_dim=208)
    with torch.device("meta"):
        model = zoo.make(name, config)
    linears = {path: tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears.pop("head", None)
    assert float8_layers(zoo.sharding(name, config), Precision(float8="rowwise")) == linears


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("seed", range(5))
def test_a_scale_is_the_largest_power_of_two_that_fits(dtype: torch.dtype, seed: int) -> None:
    draw = random.Random(seed)
    largest = torch.finfo(dtype).max
    sizes = [draw.uniform(1, 2) * 2.0 ** draw.randint(-90, 90) for _ in range(200)]
    amax = torch.tensor([*sizes, largest, largest * 2.0**-20, 1.0])
    scale = scale_for(amax, dtype)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (amax * scale <= largest).all()
    assert (amax * scale * 2 > largest).all()
    assert (rounded(amax, scale, dtype).float() > largest / 2 * 0.99).all(), "what just fits is not cut off"


def test_nothing_and_what_is_no_number() -> None:
    assert torch.equal(scaled(torch.zeros(4, 16), E4M3, True).data.float(), torch.zeros(4, 16))
    assert scaled(torch.zeros(4, 16), E5M2, False).unscale.isfinite()
    assert scaled(torch.full((4, 16), 1e-44), E4M3, False).data.float().eq(0).all()
    for recipe in RECIPES.values():
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.randn(16, 32)
            x[3, 5] = bad
            y = recipe().output(x, torch.randn(16, 32))
            assert not y[3].isfinite().any(), "the row with the bad number shows it"


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_numbers(
    tokens: int, inputs: int, outputs: int, by_row: bool, dtype: torch.dtype
) -> None:
    if not tokens and not by_row:
        pytest.skip("of no numbers there is no largest one")
    a = scaled(numbers(tokens, inputs, seed=tokens), E4M3, by_row)
    b = scaled(numbers(inputs, outputs, seed=outputs).t(), E4M3, by_row)  # not row after row in memory
    exact = (a.data.double() * a.unscale) @ (b.data.double() * b.unscale).t()
    bound = (a.data.double() * a.unscale).abs() @ (b.data.double() * b.unscale).abs().t()
    error = (product(a, b, dtype).double() - exact).abs()
    assert (error <= bound * inputs * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_as_exact_as_the_formats(recipe: str, seed: int) -> None:
    """Each product is off by at most the two relative roundings, 2^-4 of e4m3 and 2^-3 of e5m2, of the sum of its terms' sizes;
    and by what is too small for the format where a scale serves larger numbers, too."""
    x, w, dy = numbers(2, 24, 32, seed=seed), numbers(48, 32, seed=seed + 50), numbers(2, 24, 48, seed=seed + 90)
    module = nn.Linear(32, 48)
    module.weight.data, module.bias.data = w.clone(), numbers(48, seed=seed, spread=0)
    compute_by(module, RECIPES[recipe]())
    x.requires_grad_()
    y = module(x)
    y.backward(dy)
    assert module.bias.grad is not None
    torch.testing.assert_close(module.bias.grad, dy.sum((0, 1)))
    gradient = 2.0**-3 if recipe == "tensorwise" else 2.0**-4
    rows, d_rows = x.detach().flatten(0, 1).double(), dy.flatten(0, 1).double()

    def too_small(a: Tensor, b: Tensor, format_a: torch.dtype, format_b: torch.dtype) -> Tensor:
        """Half of the smallest number of each format, scaled back, times the other side."""
        least = []
        for t, dtype in ((a, format_a), (b, format_b)):
            amax = t.abs().amax(1, keepdim=True) if recipe == "rowwise" else t.abs().amax()
            step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
            least.append((step / scale_for(amax, dtype).double()).expand(len(t), 1))
        return least[0] * b.abs().sum(1) + a.abs().sum(1, keepdim=True) * least[1].t()

    grads = E5M2 if recipe == "tensorwise" else E4M3
    for got, a, b, formats, off in (
        (y.detach().flatten(0, 1) - module.bias.detach(), rows, w.double(), (E4M3, E4M3), 2.0**-4),
        (x.grad, d_rows, w.t().double(), (grads, E4M3), gradient),
        (module.weight.grad, d_rows.t(), rows.t(), (grads, E4M3), gradient),
    ):
        assert got is not None
        error = (got.flatten(0, -2).double() - a @ b.t()).abs()
        bound = (a.abs() @ b.abs().t()) * (off + 2.0**-4 + off * 2.0**-4) + 1.1 * too_small(a, b, *formats)
        assert (error <= bound + 1e-6 * bound.max()).all()
        assert error.norm() / (a @ b.t()).norm() > 1e-3, "this is not Float8"


@pytest.mark.parametrize("recipe", RECIPES)
def test_how_a_batch_is_cut_changes_nothing(recipe: str) -> None:
    """Scales of parts and of the whole differ, and yet a number is rounded alike."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=source) * torch.arange(1, 65)[:, None]
    x = x.sign() * x.abs().clamp(min=0.05)  # nothing 2^14 times smaller than the largest
    w = torch.randn(48, 32, generator=source)
    w = w.sign() * w.abs().clamp(min=0.01)
    products = RECIPES[recipe]()
    whole = products.output(x, w)
    assert torch.equal(whole, torch.cat([products.output(part, w) for part in x.chunk(4)]))
    assert torch.equal(whole, torch.cat([products.output(x, part) for part in w.chunk(3)], dim=1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_made_ready_once_gives_what_the_weight_gives(recipe: str) -> None:
    x, w, dy, products = torch.randn(3, 16, 32), torch.randn(48, 32), torch.randn(3, 16, 48), RECIPES[recipe]()
    assert torch.equal(products.output(x, products.operand(w, False)), products.output(x, w))
    assert torch.equal(products.d_input(dy, products.operand(w, True)), products.d_input(dy, w))


def test_what_a_gpu_refuses_is_refused_here() -> None:
    def of(rows: int, columns: int, dtype: torch.dtype = E4M3) -> Scaled:
        return scaled(torch.randn(rows, columns), dtype, False)

    product(of(3, 32), of(16, 32), torch.float32)
    product(of(3, 32, E5M2), of(16, 32), torch.float32)
    with pytest.raises(ValueError, match=r"multiples of 16: \[3, 24\] x \[16, 24\]"):
        product(of(3, 24), of(16, 24), torch.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        product(of(16, 32), of(24, 32), torch.float32)
    with pytest.raises(ValueError, match="one side only"):
        product(of(16, 32, E5M2), of(16, 32, E5M2), torch.float32)
    turned = of(32, 32)
    with pytest.raises(ValueError, match="row after row"):
        product(Scaled(turned.data.t(), turned.unscale), of(16, 32), torch.float32)


def test_a_gathered_weight_is_for_products_alone() -> None:
    w = scaled(torch.randn(16, 32), E4M3, False)
    weight = Float8Weight(w.data, w.unscale, torch.bfloat16)
    assert (weight.shape, weight.dtype) == ((16, 32), torch.bfloat16)
    parameter = nn.Parameter(weight)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    tensorwise = RECIPES["tensorwise"]()
    assert torch.equal(tensorwise.output(x, parameter), tensorwise.output(x, w.data.float() * w.unscale))
    with pytest.raises(NotImplementedError, match="only products take it"):
        weight + 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scales", ["powers of two", "its own"])
def test_losses_are_those_of_torchao(recipe: str, scales: str) -> None:
    """A small Llama, 20 steps of AdamW in bfloat16 compute: to the bit where scales are alike. torchao's tensorwise
    default, largest / amax, rounds other numbers up or down: as close to it as Float8 is to bfloat16."""
    torchao = pytest.importorskip("torchao.float8")
    config = Config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=64)
    asked = torchao.Float8LinearConfig.from_recipe_name(recipe)
    if scales == "powers of two":
        asked = replace(asked, round_scales_to_power_of_2=True)

    def losses(convert: Any) -> list[float]:
        torch.manual_seed(3)
        model = Transformer(config)
        model.init_weights()
        model.to(torch.bfloat16)
        convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(20):
            tokens = torch.randint(0, 8, (4, 33)).cumsum(1) % 64
            loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / (4 * 32)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def ours(model: nn.Module) -> None:
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"]
        swap(model, layers, recipe)

    def theirs(model: nn.Module) -> None:
        torchao.convert_to_float8_training(model, config=asked, module_filter_fn=lambda _, name: name != "head")

    got, expected, plain = losses(ours), losses(theirs), losses(lambda model: None)
    assert got[-1] < got[0] - 0.3
    if asked.round_scales_to_power_of_2:
        assert got == expected
    assert got == pytest.approx(expected, rel=1e-3)
    assert got != plain
