"""A profiler's trace, summed up: where a step's time went. No torch.

Every moment of a step belongs to one kind. On a CPU it is that of the operation that is under way, told by the outermost
one that says what it is for (all within the loss is loss), or else by its own name. On a GPU it is that of the kernel that
runs; what it is for is looked up where it was launched.

    matmul          products of matrices              attention   the fused operation
    pointwise       norms, activations, additions, casts, copies
    loss            the output matrix and cross-entropy, forward and backward
    optimizer       AdamW                             communication   between ranks, while nothing is computed
    data            waiting for the batch             idle        none of these: Python, launching, waiting

Communication while something is computed is hidden: it is told apart, and takes no time of its own.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP, BATCH = "titan: step", "titan: batch"
"""Ranges that a trace has: a step, and in it the wait for its batch."""
KINDS = ("matmul", "attention", "pointwise", "loss", "optimizer", "communication", "data", "idle")
PURPOSES = (
    ("loss", re.compile("CrossEntropy|cross_entropy|nll_loss")),
    ("optimizer", re.compile(r"_fused_adam|Optimizer\.step|multi_tensor.*adam", re.I)),
    ("attention", re.compile("scaled_dot_product|flash|fmha|efficient_attention|sdpa", re.I)),
)
"""What an operation is for, and all inside it."""
PRODUCTS = re.compile(r"^aten::(mm|addmm|bmm|baddbmm|_scaled_mm|_grouped_mm|mkldnn_.*linear|matmul|linear|einsum)$")
GEMM = re.compile("gemm|nvjet|cutlass|xmma|wgmma|splitK", re.I)
TALK = re.compile("^(gloo|nccl):|ncclDevKernel|ncclKernel")
SILENT = re.compile("^c10d::|^fsdp::all_gather_copy_in$")

Span = tuple[float, float]
"""Beginning and end, in microseconds."""


@dataclass(frozen=True)
class Shares:
    """Seconds of a step; `hidden`: of communication while something was computed."""

    steps: int
    seconds: float
    kinds: dict[str, float]
    hidden: float


def read(path: Path) -> list[dict[str, Any]]:
    """A trace's complete events. ValueError where the file is none."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            events = json.load(file)["traceEvents"]
        return [event for event in events if event.get("ph") == "X" and "dur" in event]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no trace of PyTorch's profiler: {error}") from error


def shares(events: list[dict[str, Any]]) -> Shares:
    """Where the time of a trace's steps went, a mean step. ValueError where no step is in it."""
    steps = union(_span(event) for event in events if event["name"] == STEP)
    count = sum(event["name"] == STEP for event in events)
    if not count:
        raise ValueError("no step is in the trace: it was not written by titan train with profiling.start")
    computed, talk = _by_kernel(events) if any(event.get("cat") == "kernel" for event in events) else _by_operation(events)
    busy: list[Span] = []
    taken: dict[str, float] = {}
    for kind in ("matmul", "attention", "loss", "optimizer", "pointwise"):
        spans = within(union(computed.get(kind, [])), steps)
        taken[kind] = length(spans) - length(within(spans, busy))
        busy = union([*busy, *spans])
    talking = within(union(talk), steps)
    taken["communication"] = length(talking) - length(within(talking, busy))
    hidden, busy = length(talking) - taken["communication"], union([*busy, *talking])
    waiting = within(union(_span(event) for event in events if event["name"] == BATCH), steps)
    taken["data"] = length(waiting) - length(within(waiting, busy))
    taken["idle"] = length(steps) - length(union([*busy, *waiting]))
    each = 1e6 * count
    return Shares(count, length(steps) / each, {kind: taken[kind] / each for kind in KINDS}, hidden / each)


def _by_operation(events: list[dict[str, Any]]) -> tuple[dict[str, list[Span]], list[Span]]:
    """On a CPU: each operation's own time by kind, without that of operations inside it; and when ranks talked."""
    found: dict[str, list[Span]] = defaultdict(list)
    for spans in _threads(events).values():
        for kind, own in spans:
            if kind:
                found[kind].append(own)
    return found, [_span(event) for event in events if TALK.match(event["name"])]


def _by_kernel(events: list[dict[str, Any]]) -> tuple[dict[str, list[Span]], list[Span]]:
    """On a GPU: kernels by kind, and those that talk to other ranks."""
    purpose = {}
    for event, kind in _purposes(events):
        if (number := event.get("args", {}).get("External id")) is not None:
            purpose[number] = kind
    found: dict[str, list[Span]] = defaultdict(list)
    talk = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, launched = event["name"], purpose.get(event.get("args", {}).get("External id"), "")
        if TALK.search(name):
            talk.append(_span(event))
            continue
        own = next((kind for kind, pattern in PURPOSES if pattern.search(name)), "matmul" if GEMM.search(name) else "pointwise")
        found[launched if launched in ("loss", "optimizer", "attention") else own].append(_span(event))
    return found, talk


def _purposes(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], str]]:
    """Every operation of the host, with its kind, outer ones first."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation") and not TALK.match(event["name"]):
            by_thread[event.get("tid")].append(event)
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        around: list[tuple[float, str, bool]] = []  # end, kind, whether it says what everything inside is for
        for event in thread:
            while around and event["ts"] >= around[-1][0]:
                around.pop()
            kind, settled = (around[-1][1], around[-1][2]) if around else ("", False)
            if not settled:
                for name, pattern in PURPOSES:
                    if pattern.search(event["name"]):
                        kind, settled = name, True
                        break
                else:
                    if SILENT.match(event["name"]):
                        kind = ""
                    elif event["cat"] == "cpu_op":
                        kind = "matmul" if PRODUCTS.match(event["name"]) else "pointwise"
            around.append((event["ts"] + event["dur"], kind, settled))
            yield event, kind if event["cat"] == "cpu_op" else ""


def _threads(events: list[dict[str, Any]]) -> dict[Any, list[tuple[str, Span]]]:
    """By thread: pieces of time, each with the kind of the innermost operation that is under way."""
    found: dict[Any, list[tuple[str, Span]]] = defaultdict(list)
    open_: dict[Any, list[tuple[float, str]]] = defaultdict(list)
    reached: Counter[Any] = Counter()

    def close(thread: Any, until: float) -> None:
        stack = open_[thread]
        while stack and stack[-1][0] <= until:
            end, kind = stack.pop()
            if end > reached[thread]:
                found[thread].append((kind, (reached[thread], end)))
                reached[thread] = end  # type: ignore[assignment]

    for event, kind in _purposes(events):
        thread, (begin, end) = event.get("tid"), _span(event)
        close(thread, begin)
        stack = open_[thread]
        if stack and begin > reached[thread]:
            found[thread].append((stack[-1][1], (reached[thread], begin)))
        reached[thread] = begin  # type: ignore[assignment]
        stack.append((min(end, stack[-1][0]) if stack else end, kind))
    for thread in list(open_):
        close(thread, float("inf"))
    return found


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments, in order, none twice."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > begin:
            merged.append((begin, end))
    return merged


def within(spans: list[Span], others: list[Span]) -> list[Span]:
    """The moments that are in both, each from `union`."""
    found, i, j = [], 0, 0
    while i < len(spans) and j < len(others):
        begin, end = max(spans[i][0], others[j][0]), min(spans[i][1], others[j][1])
        if begin < end:
            found.append((begin, end))
        if spans[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)
