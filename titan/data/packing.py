"""Best-fit packing: whole documents into windows, as few windows as one can find quickly.

Cutting the stream every seq_len tokens tears most documents: a model is then asked to go on with a text whose beginning it
never saw. Packing keeps a document in one piece wherever it fits; only one longer than a window is cut, into full windows and a
rest. To fill windows with pieces of given lengths is bin packing. Best fit decreasing takes the pieces by falling length
and puts each into the fullest window that has room: at most 11/9 of the fewest windows possible, and with documents of natural
lengths well under one percent of padding.

Lengths are whole numbers up to seq_len, so nothing has to be searched document by document: windows with equal room are equal,
and pieces of equal length are placed together, as many at once as one kind of window takes. The work grows with the number of
different lengths, the memory with the number of documents (some 40 bytes each while packing). The result lies on the disk:

    order.npy    int64 [pieces]       where each piece begins in the stream, window after window
    length.npy   int32 [pieces]       its tokens
    first.npy    int64 [windows + 1]  a window's first piece in these

Source: "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), for best fit on document lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from titan.files import fsync, publish, temporary_folder

VERSION = 1


def pieces_of(lengths: Iterable[np.ndarray], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of documents begin in the stream, int64, and their lengths, int32, at most seq_len. lengths: of all
    documents, in order."""
    found: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    begin = 0
    for some in lengths:
        count = -(-some // seq_len)
        document = np.repeat(np.arange(len(some)), count)
        number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)  # of the piece, in its document
        starts = begin + np.cumsum(some) - some
        found.append(starts[document] + number * seq_len)
        sizes.append(np.minimum(some[document] - number * seq_len, seq_len).astype(np.int32))
        begin += int(some.sum())
    return np.concatenate(found), np.concatenate(sizes)


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The window of each piece, int64 [pieces]: best fit decreasing. lengths: integers from 1 to seq_len."""
    window_of = np.empty(len(lengths), dtype=np.int64)
    falling = np.argsort(-lengths.astype(np.int64), kind="stable")
    counts = np.bincount(lengths, minlength=seq_len + 1)
    rooms: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]  # windows by the room that is left in them
    some = np.zeros(seq_len + 1, dtype=bool)  # where there is one
    windows = placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            tightest = int(some[length:].argmax()) + length
            if some[tightest]:
                group = rooms[tightest].pop()
                some[tightest] = bool(rooms[tightest])
            else:  # no window has room: new ones
                tightest, group = seq_len, np.arange(windows, windows + -(-left // (seq_len // length)))
                windows += len(group)
            each = tightest // length  # one window takes as many before another becomes the fullest
            full = min(len(group), left // each)
            rest = min(left - full * each, each) if full < len(group) else 0
            taken = full * each + rest
            into = np.append(np.repeat(group[:full], each), np.repeat(group[full : full + 1], rest))
            window_of[falling[placed : placed + taken]] = into
            placed, left = placed + taken, left - taken
            for room, those in (
                (tightest - each * length, group[:full]),
                (tightest - rest * length, group[full : full + 1] if rest else group[:0]),
                (tightest, group[full + bool(rest) :]),
            ):
                if len(those) and room:
                    rooms[room].append(those)
                    some[room] = True
    return window_of


def write_packing(folder: Path, lengths: Iterable[np.ndarray], seq_len: int) -> None:
    """Pack documents into windows and write the result as `folder`, whole or not at all."""
    begin, size = pieces_of(lengths, seq_len)
    window = best_fit(size, seq_len)
    order = np.argsort(window, kind="stable")  # in a window as in the stream
    first = np.concatenate([[0], np.cumsum(np.bincount(window))])
    with temporary_folder(folder) as temporary:
        for name, array in (("order", begin[order]), ("length", size[order]), ("first", first)):
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            fsync(temporary / f"{name}.npy")
        fsync(temporary)
        publish(temporary, folder)
