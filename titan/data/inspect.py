"""What a dataset holds, for people: how much, how long its documents are, and a sample as text with where training sees it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from titan.config import Config, accumulation, degrees
from titan.data.dataset import TokenDataset
from titan.data.mixture import Samples
from titan.data.tokenizer import Tokenizer
from titan.data.windows import IGNORED, Windows
from titan.terminal import plural

BAR = 40
LOOKED_AT = 1 << 26  # tokens, for the share of the vocabulary that occurs


def summary(windows: Windows, data: TokenDataset, config: Config) -> list[str]:
    """Files, tokens, text, vocabulary, samples of a source: a line each."""
    first = data.shards[0]
    files = plural(len(data.shards), "file")
    lines = [f"{data.split}: {data.folder}, {files} ({first.format}, {first.tokens.dtype.name})"]
    lines.append(f"  tokens      {data.tokens:,}")
    if data.bytes is not None:
        lines.append(f"  text        {data.bytes:,} bytes, {data.bytes / data.tokens:.2f} a token")
    used = int((data.token_counts(limit=LOOKED_AT) > 0).sum())
    among = "" if data.tokens <= LOOKED_AT else f" among the first {LOOKED_AT:,} tokens"
    lines.append(f"  vocabulary  {data.vocab_size:,}, of which {used:,} occur{among}")
    if data.masked:
        looked_at = min(data.tokens, LOOKED_AT)
        share, among = data.counted(0, looked_at).mean(), among and f" of the first {LOOKED_AT:,}"
        lines.append(f"  counted     {share:.1%} of the tokens are for the model to say and count in the loss{among}")
    count, seq_len, batch = windows.count, windows.seq_len, config.training.global_batch_size
    lines.append(f"  an epoch    {plural(count, 'sample')} of {seq_len:,} tokens, {count / batch:,.1f} steps of {batch:,}")
    if config.data.packing == "best_fit":
        lines.append(f"  packed      best fit; {1 - data.tokens / (count * seq_len):.2%} of the places are padding")
    return lines


def length_counts(data: TokenDataset, done: Callable[[int], None]) -> np.ndarray:
    """How many documents have [2**i, 2**(i + 1)) tokens, int64 [64], and in a second row how many tokens they have together.

    done: called with numbers of tokens that have been looked at since.
    """
    counts = np.zeros((2, 64), dtype=np.int64)
    for lengths in data.document_lengths():
        kinds = np.frexp(lengths.astype(np.float64))[1] - 1
        counts[0] += np.bincount(kinds, minlength=64)
        counts[1] += np.bincount(kinds, lengths, minlength=64).astype(np.int64)
        done(int(lengths.sum()))
    return counts


def histogram(counts: np.ndarray, unicode: bool) -> list[str]:
    """Documents by length; a bar for how many, a number for the share of all tokens that they hold."""
    documents, tokens = counts
    kinds = np.flatnonzero(documents)
    middle = int(np.searchsorted(documents.cumsum(), documents.sum() / 2))
    lines = [f"  documents   {documents.sum():,}, {tokens.sum() / documents.sum():,.0f} tokens on average"]
    width = len(f"{2 ** (int(kinds[-1]) + 1) - 1:,}")
    lines += ["", f"  {'length':>{2 * width + 3}}  {'documents':>12}  of all tokens"]
    for kind in range(int(kinds[0]), int(kinds[-1]) + 1):
        bar = ("█" if unicode else "#") * math.ceil(BAR * documents[kind] / documents.max())
        span = f"{2**kind:>{width},} - {2 ** (kind + 1) - 1:>{width},}"
        share = tokens[kind] / tokens.sum()
        lines.append(f"  {span}  {documents[kind]:>12,}  {share:>6.1%}  {bar}" + ("  (half)" if kind == middle else ""))
    return lines


def place(number: int, config: Config, world: int, held_out: bool) -> str:
    """Where training, or a validation, sees a global sample: step, row, ranks, micro batch."""
    training, plan = config.training, degrees(config.parallel, world)
    step, row = divmod(number, training.global_batch_size)
    size = training.global_batch_size // plan.data_parallel
    rank, own = divmod(row, size)
    inner = plan.cp * plan.tp
    ranks = [(pp * plan.data_parallel + rank) * inner + i for pp in range(plan.pp) for i in range(inner)]
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {world}"
    micro = f"micro batch {own // training.micro_batch_size + 1} of {accumulation(training, plan.data_parallel)}"
    when = f"batch {step + 1:,}" if held_out else f"step {step + 1:,} of {training.steps:,}"
    return f"{when}, row {row + 1:,} of {training.global_batch_size:,}: {who}, {micro}"


def sample(samples: Samples, tokenizer: Tokenizer, number: int) -> list[str]:
    """A global sample's documents as text, in order. samples: with document_mask.

    Of conversations, what counts in the loss stands between [[ and ]].
    """
    source, window = samples.place(number)
    windows = samples.windows[source]
    arrays, filled = samples.read(number), windows.filled(window)
    tokens, borders = arrays["tokens"][:filled], np.flatnonzero(np.diff(arrays["document_ids"][:filled])) + 1
    if not any(data.masked for data in windows.datasets):
        return [tokenizer.decode(part) for part in np.split(tokens, borders)]
    counted = np.concatenate([[False], arrays["labels"][: filled - 1] != IGNORED])  # the first token is nobody's label
    return [_marked(tokenizer, *parts) for parts in zip(np.split(tokens, borders), np.split(counted, borders), strict=True)]


def _marked(tokenizer: Tokenizer, tokens: np.ndarray, counted: np.ndarray) -> str:
    """The text of the tokens, those that count in brackets."""
    turns = np.flatnonzero(np.diff(counted)) + 1
    parts = zip(np.split(tokens, turns), np.split(counted, turns), strict=True)
    return "".join(f"[[{tokenizer.decode(part)}]]" if own[0] else tokenizer.decode(part) for part, own in parts)
