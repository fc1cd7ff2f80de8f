"""What this machine's operations and messages take, for `titan plan`: single ones, outside of training, with random numbers.

A config's dry step names the operations and messages that there will be. Each that differs is carried out some times on all
ranks at once, as in training, and the median counts: on a CPU neighbours share memory's bandwidth and the power that they run
at. So what is predicted of another config of the same shapes is made of measured parts, and of other shapes, of the nearest.

Over and over on the same tensors an operation finds all in a core's own cache: elementwise ones took half of what they take in
a step. So each run takes other tensors, of which there are as many as half of the last cache holds, and results stay a while.

And a message that follows another at once finds everybody awake, where in a step they compute: with as much work in between as
a step has, a small message took fifteen times as long. So on a CPU there is work in between, operations of the step in their
order for as long as it has between two messages, and its time is taken off.

What an operation takes besides itself (Python, autograd, its way to the device) is told by a small model's passes over one
token.

Ranks may be more than a CPU's cores, up to four a core. Then they take turns at being measured, as many at once as there are
cores, and what they compute is taken to last as many times longer as ranks share a core: as it does when all compute at once.

On GPUs attention is that of `titan.attention_ops`, and messages are NCCL's.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from titan import attention_ops, zoo
from titan.cores import cores
from titan.dryrun.cluster import Cluster, Gpu, Links, Measured
from titan.dryrun.prices import leaving
from titan.dryrun.work import ATTENTION, Item, Message, Operation, Shape
from titan.metrics.peaks import data_sheet, measured_flops
from titan.pool import Pool
from titan.terminal import plural

ENOUGH_SECONDS, LEAST, MOST = 0.01, 4, 100
"""How long one operation is repeated, and how often at least and at most."""
COPY_BYTES = 2**28
MOST_SHARED = 4
"""Ranks of a core."""
MESSAGES, LOOPS, MOST_BETWEEN = 15, 7, 0.01
"""How many of a kind follow one another, how often; seconds of work between two of them, where a step has more."""


class Call(NamedTuple):
    """An operation that a rank carries out."""

    name: str
    """With its overload."""
    given: Any


class Found(NamedTuple):
    """Of a rank: seconds of operations and messages in the order asked for, and the figures of its device."""

    operations: list[float]
    messages: list[float]
    figures: dict[str, float]


def calibrate(items: Sequence[Item], world: int, model: str, threads: int = 0) -> Cluster:
    """Measure what these take on so many ranks of this machine. model: its name; a small one tells what starting them takes.
    threads: of a rank on a CPU; 0: as many as training gives it, the cores over the ranks.

    Raises ValueError where the ranks are more than its GPUs, or on a CPU more than four a core.
    """
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else cores()
    if world > there * (1 if cuda else MOST_SHARED):
        raise ValueError(f"{world} ranks cannot be measured on this machine's {there} {'GPUs' if cuda else 'cores'}")
    share = max(1.0, world / there)
    in_order = [item for item in items if isinstance(item, Operation) and not item.free and item.moved]
    operations = {operation.key: operation for operation in in_order}
    places = {key: place for place, key in enumerate(operations)}
    order = [places[operation.key] for operation in in_order]
    messages = Counter((m.op, m.ranks, m.bytes) for m in items if isinstance(m, Message) and m.ranks > 1 and m.op != "recv")
    calls = [Call(f"{o.name}.{o.overload}", o.call[1]) for o in operations.values()]
    threads = threads or max(1, there // world)
    with Pool(600) as pool:  # ranks wait for each other's turns
        found = pool.run(world, measure, calls, order, messages, threads, model, math.ceil(share), timeout=600)
    first: Found = found[0]
    usual = lambda rows: [statistics.median(row) for row in zip(*rows, strict=True)]  # noqa: E731
    seconds = [share * own for own in usual([rank.operations for rank in found])]
    travel = usual([rank.messages for rank in found])
    measured = Measured(
        {key: [float(o.flops), float(o.moved), s] for (key, o), s in zip(operations.items(), seconds, strict=True) if s},
        {f"{op}({n}, {b})": [float(n), float(b), s] for (op, n, b), s in zip(messages, travel, strict=True)},
    )
    figures = {name: statistics.median(rank.figures[name] for rank in found) for name in first.figures}
    figures |= {name: figures[name] / share for name in ("float32", "bfloat16", "tf32", "copy")}
    figures["launch"] *= share
    figures["memory"] /= share
    links = links_of(travel, list(messages), figures, max(there, world))
    return Cluster(gpu_of(figures, threads, share, cuda), links, measured)


def gpu_of(figures: dict[str, float], threads: int, share: float, cuda: bool) -> Gpu:
    """The device's figures: what was measured, by the share of its data sheet that bfloat16's products reach."""
    ranks = f", {share:g} ranks a core" if share > 1 else ""
    name = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), {plural(threads, 'thread')} a rank{ranks}"
    sheet = data_sheet(name) if cuda else None
    bfloat16 = figures["bfloat16"] if sheet is None else sheet[0]
    reach = min(1.0, figures["bfloat16"] / bfloat16)
    return Gpu(
        name=name,
        memory_gib=figures["memory"] / 2**30,
        reserved_gib=figures["reserved"] / 2**30,
        float32_tflops=figures["float32"] / reach / 1e12,
        tf32_tflops=figures["tf32"] / reach / 1e12,
        bfloat16_tflops=bfloat16 / 1e12,
        float8_tflops=bfloat16 * (2 if cuda and torch.cuda.get_device_capability() >= (8, 9) else 1) / 1e12,
        reach=reach,
        attention_reach=reach / 2,
        memory_gb_per_second=figures["copy"] / 1e9,
        memory_reach=1.0,
        launch_microseconds=figures["launch"] * 1e6,
        asynchronous=cuda,
    )


def links_of(seconds: list[float], messages: list[tuple[str, int, int]], figures: dict[str, float], there: int) -> Links:
    """Of the largest and the smallest message; of other nodes nothing is known, and they are taken to be as near."""
    both = zip(messages, seconds, strict=True)
    rates = [sum(leaving(op, size, ranks, ranks)) / taken for (op, ranks, size), taken in both if size >= 2**16]
    rate = max(rates, default=figures["copy"]) / 1e9
    least = min(seconds, default=0.0) * 1e6
    return Links(there, rate, rate, 1.0, least, least)


def measure(
    rank: int,
    calls: list[Call],
    order: list[int],
    messages: Counter[tuple[str, int, int]],
    threads: int,
    model: str,
    turns: int,
) -> Found:
    """On a rank: each operation and message, some times. order: places of the calls as they are done."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            operations, found = list[float](), dict[str, float]()
            for turn in range(turns):
                dist.barrier()
                if rank % turns == turn:
                    operations = [operation_seconds(call, device) for call in calls]
                    found = figures(model, device)
            dist.barrier()
            groups = {n: group_of(n, cuda) for n in sorted({n for _, n, _ in messages})}
            between = 0.0 if cuda else min(MOST_BETWEEN, sum(operations[i] for i in order) / max(1, messages.total()))
            work = excerpts(calls, order, operations, between) if messages else []
            travel = [message_seconds(op, size, groups[n], device, work) for op, n, size in messages]
            dist.barrier()
            return Found(operations, travel, found)
    finally:
        torch.set_num_threads(before)


