"""Weights that travel as Float8 under FSDP: a rank casts its shard before the all-gather, which then carries half of bfloat16's
bytes and a quarter of float32's, and no rank casts what others hold.

All ranks need the same scale for a weight, that of the whole. Their shards' largest numbers are compared in one small message
for all weights, once a step before its first forward pass (and before a validation):

    amax = max over ranks of max |shard|        [number of weights] float32

What is gathered is uint8, since not every backend knows Float8. FSDP2 has a seam for this: a shard that has the two functions
`fsdp_pre_all_gather` and `fsdp_post_all_gather` says itself what is gathered, and what the module gets for a parameter. The
shard stays the float32 tensor that the optimizer and checkpoints know. The module gets a `Float8Weight`, which stands
for the weight where autograd is concerned, and holds the gathered bytes.

Source: the seam is described in PyTorch's torch/distributed/fsdp/_fully_shard/_fsdp_param.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.layout import local


class Float8Weight(Tensor):
    """A gathered weight: to autograd a tensor of `dtype`, to products `data8` (e4m3 [outputs, inputs]) and `unscale`
    (1 / scale, float32 []). Nothing else can be done with it."""

    data8: Tensor
    unscale: Tensor

    @staticmethod
    def __new__(cls, data8: Tensor, unscale: Tensor, dtype: torch.dtype) -> Float8Weight:
        options: dict[str, Any] = {"dtype": dtype, "device": data8.device, "strides": data8.stride()}
        self: Float8Weight = Tensor._make_wrapper_subclass(cls, data8.shape, **options)
        self.data8, self.unscale = data8, unscale
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Weight({list(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["data8", "unscale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Float8Weight:
        return Float8Weight(inner["data8"], inner["unscale"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return Float8Weight(args[0].data8, args[0].unscale, args[0].dtype)
        if function is aten.as_strided.default and list(args[1]) == list(args[0].shape):
            return Float8Weight(args[0].data8, args[0].unscale, args[0].dtype)
        raise NotImplementedError(f"{function} of a weight in Float8: only products take it")


class Float8Shards:
    """A rank's shards of the weights that travel as Float8, and their scales."""

    def __init__(self, weights: list[nn.Parameter], group: dist.ProcessGroup, scale_for: Callable[[Tensor], Tensor]) -> None:
        """weights: sharded by FSDP2 over `group`, with memory. scale_for: largest numbers -> scales, float32 [weights]."""
        self.shards = [local(weight).detach() for weight in weights]
        self.group, self.scale_for = group, scale_for
        # Each 16 bytes from the next, as GPU libraries like what they are handed.
        self.scales, self.unscales = torch.ones(2, len(weights), 4, device=self.shards[0].device)[..., 0]
        for number, weight in enumerate(weights):
            self._teach(weight, number)

    def refresh(self) -> None:
        """The scales become those of the weights as they are now."""
        filled = [i for i, shard in enumerate(self.shards) if shard.numel()]
        largest = [self.scales.new_zeros(())] * len(self.shards)
        norms = torch._foreach_norm([self.shards[i] for i in filled], float("inf")) if filled else []
        for i, found in zip(filled, norms, strict=True):
            largest[i] = found
        whole = torch.stack(largest)
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=self.group)
        self.scales.copy_(self.scale_for(whole))
        self.unscales.copy_(self.scales.reciprocal())

    def _teach(self, weight: nn.Parameter, number: int) -> None:
        """Give a shard the functions that FSDP2 asks for."""
        shard: Any = weight._local_tensor  # type: ignore[attr-defined]  # the very tensor that FSDP asks
        scale, unscale = self.scales[number], self.unscales[number]
        rows = -(-weight.shape[0] // self.group.size())

        def before(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[tuple[Tensor, ...], None]:
            data = (shard.detach() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
            return (F.pad(data, (0, 0, 0, rows - data.shape[0])),), None  # FSDP gathers as many rows from all ranks

        def after(gathered: tuple[Tensor, ...], _: None, dtype: torch.dtype, out: Tensor | None = None) -> Any:
            if out is not None:
                return None  # FSDP has filled the same memory again, and the scale is a view
            data = gathered[0][: weight.shape[0]].view(torch.float8_e4m3fn)
            return Float8Weight(data, unscale, dtype), ()

        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = before, after
