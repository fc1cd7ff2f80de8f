"""How long a rank takes for what it does in a step: operations and messages laid out in time.

A device that works by itself (a GPU) has several queues, and each begins what comes next in it when that can begin:

    host      starts operations one after the other, each some microseconds; it runs ahead of the device
    compute   an operation begins when the one before is done and the host has started it
    gather    FSDP's all-gathers. One may begin when the weights of the one before have been taken out of their message, so it
              travels while that block computes; the block itself waits for its own
    reduce    FSDP's reduce-scatters, while the next block's backward computes, which waits before it sends its own; and the
              sums over replicas after them. Gathers and these take turns on the same links. A micro batch ends when its last
              sum is there, and the next one's first gather begins then
    posted    what a program posts and waits for later: ring attention's hops, the pieces of asynchronous tensor parallelism

Other messages are waited for at once. So are all of them on a CPU, where whoever computes and whoever sends are the same cores:
there is one queue, and all that is done takes its time after the other.

What a message is waited for is time in which nothing is computed: exposed. Time is added up by what it went to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from titan.dryrun.prices import Prices
from titan.dryrun.work import ATTENTION, COPIES_OUT, Message, Operation, Span, Wait, Where

FSDP = "fsdp."
"""Its operations put a message together right before it leaves: so others' messages over the same ranks are told apart."""


class Pace(NamedTuple):
    """Of a part of a step, or of a pass."""

    where: Where
    seconds: float
    spent: Counter[str]
    """Seconds by what they go to: matrix products, attention, other operations, starting operations, waiting for tp."""


def paces(spans: Sequence[Span], prices: Prices) -> list[Pace]:
    """One span after the other."""
    clock = _Clock(prices)
    found = []
    for span in spans:
        before, spent = clock.compute, Counter(clock.spent)
        for item in span.items:
            if not (isinstance(item, Message) and item.dimension == "pp" and span.where == "forward"):
                clock.take(item)
        clock.settle()
        found.append(Pace(span.where, clock.compute - before, clock.spent - spent))
    return found


class _Clock:
    """Where each queue is, in seconds since the step's begin."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.ahead = prices.cluster.gpu.asynchronous
        self.host = self.compute = self.link = self.reduce = self.sums = 0.0
        self.posted: dict[str, float] = {}
        self.may_gather = 0.0
        """When the weights that were gathered last had been taken out."""
        self.gathered: list[float] = []
        """Ends of gathers that nobody has taken out yet."""
        self.ends: dict[Message, float] = {}
        self.before, self.shards = "", ""
        """The name of the operation before, and of the dimension over which FSDP gathers."""
        self.spent: Counter[str] = Counter()

    def take(self, item: Operation | Message | Wait) -> None:
        if isinstance(item, Operation):
            self._operation(item)
        elif isinstance(item, Message):
            self._message(item)
        elif self.ahead:
            self._until(self.ends.pop(item.message, 0.0), item.message.dimension)

    def settle(self) -> None:
        """Until all that travels is there."""
        self._until(self.reduce, self.shards)
        self._until(self.sums, "dp_replicate")
        self.may_gather = self.compute

    def _operation(self, operation: Operation) -> None:
        prices = self.prices
        takes_out = operation.name == COPIES_OUT and bool(self.gathered)
        if takes_out:
            self._until(self.gathered.pop(0), self.shards)
        if not operation.free:
            self.before = operation.name
        seconds = prices.operation(operation)
        self.host += prices.launch
        if self.ahead:
            late = self.host - self.compute if not operation.free else 0.0
            if late > 0:
                self._spend("starting operations", late)
        else:
            self._spend("starting operations", prices.launch)
        kind = "attention" if operation.name in ATTENTION else "matrix products" if operation.flops else "other operations"
        self._spend(kind, seconds)
        if takes_out:
            self.may_gather = self.compute

    def _message(self, message: Message) -> None:
        seconds = self.prices.message(message)
        of_fsdp = self.before.startswith(FSDP)
        self.shards = message.dimension if of_fsdp else self.shards
        if not self.ahead:
            self._until(self.compute + seconds, message.dimension)
        elif message.posted:
            start = max(self.compute, self.posted.get(message.dimension, 0.0))
            self.ends[message] = self.posted[message.dimension] = start + seconds
        elif message.op == "all_gather" and of_fsdp:
            self.link = max(self.link, self.may_gather, self.host) + seconds
            self.gathered.append(self.link)
        elif message.op == "reduce_scatter" and of_fsdp:
            self._until(self.reduce, message.dimension)
            self.reduce = self.link = max(self.compute, self.link) + seconds
        elif message.dimension == "dp_replicate":
            self.sums = max(self.sums, self.reduce, self.compute) + seconds
        else:
            self._until(self.compute + seconds, message.dimension)

    def _until(self, when: float, dimension: str) -> None:
        """Wait for a message."""
        if when > self.compute:
            self._spend(f"waiting for {dimension}", when - self.compute)

    def _spend(self, kind: str, seconds: float) -> None:
        self.spent[kind] += seconds  # type: ignore[assignment]
        self.compute += seconds