def operation_seconds(call: Call, device: torch.device) -> float:
    """One operation's median; 0 where it cannot be carried out on random numbers."""
    size = sum(item.bytes for item in tree_iter(call.given) if isinstance(item, Shape))
    function, sets = prepared(call, device, max(1, min(MOST, other_bytes() // max(1, 2 * size))))
    kept: deque[Any] = deque(maxlen=len(sets))
    turn = cycle(sets)

    def run() -> None:
        args, kwargs = next(turn)
        kept.append(function(*args, **kwargs))

    try:
        return repeated(run, device)
    except (RuntimeError, IndexError, NotImplementedError):
        return 0.0


def prepared(call: Call, device: torch.device, copies: int) -> tuple[Callable[..., Any], list[tuple[Any, Any]]]:
    """A function, and so many sets of arguments and keywords for it, with random tensors."""
    space, name, overload = call.name.split(".")
    function = getattr(getattr(getattr(torch.ops, space), name), overload)
    sets = []
    for _ in range(copies):
        args, kwargs = tree_map(lambda v: random(v, device) if isinstance(v, Shape) else v, call.given)
        sets.append((args, {key: device if key == "device" else value for key, value in kwargs.items()}))
    if device.type == "cuda" and f"{space}.{name}" in ATTENTION:
        return attention_on_gpu(f"{space}.{name}", sets)
    return function, sets


def other_bytes() -> int:
    """What else a core touches between two uses of the same memory, as a guess: half of the last cache."""
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in found]
    return min(max(sizes, default=0) // 2 or 2**24, 2**26)


def attention_on_gpu(name: str, sets: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """What a GPU does in place of the CPU's operation, whose tensors have heads before places."""
    turned: list[tuple[Any, Any]] = []
    for args, _ in sets:
        causal = args[7] if ATTENTION[name] else len(args) > 4 and args[4]
        turned.append(([*(x.transpose(1, 2) for x in args if isinstance(x, Tensor)), causal], {}))
    return (attention_ops.backward if ATTENTION[name] else attention_ops.forward), turned


def random(shape: Shape, device: torch.device) -> Tensor:
    """A tensor of this shape: numbers around 0, or zeros, which are in every table."""
    span = 1 + sum((n - 1) * step for n, step in zip(shape.size, shape.stride, strict=True)) if all(shape.size) else 0
    if shape.dtype.is_floating_point:
        return torch.randn(span, device=device).to(shape.dtype).as_strided(shape.size, shape.stride)
    return torch.zeros(span, dtype=shape.dtype, device=device).as_strided(shape.size, shape.stride)


def repeated(run: Callable[[], Any], device: torch.device, times: int = 0) -> float:
    """The median of some runs, the first left out. times: how often, where all ranks have to agree."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < (times or LEAST) or (
        not times and time.perf_counter() - begin < ENOUGH_SECONDS and len(seconds) < MOST
    ):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def group_of(ranks: int, cuda: bool) -> dist.ProcessGroup:
    """This rank's group, of so many neighbours; all groups talk at once."""
    world, own = dist.get_world_size(), None
    for first in range(0, world, ranks):
        members = list(range(first, min(first + ranks, world)))
        group = dist.new_group(members, backend="nccl" if cuda else "gloo")
        if dist.get_rank() in members:
            own = group
    assert own is not None
    return own


def excerpts(calls: list[Call], order: list[int], seconds: list[float], each: float) -> list[list[Callable[[], Any]]]:
    """Operations as they follow one another in the step, in pieces that take about `each`, one for each message of a loop."""
    made: dict[int, Callable[[], Any]] = {}
    found: list[list[Callable[[], Any]]] = []
    turn = cycle(place for place in order if seconds[place])
    for _ in range(MESSAGES):
        piece, spent = list[Callable[[], Any]](), 0.0
        while spent < each:
            place = next(turn)
            if place not in made:
                function, sets = prepared(calls[place], torch.device("cpu"), 1)
                made[place] = partial(function, *sets[0][0], **sets[0][1])
            piece.append(made[place])
            spent += seconds[place]
        found.append(piece)
    return found


def message_seconds(
    op: str, size: int, group: dist.ProcessGroup, device: torch.device, work: list[list[Callable[[], Any]]]
) -> float:
    """What a message takes, on average, with work before it."""
    ranks = group.size()
    whole = torch.zeros(max(ranks, size // 4 // ranks * ranks), device=device)
    other, part = torch.empty_like(whole), whole[: len(whole) // ranks].clone()
    after, before = ((group.rank() + step) % ranks for step in (1, -1))

    def exchange() -> None:
        there, here = (
            dist.P2POp(how, tensor, group=group, group_peer=peer)
            for how, tensor, peer in ((dist.isend, whole, after), (dist.irecv, other, before))
        )
        for work in dist.batch_isend_irecv([there, here]):
            work.wait()

    runs: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: group._allgather_base(whole, part).wait(),
        "reduce_scatter": lambda: group._reduce_scatter_base(part, whole, dist.ReduceScatterOptions()).wait(),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, group=group, group_src=0),
        "send": exchange,
    }

    def loop(message: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        for piece in work:
            for run in piece:
                run()
            message()
        synchronize(device)
        return (time.perf_counter() - begin) / MESSAGES

    loop(runs[op])
    pairs = [(loop(runs[op]), loop(lambda: None)) for _ in range(LOOPS)]
    return max(1e-6, statistics.median(there - alone for there, alone in pairs))


def figures(model: str, device: torch.device) -> dict[str, float]:
    """What the device reaches, in operations and bytes a second; what it has; what starting an operation takes, in seconds."""
    found = {"float32": measured_flops(device, torch.float32), "bfloat16": measured_flops(device, torch.bfloat16)}
    found["tf32"] = found["float32"]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        found["tf32"] = measured_flops(device, torch.float32)
        torch.set_float32_matmul_precision("highest")
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * COPY_BYTES / repeated(lambda: target.copy_(source), device)
    found["launch"] = launch_seconds(model, device)
    free, whole = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, host_bytes())
    found["memory"], found["reserved"] = float(whole), float(whole - free if device.type == "cuda" else 0)
    return found


class Count(TorchDispatchMode):
    """Of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += 1
        return func(*args, **(kwargs or {}))


def launch_seconds(model: str, device: torch.device) -> float:
    """What an operation takes in passes over a single token, less what the smallest takes by itself."""
    with device:
        small = zoo.make(model, zoo.sizes(model)["debug"])
        token = torch.zeros(1, 1, dtype=torch.int64)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def passes() -> None:
        with torch.enable_grad():
            small(token, labels=token).backward()

    with Count() as count:
        passes()
    number = torch.ones(1, device=device)
    alone = 0.0 if device.type == "cuda" else repeated(lambda: torch.ops.aten.mul.Tensor(number, number), device)
    return max(0.0, repeated(passes, device, times=20) / count.found - alone)


def host_bytes() -> int:
    """Memory of this machine, for each of its cores."""
    pages = [int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    return pages[0] * 1024 // cores()
