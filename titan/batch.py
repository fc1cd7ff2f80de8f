"""From a rank's part of a batch to what the model is called with: micro batches, this rank's part of each sequence, positions.

Everything that depends on the values (where documents begin) is worked out here, on the host, before anything goes to the
device: the model never has to wait to know what attends to what.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan.config import Config, Training, accumulation
from titan.data.loader import loader
from titan.documents import Documents
from titan.parallel.context import cut, offsets
from titan.parallel.mesh import Mesh

Batch = dict[str, Tensor]


def reader(config: Config, mesh: Mesh) -> Callable[..., Generator[Batch]]:
    """The loader of this rank's parts of a run's batches; left to say: which samples, from which on, how many workers."""
    size = config.training.global_batch_size
    return partial(loader, global_batch_size=size, dp_rank=mesh.data_rank, dp_degree=mesh.data_degree)


@dataclass(frozen=True)
class Micro:
    """A micro batch on the device. seq: this rank's part of the sequence, shorter than seq_len under context parallelism."""

    tokens: Tensor
    """int64 [micro batch, seq]"""
    labels: Tensor
    """int64 [micro batch, seq], -100 where nothing is to be predicted"""
    positions: Tensor
    """int64 [seq], or [micro batch, seq] where they start again in each document"""
    documents: Documents | None
    """Where documents lie, over the whole sequence."""
    rows: Tensor
    """int64 [micro batch]: which samples of the global batch"""
    offsets: Tensor
    """int64 [seq]: which tokens of the whole sequence"""


class Batches:
    """Cuts a rank's batches. Ranks that differ in pp, tp or cp only are given the same batch."""

    def __init__(self, training: Training, device: torch.device, mesh: Mesh) -> None:
        self.micro_batch_size = training.micro_batch_size
        self.per_step = accumulation(training, mesh.data_degree)
        """Micro batches in a step."""
        self.device = device
        self.streams = torch.get_device_module(device)
        self.copies = self.streams.Stream()
        self.context = (mesh.coordinate("cp"), mesh.degree("cp"))
        self.data_rank = mesh.data_rank
        self.speaks = not any(mesh.coordinate(name) for name in ("pp", "cp", "tp"))

    def count(self, batch: Batch) -> int:
        """Labels to predict in a batch, to be added over all ranks: of those with the same batch, one counts."""
        return int((batch["labels"] != -100).sum()) if self.speaks else 0

    def split(self, batch: Batch) -> list[Micro]:
        """The micro batches of a batch: tokens and labels, int64 [sequences, seq_len], perhaps positions and document_ids.

        They go to the device by a stream of their own, while it still computes what it was given before.
        """
        sequences, seq_len = batch["tokens"].shape
        rows = torch.arange(sequences) + self.data_rank * sequences
        with self.streams.stream(self.copies):
            here = self._move(offsets(seq_len, *self.context))
            micros = [
                self._micro({key: value[at : at + self.micro_batch_size] for key, value in batch.items()}, own, here)
                for at, own in zip(range(0, sequences, self.micro_batch_size), rows.split(self.micro_batch_size), strict=True)
            ]
        computing = self.streams.current_stream()
        computing.wait_stream(self.copies)
        for moved in {here, *(t for micro in micros for t in (micro.tokens, micro.labels, micro.positions, micro.rows))}:
            if moved.is_cuda:
                moved.record_stream(computing)  # its memory is the other stream's again only once this one is done with it
        return micros

    def _micro(self, batch: Batch, rows: Tensor, here: Tensor) -> Micro:
        ids = batch.pop("document_ids", None)
        mine = {key: self._move(value) for key, value in cut(batch, *self.context).items()}
        documents = None if ids is None else Documents.of(ids)
        return Micro(mine["tokens"], mine["labels"], mine.get("positions", here), documents, self._move(rows), here)

    def _move(self, tensor: Tensor) -> Tensor:
        """To the device, without waiting: from pinned memory, which the loader's batches already are."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
