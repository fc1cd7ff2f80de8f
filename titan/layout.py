"""Where a rank's tensors lie in the whole model: what initial weights, checkpoints and norms need to know.

Tensor parallelism cuts a parameter once, in one dimension: the rank then holds an ordinary, smaller tensor, and a Cut says
which part of the whole it is. FSDP cuts what is left by rows, as DTensors. Together a rank holds one rectangular block,
and `Block` says where that begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Cut:
    """Of a parameter's dimension `dim`, with `size` elements in all, a tensor-parallel rank holds those from `begin` on."""

    dim: int
    begin: int
    size: int


Cuts = Mapping[str, Cut]
"""Parameter name -> its cut. A parameter that is not there is whole on every tensor-parallel rank."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this rank's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Block:
    """This rank's part of a tensor, which DCP saves and loads like a DTensor: `local` begins at `offset` in `shape`."""

    local: Tensor
    shape: torch.Size
    offset: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.local.shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(self._chunk, TensorProperties.create_from_tensor(self.local), self.shape)
        return [WriteItem(MetadataIndex(name, torch.Size(self.offset)), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk]


def block(tensor: Tensor, cut: Cut | None) -> Block:
    """The block of the whole that this rank's parameter, gradient or optimizer state is. A scalar is whole."""
    shape, offset = list(tensor.shape), [0] * tensor.dim()
    if isinstance(tensor, DTensor):
        size, found = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        assert tuple(size) == tuple(tensor.to_local().shape), "this rank's part is not one block of the tensor"
        offset = list(found)
    if cut is not None and tensor.dim():
        shape[cut.dim] = cut.size
        offset[cut.dim] += cut.begin
    return Block(local(tensor), torch.Size(shape), tuple(offset))
