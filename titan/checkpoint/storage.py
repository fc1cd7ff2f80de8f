"""Tensors, sharded over any ranks, to a folder of safetensors files and one JSON index, and back under any other sharding.

PyTorch's distributed checkpoint (DCP) plans: every rank says which block of which tensor it holds, the coordinator drops the
copies and hands back who writes what; on load, each rank's blocks are intersected with the blocks on disk. This file is the
storage below those plans. DCP's own keeps its metadata in a pickle, which can run code when it is loaded; here is none:

    shard-00003.safetensors    what rank 3 wrote: one entry per block, named `<tensor>@<offset>,<offset>`
    index.json                 each tensor's dtype, shape and blocks: offsets, shape, file, entry; each file's size

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, begin and end of the bytes), the raw
little-endian bytes (https://github.com/huggingface/safetensors#format). Written by `blocks`, it takes the memory of one
block, where safetensors.torch.save_file holds all of a rank's blocks a second time as bytes.

What is loaded must be what was asked for: DCP casts another dtype silently, `load_tensors` refuses.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from titan.checkpoint.blocks import Kind, open_file, write_blocks
from titan.checkpoint.index import DTYPES, FORMAT, INDEX, NAMES, VERSION, Chunk, Index, read_index
from titan.checkpoint.manifest import CheckpointError, Written, write_json
from titan.layout import Block

T = TypeVar("T")


# The public pair


def save_tensors(
    state: Mapping[str, Tensor | Block], folder: Path, process_group: dist.ProcessGroup | None = None
) -> dict[str, Written]:
    """Write tensors, DTensors and blocks into an existing folder. Every rank of the group calls it; without one, one process.

    A plain tensor of one name is the same on all ranks and written once, as are a DTensor's replicas. A rank may lack names
    that others have. When this returns, on any rank, every file is on the disk. CheckpointError, on all ranks, where one fails.
    Returns, on the group's first rank, what all ranks' files hold.
    """
    writer = SafetensorsWriter(folder)
    with _explained(f"cannot save to {folder}"):
        save(
            state,
            storage_writer=writer,
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
            no_dist=_alone(),
        )
    return writer.files


def load_tensors(state: Mapping[str, Tensor | Block], folder: Path, process_group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors, DTensors and blocks in place, whatever sharding they were saved under; reads only what they need.

    Every rank of the group calls it; without one, the only process. CheckpointError, on all ranks and before any tensor is
    touched, where one asks for a name that is not there, another dtype or another shape; also, with tensors half filled, where
    a file cannot be read. Names that nobody asks for are left out: `tensor_names` has them.
    """
    with _explained(f"cannot load {folder}"):
        load(
            state,
            storage_reader=SafetensorsReader(folder),
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
            no_dist=_alone(),
        )


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """DCP's exception, which carries one exception per rank, as one CheckpointError that names the ranks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is no mistake
            yield
    except CheckpointException as failure:
        ranks: dict[str, list[str]] = {}
        for rank, (error, _) in sorted(failure.failures.items()):
            text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            ranks.setdefault(text, []).append(str(rank))
        said = "\n".join(f"  rank {', '.join(who)}: {text}" for text, who in ranks.items())
        raise CheckpointError(f"{failed}\n{said}") from failure


# Writing


def write_safetensors(path: Path, entries: Mapping[str, Kind], tensor: Callable[[str], Tensor]) -> Written:
    """Write a new safetensors file, fsynced, and return its size and checksum. `tensor(key)` is asked for one tensor at a time.

    CheckpointError where the file cannot be written or is there already, or a tensor is not what `entries` promised.
    """

    def blocks(key: str) -> Iterator[Tensor]:
        value = tensor(key)
        if (value.dtype, tuple(value.shape)) != entries[key]:
            raise CheckpointError(f"{path}: {key}: planned as {entries[key]}, is {(value.dtype, tuple(value.shape))}")
        yield value

    return write_blocks(path, entries, blocks)


class _Folder:
    """What DCP wants to know of a storage's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(checkpoint_id or self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class SafetensorsWriter(_Folder, StorageWriter):
    """DCP storage that writes one safetensors file a rank (none where a rank has nothing to write) and index.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: dict[str, Written] = {}
        """What all ranks' files hold, once they are written; on the coordinator alone."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder: it must be there, and shared by all ranks")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            name, data = item.index.fqn, item.tensor_data
            if data is None:
                raise CheckpointError(f"{name!r} is not a tensor: only tensors are saved here, other state goes to JSON")
            if data.properties.dtype not in NAMES:
                raise CheckpointError(f"{name!r} is {data.properties.dtype}, which is not one of {', '.join(DTYPES)}")
        # A rank without rows of a tensor plans an empty block: left out, so that no offset is claimed by it.
        return dataclasses.replace(plan, items=[item for item in plan.items if not _is_nothing(_data(item))])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"shard-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items, entries, results = {}, {}, []
        for item in plan.items:
            offsets, shape = tuple(_data(item).chunk.offsets), tuple(_data(item).chunk.sizes)
            key = f"{item.index.fqn}@{','.join(map(str, offsets))}"
            items[key], entries[key] = item, (_data(item).properties.dtype, shape)
            results.append(WriteResult(item.index, 0, Chunk(offsets, shape, plan.storage_data, key)))
        if not items:
            return _done([])

        def tensor(key: str) -> Tensor:
            value = planner.resolve_data(items[key])
            assert isinstance(value, Tensor)
            return value

        written = write_safetensors(self.folder / plan.storage_data, entries, tensor)
        return _done([dataclasses.replace(result, storage_data=(result.storage_data, written)) for result in results])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[dict[str, Any]]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            chunk, self.files[chunk.file] = result.storage_data
            chunks[result.index.fqn].append(vars(chunk))
        for file, written in self.files.items():
            path = self.folder / file
            if not path.is_file() or path.stat().st_size != written.bytes:
                raise CheckpointError(f"{path}: not the {written.bytes} bytes that a rank wrote; ranks must share this folder")
        for of_tensor in chunks.values():
            of_tensor.sort(key=itemgetter("offsets"))
        tensors = {
            name: {
                "dtype": NAMES[entry.properties.dtype],
                "shape": list(entry.size),
                "chunks": chunks[name],
            }
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        files = {file: {"bytes": written.bytes} for file, written in self.files.items()}
        index = {"format": FORMAT, "version": VERSION, "files": files, "tensors": tensors}
        write_json(self.folder / INDEX, index, indent=None)


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None  # prepare_local_plan refuses the rest
    return item.tensor_data


def _is_nothing(data: TensorWriteData) -> bool:
    return math.prod(data.chunk.sizes) == 0 < math.prod(data.size)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner, which drops all but one of the blocks with the same name and offset, after a check that they are alike."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        given = self.state_dict[index.fqn]
        return given.local if isinstance(given, Block) else super().lookup_object(index)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        first: dict[str, tuple[int, Any]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                here = (item.type.name, _data(item).properties.dtype, tuple(_data(item).size))
                there, other = first.setdefault(item.index.fqn, (rank, here))
                if here != other:
                    raise CheckpointError(f"{item.index.fqn!r} is {here} on rank {rank}, {other} on rank {there}")
        return super().create_global_plan(all_plans)


# Reading


class SafetensorsReader(_Folder, StorageReader):
    """DCP storage that reads, from the files of `SafetensorsWriter`, the slices that a plan asks for."""

    index: Index | CheckpointError

    def read_metadata(self, *args: Any) -> Metadata:
        try:
            self.index = read_index(self.folder)
        except CheckpointError as error:
            self.index = error  # DCP logs an error from here and goes on: set_up_storage_reader raises it
            return Metadata({})
        stored: dict[str, Any] = {}
        for name, entry in self.index.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(chunk.shape)) for at, chunk in entry.chunks.items()]
            stored[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
        return Metadata(stored, storage_data=str(self.folder))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.index, CheckpointError):
            raise self.index

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert isinstance(self.index, Index)
        by_file: dict[str, list[tuple[ReadItem, torch.dtype, Chunk]]] = {}
        for item in plan.items:
            entry = self.index.tensors[item.storage_index.fqn]
            chunk = entry.chunks[tuple(item.storage_index.offset or ())]
            by_file.setdefault(chunk.file, []).append((item, entry.dtype, chunk))
        for name, reads in by_file.items():
            path, size = self.folder / name, self.index.files[name]
            try:
                if path.stat().st_size != size:
                    raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {INDEX} says {size}; use another checkpoint")
                open_file(path)  # refuses what safetensors takes, such as a name that is there twice
                with safe_open(path, framework="pt") as file:
                    for item, dtype, chunk in reads:
                        part = file.get_slice(chunk.key)
                        found, listed = (part.get_dtype(), tuple(part.get_shape())), (NAMES[dtype], chunk.shape)
                        if found != listed:
                            raise CheckpointError(f"{path}: {chunk.key} is {found}, {INDEX} says {listed}; do not trust it")
                        begins = zip(item.storage_offsets, item.lengths, strict=True)
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(part[tuple(slice(begin, begin + length) for begin, length in begins)])
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from error
        return _done(None)


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, after a check that what is asked for is what is there."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """As it is given: DCP's own walks through nested state to fill tensors without memory, of which there are none."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        asked = self.state_dict[index.fqn]
        return asked.local if isinstance(asked, Block) else super().lookup_tensor(index)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        wrong = []
        for name, asked in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(asked, (Tensor, Block)):
                wrong.append(f"{name!r} is asked for as {type(asked).__name__}: only tensors are loaded from here")
            elif not isinstance(stored, TensorStorageMetadata):
                wrong.append(f"{name!r} is not there")
            elif (stored.properties.dtype, stored.size) != (asked.dtype, asked.shape):
                there, here = (stored.properties.dtype, tuple(stored.size)), (asked.dtype, tuple(asked.shape))
                wrong.append(f"{name!r} is {there} there, {here} here")
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(f"{self.metadata.storage_data} does not hold what is asked for: {'; '.join(wrong[:5])}{more}")
        return super().create_local_plan()
