"""Windows: how the stream of tokens is cut into samples of seq_len tokens. A run's data are windows in a shuffled order.

Contiguous: every seq_len tokens, whatever they belong to. A window holds the end of one document, some whole ones, and the
beginning of another; a label is the next token of the stream. Nothing is left out but the stream's last few tokens.

Best fit: whole documents, as `titan.data.packing` has put them together. A label is the next token of the document, and the
token that ends a document has none; what is left of a window is padding, which never counts in the loss.

Of a conversation's tokens (`titan.data.chat`) only those that the model is to say are labels.

Where attention is to stay inside a document, a window also says for each token the number of its document and its position
there, both within the window. A document that a window cuts begins anew at its first token there, with number 0 and position 0:
the window is all that attention sees, and a position counted from outside it could lie past those that the model has.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from titan.config import Data
from titan.data.dataset import TokenDataset, samples_per_epoch
from titan.data.packing import VERSION, write_packing

IGNORED = -100  # the label that no loss counts
Arrays = dict[str, np.ndarray]


class Windows(Protocol):
    """A split as windows, numbered from 0. A copy sent to another process is opened there anew."""

    datasets: list[TokenDataset]
    """What is cut."""
    seq_len: int
    document_mask: bool
    count: int
    """Windows in an epoch."""
    fingerprint: str
    """The identity of the data, and of how they are cut."""

    def read(self, window: int, where: str) -> Arrays:
        """tokens and labels, int64 [seq_len], and with `document_mask` document_ids and positions, the same.

        where: for people, should a token be outside the vocabulary (ShardError).
        """

    def filled(self, window: int) -> int:
        """How many of its tokens are no padding."""


class Contiguous:
    """Every seq_len tokens of the stream."""

    def __init__(self, data: TokenDataset, seq_len: int, document_mask: bool = False) -> None:
        """Raises ValueError where the data are less than a window."""
        self.data, self.datasets, self.seq_len, self.document_mask = data, [data], seq_len, document_mask
        self.count = samples_per_epoch(data, seq_len)
        self.fingerprint = data.fingerprint

    def read(self, window: int, where: str) -> Arrays:
        at = window * self.seq_len
        tokens = self.data.read(at, self.seq_len + 1)
        self.data.require_known(tokens, f" {where} (tokens from {at})")
        labels = tokens[1:]
        if self.data.masked:
            labels = np.where(self.data.counted(at + 1, self.seq_len), labels, IGNORED)
        arrays = {"tokens": tokens[:-1], "labels": labels}
        if self.document_mask:
            starts = self.data.document_starts(at, self.seq_len)
            arrays["document_ids"], arrays["positions"] = number_documents(starts, self.seq_len)
        return arrays

    def filled(self, window: int) -> int:
        return self.seq_len


class BestFit:
    """Whole documents, packed."""

    document_mask = True  # documents that lie side by side by chance must not see each other

    def __init__(self, data: TokenDataset, seq_len: int, folder: Path) -> None:
        """folder: where `write_packing` left what belongs to these data and this length."""
        self.data, self.datasets, self.seq_len, self.folder = data, [data], seq_len, folder
        self._order, self._length, self._first = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("order", "length", "first")
        )
        self.count = len(self._first) - 1
        self.fingerprint = hashlib.sha256(f"{data.fingerprint} best fit {VERSION} {seq_len}".encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return BestFit, (self.data, self.seq_len, self.folder)

    def read(self, window: int, where: str) -> Arrays:
        first, end = (int(piece) for piece in self._first[window : window + 2])
        tokens, labels = np.zeros(self.seq_len, dtype=np.int64), np.full(self.seq_len, IGNORED, dtype=np.int64)
        starts, at = [], 0
        for begin, length in zip(self._order[first:end].tolist(), self._length[first:end].tolist(), strict=True):
            # One token more where the document goes on behind the piece: it is the last one's label.
            more = length == self.seq_len and begin + length < self.data.tokens and not self._ends_at(begin + length)
            piece = self.data.read(begin, length + more)
            self.data.require_known(piece, f" {where} (tokens from {begin})")
            tokens[at : at + length] = piece[:length]
            to_say = piece[1:]
            if self.data.masked:
                to_say = np.where(self.data.counted(begin + 1, len(to_say)), to_say, IGNORED)
            labels[at : at + len(to_say)] = to_say
            starts.append(at)
            at += length
        if at < self.seq_len:  # the padding is a document of its own
            starts.append(at)
        ids, positions = number_documents(np.array(starts), self.seq_len)
        return {"tokens": tokens, "labels": labels, "document_ids": ids, "positions": positions}

    def filled(self, window: int) -> int:
        first, end = (int(piece) for piece in self._first[window : window + 2])
        return int(self._length[first:end].sum())

    def _ends_at(self, place: int) -> bool:
        """Whether a document ends here, and another begins."""
        return len(self.data.document_starts(place - 1, 2)) == 2


class Joined:
    """Several sources' windows, one source after the other."""

    def __init__(self, parts: Sequence[Windows]) -> None:
        self.parts = list(parts)
        self.datasets = [data for part in parts for data in part.datasets]
        self.seq_len, self.document_mask = parts[0].seq_len, parts[0].document_mask
        self._ends = list(accumulate(part.count for part in parts))
        self.count = self._ends[-1]
        self.fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()

    def read(self, window: int, where: str) -> Arrays:
        part, own = self._own(window)
        return part.read(own, where)

    def filled(self, window: int) -> int:
        part, own = self._own(window)
        return part.filled(own)

    def _own(self, window: int) -> tuple[Windows, int]:
        number = bisect_right(self._ends, window)
        return self.parts[number], window - (self._ends[number] - self.parts[number].count)


def windows(data: TokenDataset, config: Data, seq_len: int) -> Windows:
    """A split's windows as the config wants them, packed under data.cache first where it is not done yet.

    Raises ValueError where there is no window, OSError where the cache cannot be written.
    """
    if config.packing == "contiguous":
        return Contiguous(data, seq_len, config.document_mask)
    identity = hashlib.sha256(f"{data.fingerprint} {VERSION} {seq_len}".encode()).hexdigest()
    folder = Path(config.cache) / f"packed-{data.split}-{seq_len}-{identity[:16]}"
    if not folder.is_dir():
        write_packing(folder, data.document_lengths(), seq_len)
    return BestFit(data, seq_len, folder)


def number_documents(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token's document, counted from 0, and its position there, int64 [length], from where documents start (0 first)."""
    ids = np.repeat(np.arange(len(starts)), np.diff(starts, append=length))
    return ids, np.arange(length) - starts[ids]
