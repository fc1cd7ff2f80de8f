"""Float8: matrix products of numbers with 8 bits, which are twice as fast as in bfloat16 on GPUs since 2022.

A product a b^T of tokens and weights is rounded a little when each number is, and the rest of the model (norms, softmax, sums,
the loss, the master weights) stays as it is. There are two formats:

    e4m3    4 exponent bits, 3 of significand (+ 1 implied)    2^-6 .. 448, off by 1/16 at most; less exact down to 2^-9
    e5m2    5 exponent bits, 2 of significand                  2^-14 .. 57,344, off by 1/8 at most; down to 2^-16

So little range needs a scale: a tensor is multiplied so that its largest number just fits, and the product is divided by both
operands' scales. Scales are taken from the numbers at hand (dynamic), not from those of earlier steps, and are powers of two:

    s = 2^floor(log2(largest / amax))          q(a) = round(a s)          a b^T ~ q(a) q(b)^T / (s_a s_b)

Multiplying by a power of two rounds nothing. So how a number is rounded depends on itself alone, unless it is ten thousand
times smaller than the largest: how a batch or a matrix is cut over ranks leaves the result as it is, which a scale of
largest / amax would not. Two recipes:

    tensorwise    one scale a tensor. Activations and weights in e4m3; gradients, which have a wider range, in e5m2
    rowwise       one scale for each row of an operand, along which the product sums; e4m3 everywhere. A little slower, and
                  large numbers in some rows (outliers) cost the others nothing

The three products of a layer (`titan.linear`) are each written as a b^T, both operands with the summed dimension last. That is
the one layout that all GPUs take, and rows are what that dimension's scales belong to:

    Y  = X W^T        X   [tokens, inputs]     W   [outputs, inputs]
    dX = dY W         dY  [tokens, outputs]    W^T [inputs, outputs]
    dW = dY^T X       dY^T [outputs, tokens]   X^T [inputs, tokens]

A GPU wants the summed dimension and b's rows to be multiples of 16, and not e5m2 on both sides; the same is asked for on a CPU,
which would not mind. Only products in the forward pass are added up in a GPU's faster, less exact way.

Sources: Micikevicius et al., "FP8 formats for deep learning" (arXiv:2209.05433); Perez et al., "Training and inference of large
language models using 8-bit floating point" (arXiv:2309.17224).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan.kernels.float8_cast import Scaled, cast, cast_both, scale_for, scaled
from titan.linear import Products, compute_by, products_of
from titan.precision.float8_layers import UNIT
from titan.precision.float8_weight import Float8Shards, Float8Weight

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def product(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a b^T: [m, k], [n, k] -> [m, n] in bfloat16 or float32, divided by the scales. fast: a GPU may add up less exactly.

    Raises ValueError for what a GPU would not take.
    """
    if a.data.shape[1] % UNIT or b.data.shape[0] % UNIT:
        shapes = f"{list(a.data.shape)} x {list(b.data.shape)}^T"
        raise ValueError(f"Float8 products need columns, and rows of the second operand, in multiples of {UNIT}: {shapes}")
    if a.data.dtype == b.data.dtype == E5M2:
        raise ValueError("Float8 products take e5m2 on one side only")
    if not (a.data.is_contiguous() and b.data.is_contiguous()):
        raise ValueError("Float8 products need both operands row after row in memory")
    scales = a.unscale, b.unscale.t() if b.unscale.dim() else b.unscale
    if a.unscale.dim() == 0 or (a.data.is_cuda and dtype == torch.bfloat16):
        return torch._scaled_mm(a.data, b.data.t(), scales[0], scales[1], out_dtype=dtype, use_fast_accum=fast)
    one = torch.ones((), device=a.data.device)  # a GPU divides by scales of rows in bfloat16 alone, an older PyTorch on no CPU
    y = torch._scaled_mm(a.data, b.data.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)
    return (y * scales[0] * scales[1]).to(dtype)


@torch.library.custom_op("titan::float8_d_input", mutates_args=())
def _d_input(dy8: Tensor, dy_unscale: Tensor, data8: Tensor, unscale: Tensor, dtype: torch.dtype) -> Tensor:
    """dY W. One operation for a compiler, which would otherwise turn W in the forward pass and keep the copy for this, while
    FSDP frees W."""
    return product(Scaled(dy8, dy_unscale), Scaled(data8.t().contiguous(), unscale), dtype)


