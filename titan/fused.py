"""Kernels in the place of a model's parts: norms, rotations, activations (`[kernels]`).

The model's table says which of its modules a kernel can stand in for. A module that has a weight keeps it, and its place and
name: only what it computes is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from titan.config import Kernels
from titan.sharding import Sharding, key_of, of_each_block


def use_kernels(part: nn.Module, table: Sharding, config: Kernels) -> None:
    """Replace what the named modules of a model, or of a part of its layers, compute, in place."""
    modules = dict(part.named_modules())
    for name, kernel in of_each_block(table, table.kernels).items():
        if name in modules and key_of(kernel) in config.in_triton:
            modules[name].forward = _STAND_INS[kernel](modules[name])  # type: ignore[method-assign]


def refuse_without_triton(config: Kernels, device: torch.device) -> None:
    """ValueError where a GPU's kernels are asked for and Triton is not installed."""
    if config.in_triton and device.type == "cuda" and find_spec("triton") is None:
        said = "Triton is not installed; run `pip install triton`, the version that this PyTorch goes with"
        raise ValueError(f'kernels.{config.in_triton[0]} = "triton": {said}, or write "torch"')


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    from titan.kernels.rms_norm import rms_norm

    return lambda x: rms_norm(x, module.weight, module.eps)  # type: ignore[arg-type]


def _add_norm(module: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from titan.kernels.rms_norm import add_rms_norm

    return lambda x, branch: add_rms_norm(x, branch, module.weight, module.eps)  # type: ignore[arg-type]


def _rope(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from titan.kernels.rope import rope

    return rope


def _swiglu(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    from titan.kernels.swiglu import swiglu

    return swiglu


_STAND_INS: dict[str, Callable[[nn.Module], Callable[..., object]]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rope": _rope,
    "swiglu": _swiglu,
}
