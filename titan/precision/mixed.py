"""Mixed precision without FSDP: float32 master weights, computed in a narrower format.

The same meaning as FSDP2's policy, for a model that is not sharded. A unit (a block, say) casts its weights as its forward
begins and takes the masters back as it ends (but for weights whose products want the master, as Float8's do):

    forward     w = master.to(bfloat16)      the module sees w in the master's place
    backward    master.grad += w.grad.to(float32)

The cast is an ordinary autograd operation, so gradients arrive at the masters in float32 and accumulate there. Unlike
autocast, activations, norms and additions are in the narrow format as well, as under FSDP; what needs float32 (rotary
angles, softmax statistics, the loss) asks for it in the model. The cast is in the unit's `forward` and not in hooks around it,
so that what is computed again in the backward pass is cast again.

Source: Micikevicius et al., "Mixed precision training" (arXiv:1710.03740).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from titan.linear import products_of


def compute_in(units: list[nn.Module], dtype: torch.dtype) -> None:
    """Have each unit compute in `dtype`. A unit owns its parameters except those of the units inside it."""
    for unit in units:
        others = {id(p) for other in units if other is not unit and other in set(unit.modules()) for p in other.parameters()}
        owned = [
            (module, name)
            for module in unit.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in others and not (name == "weight" and _wants_master(module))
        ]
        _cast_in_forward(unit, owned, dtype)


def _wants_master(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and products_of(module).takes_master


def _cast_in_forward(unit: nn.Module, owned: list[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
    original = unit.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _narrow(owned, dtype):
            return original(*args, **kwargs)

    unit.forward = forward


@contextmanager
def _narrow(owned: list[tuple[nn.Module, str]], dtype: torch.dtype) -> Iterator[None]:
    """The parameters in `dtype` for a while; the masters come back also after an error."""
    masters = [module._parameters[name] for module, name in owned]
    try:
        for (module, name), master in zip(owned, masters, strict=True):
            module._parameters[name] = master.to(dtype)  # type: ignore[union-attr, assignment]
        yield
    finally:
        for (module, name), master in zip(owned, masters, strict=True):
            module._parameters[name] = master
