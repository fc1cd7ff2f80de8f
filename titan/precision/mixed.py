"""Mixed precision without FSDP: float32 master weights, computed in a narrower format.

The same meaning as FSDP2's policy, for a model that is not sharded. A unit (a block, say) casts its weights on entry and
takes the masters back on exit:

    forward     w = master.to(bfloat16)      the module sees w in the master's place
    backward    master.grad += w.grad.to(float32)

The cast is an ordinary autograd operation, so gradients arrive at the masters in float32 and accumulate there. Unlike
autocast, activations, norms and additions are in the narrow format as well, as under FSDP; what needs float32 (rotary
angles, softmax statistics, the loss) asks for it in the model.

Source: Micikevicius et al., "Mixed precision training" (arXiv:1710.03740).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compute_in(units: list[nn.Module], dtype: torch.dtype) -> None:
    """Have each unit compute in `dtype`. A unit owns its parameters except those of the units inside it."""
    for unit in units:
        others = {id(p) for other in units if other is not unit and other in set(unit.modules()) for p in other.parameters()}
        owned = [
            (module, name, parameter)
            for module in unit.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in others
        ]
        _Cast(owned, dtype).attach(unit)


class _Cast:
    def __init__(self, owned: list[tuple[nn.Module, str, nn.Parameter]], dtype: torch.dtype) -> None:
        self.owned = owned
        self.dtype = dtype

    def attach(self, unit: nn.Module) -> None:
        unit.register_forward_pre_hook(self.enter)
        unit.register_forward_hook(self.leave, always_call=True)  # also after an error, or the masters would be lost

    def enter(self, *_: Any) -> None:
        self.owned = [(module, name, module._parameters[name]) for module, name, _ in self.owned]  # type: ignore[misc]
        for module, name, master in self.owned:
            module._parameters[name] = master.to(self.dtype)  # type: ignore[assignment]

    def leave(self, *_: Any) -> None:
        for module, name, master in self.owned:
            module._parameters[name] = master
