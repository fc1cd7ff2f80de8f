"""Mixtures: several sources, each with its share of the tokens, and the order in which a run sees their samples.

All samples are equally long, so a share of the tokens is a share of the samples. Which source global sample i comes from, and
which number it has there, is a function of i alone, in constant time: weights are rounded to numbers of 4,096ths, and 4,096
slots are dealt out to the sources once, each source's evenly spread. Sample i takes slot i mod 4,096, and

    number in its source = (i div 4,096) * slots of the source + slots of the source before this one

so nothing has to be counted up to i, and nothing is kept. Ten billion samples need as much memory as ten thousand: the slots.
At every point of a run each source has had its share, to less than one sample.

From a step on there may be other weights (a stage): for a stage the same holds from its first sample on, and a source's number
goes on where the stage before left it.

A source's n-th sample is a window of it, drawn without replacement epoch after epoch (`titan.data.sampler`); a small source
begins its second epoch while a large one is still in its first.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titan.data.dataset import TokenDataset
from titan.data.sampler import Sampler
from titan.data.windows import Arrays, Windows

PERIOD = 4096


@dataclass(frozen=True)
class Stage:
    """Weights, from a global sample on."""

    first: int
    """The stage's first global sample."""
    weights: tuple[float, ...]
    """Of each source, 0 or more, not all 0."""


class Mixture:
    """Which sample of which source a global sample is."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """stages: in order, the first from sample 0 on."""
        self.firsts = [stage.first for stage in stages]
        self.parts = [parts(stage.weights) for stage in stages]
        """Of each stage, the sources' slots out of PERIOD."""
        self._slots = [deal(numbers) for numbers in self.parts]
        self._before = [own_before(slots, len(numbers)) for slots, numbers in zip(self._slots, self.parts, strict=True)]
        self._base = [np.zeros(len(self.parts[0]), dtype=np.int64)]  # what each stage finds done of each source
        for stage in range(len(stages) - 1):
            self._base.append(self._in_stage(stage, self.firsts[stage + 1]))

    def place(self, i: int) -> tuple[int, int]:
        """(source, number of the sample in it) of global sample i."""
        stage = bisect_right(self.firsts, i) - 1
        periods, slot = divmod(i - self.firsts[stage], PERIOD)
        source = int(self._slots[stage][slot])
        before = int(self._base[stage][source]) + periods * self.parts[stage][source] + int(self._before[stage][slot])
        return source, before

    def done(self, samples: int) -> list[int]:
        """How many of the first `samples` global samples come from each source."""
        stage = max(0, bisect_right(self.firsts, samples) - 1)
        found: list[int] = self._in_stage(stage, samples).tolist()
        return found

    def describe(self) -> list[list[int]]:
        """Each stage's first sample and the sources' slots: what a resumed run must find unchanged."""
        return [[first, *numbers] for first, numbers in zip(self.firsts, self.parts, strict=True)]

    def _in_stage(self, stage: int, samples: int) -> np.ndarray:
        """Samples of each source before global sample `samples`, which this stage, or its end, has reached. int64 [sources]"""
        periods, slot = divmod(samples - self.firsts[stage], PERIOD)
        numbers = np.array(self.parts[stage], dtype=np.int64)
        begun = np.bincount(self._slots[stage][:slot], minlength=len(numbers))
        counted: np.ndarray = self._base[stage] + periods * numbers + begun
        return counted


def parts(weights: Sequence[float]) -> list[int]:
    """Weights as numbers of slots that add up to PERIOD, by largest remainders; a weight above 0 has one slot at least."""
    total = sum(weights)
    exact = [weight / total * PERIOD for weight in weights]
    found = [max(int(share), int(share > 0)) for share in exact]
    # Rounded: 0.6, 0.3, 0.1 and 6, 3, 1 are the same shares, whatever their last bits are.
    by_remainder = sorted(range(len(exact)), key=lambda source: (round(found[source] - exact[source], 6), source))
    for k in range(PERIOD - sum(found)):
        found[by_remainder[k % len(exact)]] += 1
    while sum(found) > PERIOD:  # many tiny weights were given a slot each
        found[max(range(len(found)), key=found.__getitem__)] -= 1
    return found


def deal(numbers: Sequence[int]) -> np.ndarray:
    """The source of each slot, uint16 [PERIOD].

    The k-th of a source's n slots lies between k / n and (k + 1) / n of the way, as near as whole slots allow: earliest
    deadline first, of those whose time has begun, keeps all deadlines (Liu and Layland 1973). So no source is ever a whole slot
    off its share.
    """
    sources = np.flatnonzero(numbers)
    n, done = np.array(numbers, dtype=np.int64)[sources], np.zeros(len(sources), dtype=np.int64)
    dealt = np.empty(PERIOD, dtype=np.uint16)
    for slot in range(PERIOD):
        deadline = np.where(done * PERIOD // n <= slot, -((done + 1) * -PERIOD // n), 2 * PERIOD)
        chosen = int(deadline.argmin())
        dealt[slot] = sources[chosen]
        done[chosen] += 1
    return dealt


def own_before(slots: np.ndarray, sources: int) -> np.ndarray:
    """How many slots of the same source lie before each slot, uint16 [PERIOD]."""
    found = np.empty(PERIOD, dtype=np.uint16)
    for source in range(sources):
        own = np.flatnonzero(slots == source)
        found[own] = np.arange(len(own))
    return found


class Samples:
    """A run's samples in order: the mixture of its sources, each shuffled."""

    def __init__(self, sources: Mapping[str, Windows], seed: int, mixture: Mixture | None = None) -> None:
        """sources: by name, of one length and one vocabulary. mixture: of them; None for one source alone."""
        self.names, self.windows = list(sources), list(sources.values())
        self.mixture = mixture or Mixture([Stage(0, (1.0,))])
        self._samplers = [Sampler(seed, windows.fingerprint, windows.count) for windows in self.windows]
        first = self.windows[0]
        self.seq_len, self.document_mask = first.seq_len, first.document_mask
        self.tokenizer = first.datasets[0].tokenizer
        """Its fingerprint."""
        prints = [windows.fingerprint for windows in self.windows]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()
        """The identity of all data, and of how they are cut."""

    @property
    def count(self) -> int:
        """Samples in an epoch, of all sources."""
        return sum(windows.count for windows in self.windows)

    @property
    def datasets(self) -> list[TokenDataset]:
        return [data for windows in self.windows for data in windows.datasets]

    def place(self, i: int) -> tuple[int, int]:
        """(source, window) of global sample i."""
        source, number = self.mixture.place(i)
        return source, self._samplers[source].window(number)

    def read(self, i: int) -> Arrays:
        """Global sample i, as `Windows.read` gives it."""
        source, window = self.place(i)
        return self.windows[source].read(window, f"sample {i}")

    def counters(self, samples: int) -> dict[str, float]:
        """After so many global samples: of each source the tokens that were read and the epochs that they make, if there are
        several."""
        if len(self.names) == 1:
            return {}
        done = dict(zip(self.names, self.mixture.done(samples), strict=True))
        tokens: dict[str, float] = {f"data_tokens/{name}": number * self.seq_len for name, number in done.items()}
        counts = {name: windows.count for name, windows in zip(self.names, self.windows, strict=True)}
        return tokens | {f"data_epochs/{name}": number / counts[name] for name, number in done.items()}
