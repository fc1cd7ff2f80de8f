"""How long an operation takes on a device, and a message on its links.

What was measured on the device is taken as it is. Where nothing was it is the roofline: an operation takes as long as its
products at the reached peak, or its bytes at the reached bandwidth, whichever is more. In between, of what was measured of the
same operation in the same type the nearest in size stands for it: in proportion to the roofline where it is near, and where it
is far the roofline's difference comes on top of it, since what a small one takes is mostly its start. A message that is smaller
than what was measured lies between its way alone and that.

A message takes a way and its bytes' time. Collectives go round in a ring: of n ranks, n - 1 steps (an all-reduce twice as
many), of which those to another node take the longer way; small all-reduces up and down a tree instead. Inside and between
nodes different links are busy at the same time, and the slower ones count (`leaving` has which bytes take which). What one rank
sends to another node by itself goes through one port.

Source of the roofline: Williams et al. (CACM 2009); of the ring's time: Thakur et al. (IJHPCA 2005).
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

from titan.dryrun.cluster import Cluster
from titan.dryrun.work import ATTENTION, Message, Operation

NEAR = 16
"""How many times larger or smaller than what was measured is near."""
TYPES = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64")
"""The narrowest first."""
Point = tuple[float, float, float]
"""Two sizes (flops and bytes moved, or ranks and bytes), and seconds."""


class Prices:
    """Of a cluster. tf32: whether float32 products are done in that."""

    def __init__(self, cluster: Cluster, tf32: bool) -> None:
        self.cluster = cluster
        gpu = cluster.gpu
        self.peaks = {
            "float32": gpu.tf32_tflops if tf32 else gpu.float32_tflops,
            "bfloat16": gpu.bfloat16_tflops,
            "float16": gpu.bfloat16_tflops,
            "float8_e4m3fn": gpu.float8_tflops,
            "float8_e5m2": gpu.float8_tflops,
        }
        self.launch = gpu.launch_microseconds * 1e-6
        self.operations: dict[tuple[str, str], list[Point]] = defaultdict(list)
        for key, (flops, moved, seconds) in cluster.measured.operations.items():
            dtype = next((name for name in TYPES if name in key), "int64")
            self.operations[key.split("(")[0], dtype].append((flops, moved, seconds))
        self.messages: dict[str, list[Point]] = defaultdict(list)
        for key, (ranks, size, seconds) in cluster.measured.messages.items():
            self.messages[key.split("(")[0]].append((ranks, size, seconds))
        self.known: dict[tuple[str, int], float] = {}

    def operation(self, operation: Operation) -> float:
        """Seconds of the device, without what the host takes to start it."""
        if operation.free:
            return 0.0
        key = operation.key, operation.moved
        if key not in self.known:
            self.known[key] = self._operation(operation)
        return self.known[key]

    def _operation(self, operation: Operation) -> float:
        if exact := self.cluster.measured.operations.get(operation.key):
            return exact[2]
        best = self.at_best(operation, operation.flops, operation.moved)
        if not (points := self.operations.get((operation.name, operation.dtype))):
            return best
        size = operation.flops or operation.moved or 1
        flops, moved, seconds = min(points, key=lambda point: abs(math.log((point[0] or point[1] or 1) / size)))
        then = self.at_best(operation, flops, moved)
        near = 1 / NEAR <= size / (flops or moved or 1) <= NEAR
        return seconds * best / then if near and then else max(seconds + best - then, best)

    def at_best(self, operation: Operation, flops: float, moved: float) -> float:
        """By the roofline, such an operation of this size."""
        gpu = self.cluster.gpu
        reach = gpu.attention_reach if operation.name in ATTENTION else gpu.reach
        products = flops / (self.peaks.get(operation.dtype, gpu.float32_tflops) * reach * 1e12)
        return max(products, moved / (gpu.memory_gb_per_second * gpu.memory_reach * 1e9))

    def message(self, message: Message) -> float:
        """Seconds from when all ranks take part until it is there."""
        return self.sent(message.op, message.bytes, message.ranks, message.near)

    def sent(self, op: str, size: int, ranks: int, near: int) -> float:
        """Of so many bytes, among so many ranks, of which `near` are on this rank's node."""
        if ranks == 1 or op == "recv":
            return 0.0  # a receive ends as its sender's send does
        points = sorted((b, seconds) for n, b, seconds in self.messages.get(op, ()) if n == ranks)
        if points and size <= points[-1][0]:
            return _between([(0.0, min(points[0][1], self.way(op, ranks, near))), *points], size)
        if points:
            return points[-1][1] + self._bytes(op, size - int(points[-1][0]), ranks, near)
        return self.way(op, ranks, near) + self._bytes(op, size, ranks, near)

    def _bytes(self, op: str, size: int, ranks: int, near: int) -> float:
        links = self.cluster.links
        inside, between = leaving(op, size, ranks, near)
        if op == "send" and near < ranks:
            inside, between = 0, size
        return max(inside / links.inside_gb_per_second, between / links.between_gb_per_second) / links.reach / 1e9

    def way(self, op: str, ranks: int, near: int) -> float:
        """Seconds until a message without bytes is there."""
        links = self.cluster.links
        if op in ("send", "broadcast", "all_to_all"):
            return (links.inside_microseconds if near == ranks else links.between_microseconds) * 1e-6
        hops = -(-ranks // near) if near < ranks else 0  # of the ring, those from one node to the next
        around = max(0, ranks - 1 - hops) * links.inside_microseconds + hops * links.between_microseconds
        if op != "all_reduce":
            return around * 1e-6
        up = math.ceil(math.log2(min(ranks, near))) * links.inside_microseconds
        up += math.ceil(math.log2(max(1, hops))) * links.between_microseconds
        return 2 * min(around, up) * 1e-6


def _between(points: list[tuple[float, float]], size: float) -> float:
    """On the lines between points; the first is of no byte, the last of as many or more."""
    (a, low), (b, high) = next((one, two) for one, two in pairwise(points) if size <= two[0])
    return low + (high - low) * (size - a) / max(1.0, b - a)


def leaving(op: str, size: int, ranks: int, near: int) -> tuple[int, int]:
    """Of so many bytes, those that leave a rank for its node, of which `near` take part, itself too, and for other nodes."""
    if op == "recv" or ranks == 1:
        return 0, 0
    if op == "all_to_all":
        return size * (near - 1) // ranks, size * (ranks - near) // ranks
    out = size if op in ("send", "broadcast") else size * (ranks - 1) // ranks * (2 if op == "all_reduce" else 1)
    between = 0 if near == ranks else out // near
    return out - between, between