@_d_input.register_fake
def _(dy8: Tensor, dy_unscale: Tensor, data8: Tensor, unscale: Tensor, dtype: torch.dtype) -> Tensor:
    return dy8.new_empty(dy8.shape[0], data8.shape[1], dtype=dtype)


class Float8(Products):
    """What both recipes have in common."""

    gradients = E4M3
    """The format of gradients."""
    by_row = True
    """Whether a row has a scale of its own, or the tensor one."""

    def __init__(self, kernel: bool = False) -> None:
        """kernel: cast by the kernel, not by operations of PyTorch."""
        self.kernel = kernel

    def scaled(self, x: Tensor, dtype: torch.dtype) -> Scaled:
        """[rows, summed] in any order in memory -> the operand."""
        return (cast if self.kernel else scaled)(x, dtype, self.by_row)

    def output(self, x: Tensor, weight: Tensor | Scaled, bias: Tensor | None = None) -> Tensor:
        w = weight if isinstance(weight, Scaled) else self.operand(weight, False)
        y = product(self.scaled(x.flatten(0, -2), E4M3), w, x.dtype, fast=True)
        return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])

    def d_input(self, dy: Tensor, weight: Tensor | Scaled) -> Tensor:
        dx = self.d_input8(self.scaled(dy.flatten(0, -2), self.gradients), weight, dy.dtype)
        return dx.unflatten(0, dy.shape[:-1])

    def d_weight(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.d_weight8(self.scaled(dy.flatten(0, -2).t(), self.gradients), x)

    def d_both(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not self.kernel:
            return super().d_both(dy, x, weight)
        dy8, turned = cast_both(dy.flatten(0, -2), self.gradients, self.by_row)
        return self.d_input8(dy8, weight, dy.dtype).unflatten(0, dy.shape[:-1]), self.d_weight8(turned, x)

    def d_input8(self, dy8: Scaled, weight: Tensor | Scaled, dtype: torch.dtype) -> Tensor:
        """dX of dY [tokens, outputs]."""
        return product(dy8, weight if isinstance(weight, Scaled) else self.operand(weight, True), dtype)

    def d_weight8(self, turned: Scaled, x: Tensor) -> Tensor:
        """dW of dY^T [outputs, tokens]."""
        return product(turned, self.scaled(x.flatten(0, -2).t(), E4M3), x.dtype)


class Rowwise(Float8):
    """A scale for each row along which a product sums; e4m3 everywhere."""

    def operand(self, weight: Tensor, turned: bool) -> Scaled:
        return self.scaled(weight.t() if turned else weight, E4M3)


class Tensorwise(Float8):
    """One scale a tensor; gradients in e5m2. Weights may come as Float8 already (`Float8Weight`)."""

    takes_master = True
    gradients = E5M2
    by_row = False

    def operand(self, weight: Tensor, turned: bool) -> Scaled:
        gathered = isinstance(weight, Float8Weight)
        w = Scaled(weight.data8, weight.unscale) if gathered else self.scaled(weight, E4M3)  # type: ignore[attr-defined]
        return Scaled(w.data.t().contiguous(), w.unscale) if turned else w

    def d_input8(self, dy8: Scaled, weight: Tensor | Scaled, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Scaled):
            return super().d_input8(dy8, weight, dtype)
        w = self.operand(weight, False)
        return _d_input(dy8.data, dy8.unscale, w.data, w.unscale, dtype)


RECIPES: dict[str, type[Float8]] = {"tensorwise": Tensorwise, "rowwise": Rowwise}


def swap(model: nn.Module, names: list[str], recipe: str, kernel: bool = False) -> None:
    """Have the named linear layers of a model, or of a part of it, compute their products in Float8, in place.

    recipe: tensorwise or rowwise. kernel: whether to cast by the kernel. Names that this part does not have are left to the
    part that does.
    """
    modules, products = dict(model.named_modules()), RECIPES[recipe](kernel)
    for name in names:
        if name in modules:
            module = modules[name]
            assert isinstance(module, nn.Linear), f"{name} is no linear layer"
            compute_by(module, products)


def float8_shards(model: nn.Module, group: dist.ProcessGroup) -> Float8Shards | None:
    """What has the weights of a model's Float8 layers, sharded over a group and with memory, travel as Float8.

    None where this rank holds no such layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and isinstance(products_of(m), Tensorwise)]
    weights = [layer.get_parameter("weight") for layer in layers]
    return Float8Shards(weights, group, partial(scale_for, dtype=E4M3)) if layers else None
