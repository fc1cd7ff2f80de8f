"""A dataset: the files of one split, in the order of their names, read as one long stream of tokens.

Files are memory-mapped: opening costs nothing, and all processes of a node share the page cache. They are our token shards
(`titan.data.shards`) or another program's files, as they lie on the disk (`titan.data.foreign`).

Our shards are made split by split. Another program's files are a split by their names (val, valid, validation or dev in it:
held out). Where no name says so, the end of the stream is held out, from the end of a document on.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from titan.data.foreign import Unsaid
from titan.data.formats import open_file, split_files
from titan.data.shards import CHUNK, Shard, ShardError

LONGEST_LOOK = 1 << 24  # tokens, for a document's end near the place where the held-out part is to begin


class TokenDataset:
    """One split ("train" or "validation") as one stream of tokens.

    `.tokens`, `.documents` and `.bytes` (of text; both None where a file does not say) are sums over the files; `.vocab_size`
    and `.tokenizer` (fingerprint) are the same in all. `.masked`: some tokens are not to count in a loss. `.fingerprint` is the
    data's identity, from the files' in order. Raises ShardError.
    """

    def __init__(self, path: Path | str, split: str, unsaid: Unsaid | None = None, held_out: float = 0.0) -> None:
        """unsaid: what another program's files do not say. held_out: the share of them for validation, if no name says it."""
        self.folder, self.split = Path(path), split
        files, divided = split_files(self.folder, split)
        self.shards: list[Shard] = [open_file(file, unsaid) for file in files]
        self.vocab_size, self.tokenizer = self.shards[0].vocab_size, self.shards[0].tokenizer
        for shard in self.shards:
            if (shard.vocab_size, shard.tokenizer) != (self.vocab_size, self.tokenizer):
                raise ShardError(f"{shard.path}: was made with another tokenizer than {self.shards[0].path.name} beside it")
        self.masked = any(shard.masked for shard in self.shards)
        self._ends = list(accumulate(len(shard.tokens) for shard in self.shards))
        self.documents = _sum(shard.documents for shard in self.shards)
        self.bytes = _sum(shard.bytes for shard in self.shards)
        self.fingerprint = hashlib.sha256("".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()
        self._begin, self._end = 0, self._ends[-1]
        if not divided:
            cut = self._document_end_from(round(self._end * (1 - held_out)))
            self._begin, self._end = (0, cut) if split == "train" else (cut, self._end)
            self.documents = self.bytes = None
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {self._begin} {self._end}".encode()).hexdigest()
        self.tokens = self._end - self._begin
        if not self.tokens:
            raise ShardError(f"{self.folder}: nothing of it is {split} data (data.validation_share is {held_out:g})")

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, int64 [length]. Raises IndexError outside the stream."""
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"{self.folder}: {self.split} holds {self.tokens} tokens, not [{start}, {start + length})")
        out, filled = np.empty(length, dtype=np.int64), 0
        for piece in self._pieces(start + self._begin, start + self._begin + length):
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def counted(self, start: int, length: int) -> np.ndarray:
        """Which of the tokens [start, start + length) of the stream count in a loss, bool [length]."""
        found = [np.zeros(0, dtype=bool)]
        start, end = start + self._begin, start + self._begin + length
        while start < end:
            shard = bisect_right(self._ends, start)
            offset = self._ends[shard] - len(self.shards[shard].tokens)
            stop = min(end, self._ends[shard])
            found.append(self.shards[shard].counted(start - offset, stop - offset))
            start = stop
        return np.concatenate(found)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """Where documents start among tokens [start, start + length) of the stream, counted from `start`, int64, rising.

        The first is 0, whether a document starts there or goes on. It looks up, in each file that has some of the tokens, two
        places among the document ends, and reads what lies between. Raises ShardError where that does not rise.
        """
        starts = np.concatenate([np.zeros(1, dtype=np.int64), self._document_ends(start + self._begin, length)])
        if not np.all(np.diff(starts, append=length) > 0):
            raise ShardError(
                f"{self.folder}: {self.split} tokens from {start} have document ends that do not rise; the shard is damaged, "
                "prepare it again"
            )
        return starts

    def document_lengths(self) -> Iterator[np.ndarray]:
        """The lengths of all documents in order, int64, in tokens, some at a time; of one that is cut, what is there."""
        last = start = 0
        while start < self.tokens:
            length = min(CHUNK, self.tokens - start)
            ends = self._document_ends(self._begin + start, length) + start  # those after `start`, before start + length
            start += max(1, length - 1)
            if start >= self.tokens - 1:
                start, ends = self.tokens, np.append(ends, self.tokens)
            yield np.diff(ends, prepend=last)
            last = int(ends[-1]) if len(ends) else last

    def token_counts(self, limit: int | None = None) -> np.ndarray:
        """How often each token occurs, int64 [vocab_size]; with a limit, among the first so many tokens."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for chunk in self._pieces(self._begin, self._end if limit is None else min(self._end, self._begin + limit)):
            self.require_known(chunk)
            counts += np.bincount(chunk, minlength=self.vocab_size)
        return counts

    def require_known(self, tokens: np.ndarray, where: str = "") -> None:
        """ShardError for a token outside the vocabulary. tokens: integers, one at least. where: in the split, for people."""
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not 0 <= extreme < self.vocab_size:
                raise ShardError(
                    f"{self.folder}: {self.split}{where} holds token {extreme}, outside the vocabulary of {self.vocab_size}: "
                    "it is damaged, or was made with another tokenizer"
                )

    def _pieces(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Tokens [start, end) of all files, in pieces of a few megabytes as they lie in the files."""
        while start < end:
            shard = bisect_right(self._ends, start)
            tokens = self.shards[shard].tokens
            offset = start - (self._ends[shard] - len(tokens))
            piece = tokens[offset : offset + min(CHUNK, end - start)]
            yield piece
            start += len(piece)

    def _document_ends(self, start: int, length: int) -> np.ndarray:
        """Where documents end among these tokens of all files, counted from `start`, int64."""
        found = [np.zeros(0, dtype=np.int64)]
        for shard in range(bisect_right(self._ends, start), bisect_left(self._ends, start + length) + 1):
            offset = self._ends[shard] - len(self.shards[shard].tokens)
            ends = self.shards[shard].ends_between(start - offset, start + length - offset)
            found.append(ends.astype(np.int64) + (offset - start))
        return np.concatenate(found)

    def _document_end_from(self, place: int) -> int:
        """The first document end from this place on; the place itself where none is near."""
        length = min(LONGEST_LOOK, self._end - place)
        ends = self._document_ends(place - 1, length + 1)[:1].tolist() if 0 < place < self._end else []
        return place - 1 + ends[0] if ends else place


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one is not known."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def samples_per_epoch(dataset: TokenDataset, seq_len: int) -> int:
    """Windows of seq_len tokens, each with a next token for every one. Raises ValueError where there is none."""
    samples = (dataset.tokens - 1) // seq_len
    if samples < 1:
        held_out = dataset.split == "validation"
        more = "enlarge data.validation_share" if held_out else "give it more text"
        raise ValueError(
            f"training.seq_len: the {dataset.split} split holds {dataset.tokens:,} tokens, fewer than one sample of "
            f"training.seq_len + 1 = {seq_len + 1:,} ({dataset.folder}); {more} or lower training.seq_len"
            + (", or set --validation.interval=0" if held_out else "")
        )
    return samples


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the tokens' frequencies: the loss of the best model that does not look at the context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
