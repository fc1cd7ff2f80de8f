"""What a rank does in a step, one operation after the other: what each computes, reads and writes; its messages, its waits.

A dispatch mode sees every operation that PyTorch carries out, on tensors without memory as on real ones. Noted are

    flops    of matrix products and attention: 2 for each element and row that it is multiplied with; causal attention
             computes half the square of scores, and its backward pass five products for the forward pass's two
    moved    bytes that are read and written once by an operation that does nothing twice

Both together say how long it takes at best (`prices.py`), and its name with its shapes is what is measured on a machine
(`calibrate.py`). A message is noted with its group; a wait where a program asks for what it posted earlier.

Compiled code makes one kernel of neighbouring elementwise operations and reductions: `fused` does the same to the list. Of a
run of them what it reads from before it and what others read after it is moved, and nothing in between. Only blocks are
compiled; here runs may go on into the embedding, the loss and FSDP's casts, which is some per cent too fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from titan.config import Config
from titan.memory import PLAIN, Memory
from titan.parallel.timeline import Action
from titan.tracing import Recorder

PRODUCTS = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.baddbmm": 1, "aten._scaled_mm": 0}
"""Matrix products, and which argument is the first of the two."""
_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
ATTENTION = {_ATTENTION: 0, f"{_ATTENTION}_backward": 1}
"""And which argument is the queries; next come keys and values."""
COPIES_IN, COPIES_OUT = "fsdp.all_gather_copy_in", "fsdp.split_with_sizes_copy"
"""FSDP puts its shards where they belong in a message, and takes the message apart, once it is there."""
LOOKUPS = ("aten.embedding", "aten.gather")
NOTHING = ("aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten._assert_async")
"""No view, and yet nothing is computed or moved."""
DEVICE = torch.ops.prim.device.default
TAGS = (torch.Tag.pointwise, torch.Tag.reduction)
FUSIBLE = ("aten._to_copy", "aten.clone", "aten.copy_", "aten.cat", "aten.fill_", "aten.zeros_like", "aten.native_layer_norm")
"""Into one kernel with their neighbours, besides what has one of the tags."""


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its elements; what an expanded dimension repeats is not read again."""
        return math.prod(n for n, step in zip(self.size, self.stride, strict=True) if step or not n) * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        expected = 1
        for n, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True

    def __str__(self) -> str:
        return f"{_name(self.dtype)}{list(self.size)}" + ("" if self.dense else f"/{list(self.stride)}")


@dataclass(frozen=True)
class Operation:
    """One that PyTorch carries out."""

    name: str
    """aten.mm, and its overload: default."""
    overload: str
    shapes: str
    """Of what it works on, and the whole numbers that say how."""
    dtype: str
    """The narrowest type of its floating-point tensors."""
    flops: int
    moved: int
    free: bool
    """A view, or memory alone."""
    fusible: bool
    call: tuple[Callable[..., Any], Any] = field(compare=False, repr=False)
    """The function; its arguments and keywords, with Shapes for tensors."""
    reads: dict[int, int] = field(compare=False, repr=False, default_factory=dict)
    """Storage -> bytes."""
    writes: dict[int, int] = field(compare=False, repr=False, default_factory=dict)
    backward: bool = False
    """Done by autograd's backward pass, and what recompute does there."""

    @property
    def key(self) -> str:
        return f"{self.name}({self.shapes})"


@dataclass(frozen=True, eq=False)
class Message:
    """What the rank sends or receives; equal ones are told apart."""

    dimension: str
    op: str
    bytes: int
    ranks: int
    """Among how many."""
    near: int
    """Of them, those of its node, itself too."""
    posted: bool
    """Whether the program goes on meanwhile and waits later."""
    reads: dict[int, int] = field(repr=False, default_factory=dict)
    backward: bool = False


class Wait(NamedTuple):
    """Until a message is there."""

    message: Message


Item = Operation | Message | Wait
Where = str | int | Action
"""A part of the step, by its name; of the passes a micro batch, by its place, or a pipeline's action."""


class Span(NamedTuple):
    """What is done in a part of the step."""

    where: Where
    items: list[Item]


class Work(TorchDispatchMode):
    """Notes while it is entered. `memory` has to be entered, too: it knows which storages are the same."""

    def __init__(self, memory: Memory, recorder: Recorder, gpus_per_node: int) -> None:
        super().__init__()
        self.memory, self.recorder, self.gpus_per_node = memory, recorder, gpus_per_node
        self.spans: list[Span] = [Span("", [])]
        self.posting = False
        self.known: dict[Any, Operation] = {}
        self.numbers: dict[int, int] = {}

    @contextmanager
    def at(self, where: Where) -> Iterator[None]:
        """What follows is in this part of the step, or, within "forward", in this pass."""
        outer = self.spans[-1].where
        self.spans.append(Span(where, []))
        with self if isinstance(where, str) else nullcontext():
            yield
        self.spans.append(Span(outer, []))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While messages that go both ways at once are known to be posted, and waited for."""
        batch = dist.batch_isend_irecv

        def posted(operations: list[Any]) -> list[Any]:
            items = self.spans[-1].items
            first, self.posting = len(items), True
            try:
                batch(operations)
            finally:
                self.posting = False
            return [_Posted(self, item) for item in items[first:] if isinstance(item, Message)]

        dist.batch_isend_irecv = posted  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.batch_isend_irecv = batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # which every operation is asked for; the other modes have nothing to say
        kwargs = kwargs or {}
        if not self.memory.looks_away and any(kind not in PLAIN for kind in types):
            return NotImplemented  # below it come the plain tensors that it is made of
        out = func(*args, **kwargs)
        if self.memory.looks_away or func.namespace not in ("aten", "titan", "fsdp", "c10d"):
            return out
        reads = {self._storage(t): t.numel() * t.itemsize for t in _tensors((*args, *kwargs.values()))}
        back = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        if func.namespace == "c10d":
            self.spans[-1].items.append(self._message(func.overloadpacket.__name__, args, reads, back))
        else:
            writes = {self._storage(t): t.numel() * t.itemsize for t in _tensors((out,))}
            own = self._operation(func, args, kwargs, out)
            self.spans[-1].items.append(replace(own, reads=reads, writes=writes, backward=back))
        return out

    def _message(self, name: str, args: Any, reads: dict[int, int], backward: bool) -> Message:
        op, dimension, size, group = self.recorder.read(name, args)
        members = dist.get_process_group_ranks(group)
        own = dist.get_rank() // self.gpus_per_node
        near = sum(member // self.gpus_per_node == own for member in members)
        return Message(dimension, op, size, len(members), near, self.posting, reads, backward)

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> Operation:
        key = (func, _mark(args), _mark(tuple(kwargs.values())), _mark(out))
        if key not in self.known:
            given: tuple[Any, Any] = tree_map(_shape, (args, kwargs))
            made = [_shape(t) for t in _tensors((out,))]
            shapes = ", ".join(said for said in map(_words, (*given[0], *given[1].values())) if said)
            self.known[key] = _described(func, shapes, given, made)
        return self.known[key]

    def _storage(self, tensor: Tensor) -> int:
        """A number for its storage, the same in all its life."""
        found = self.memory.known.get(tensor.untyped_storage()._cdata)
        return self.numbers.setdefault(id(found), len(self.numbers))


class _Posted(dist.Work):
    """A message on its way."""

    def __init__(self, work: Work, message: Message) -> None:
        super().__init__()
        self.work, self.message = work, message

    def wait(self, timeout: Any = None) -> bool:
        self.work.spans[-1].items.append(Wait(self.message))
        return True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among them, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mark(value: Any) -> Any:
    """Equal for what there is as much to do with."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    return value if isinstance(value, (int, torch.dtype)) else None


def _shape(value: Any) -> Any:
    return Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(value: Any) -> str:
    """An argument, as far as it says how much there is to do."""
    if isinstance(value, (Shape, int)):
        return str(value)
    if not isinstance(value, (list, tuple)) or not value:
        return ""
    if all(isinstance(item, Shape) for item in value):
        return f"{len(value)} x {_name(value[0].dtype)}[{sum(math.prod(item.size) for item in value)}]"
    return str(list(value)) if all(isinstance(item, int) for item in value) else ""


def _described(func: Any, shapes: str, given: tuple[Any, Any], made: list[Shape]) -> Operation:
    name = f"{func.namespace}.{func.overloadpacket.__name__}"
    floats = [item.dtype for item in (*_shapes(given), *made) if item.dtype.is_floating_point] or [torch.int64]
    free = func.is_view or name in NOTHING
    moved = 0 if free else _moved(name, func, given, made)
    flops = _flops(name, given[0])
    fusible = not flops and (free or name in FUSIBLE or any(tag in func.tags for tag in TAGS))
    dtype = _name(min(floats, key=lambda t: t.itemsize))
    return Operation(name, func._overloadname, shapes, dtype, flops, moved, free, fusible, (func, given))


def _shapes(tree: Any) -> list[Shape]:
    return [item for item in tree_iter(tree) if isinstance(item, Shape)]


def _moved(name: str, func: Any, given: tuple[Any, Any], made: list[Shape]) -> int:
    """What is read, and what is written. What is changed in place is both, where the old values matter."""
    if name == COPIES_IN:
        return 2 * sum(item.bytes for item in _shapes(given[0][0]))
    if name in LOOKUPS:  # of a table only the rows that are looked up
        return 2 * sum(item.bytes for item in made)
    places = [*enumerate(given[0]), *given[1].items()]
    arguments = {argument.name: place for place, argument in enumerate(func._schema.arguments)}
    total = 0
    for place, value in places:
        argument = func._schema.arguments[arguments[place] if isinstance(place, str) else place]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        matters = changed and not (argument.is_out or "copy_" in name or name.endswith(("_cat", COPIES_OUT, "fill_", "zero_")))
        total += sum(item.bytes for item in _shapes(value)) * (2 if matters else 1)
    new = not any(result.alias_info for result in func._schema.returns)
    return total + (sum(item.bytes for item in made) if new else 0)


def _flops(name: str, args: Any) -> int:
    if name in PRODUCTS:
        a, b = args[PRODUCTS[name] : PRODUCTS[name] + 2]
        return int(2 * math.prod(a.size) * b.size[-1])
    if name in ATTENTION:
        q, k, v = args[(back := ATTENTION[name]) : back + 3]
        causal = args[7] if back else args[4] if len(args) > 4 else False
        products = 3 * q.size[3] + 2 * v.size[3] if back else q.size[3] + v.size[3]
        return int(2 * math.prod(q.size[:3]) * k.size[2] * products // (2 if causal else 1))
    return 0


def as_compiled(config: Config, spans: list[Span]) -> list[Span]:
    """The spans as the config's compiler would have them, if it has one that makes kernels."""
    return fused(spans) if config.compile.enable and config.compile.backend == "inductor" else spans


def fused(spans: Iterable[Span]) -> list[Span]:
    """As compiled code would have it, in the passes."""
    spans = list(spans)
    last: dict[int, int] = {}
    for place, item in enumerate(item for span in spans for item in span.items):
        last.update(dict.fromkeys({} if isinstance(item, Wait) else item.reads, place))
    found, place = [], 0
    for span in spans:
        items: list[Item] = []
        run: list[Operation] = []
        for item in span.items:
            if isinstance(item, Operation) and item.fusible and not isinstance(span.where, str):
                run.append(item)
            else:
                items += [*_joined(run, last, place), item]
                run = []
            place += 1
        found.append(Span(span.where, items + _joined(run, last, place)))
    return found


def _joined(run: list[Operation], last: dict[int, int], end: int) -> list[Item]:
    """One operation of a run of them; end: where the first after them stands."""
    if all(operation.free for operation in run):
        return []
    read: dict[int, int] = {}
    made: dict[int, int] = {}
    for operation in run:
        before = operation.reads if not operation.free else {}
        read.update({storage: max(size, read.get(storage, 0)) for storage, size in before.items() if storage not in made})
        writes = operation.writes if not operation.free else {}  # a view's storage is its input's
        made.update({storage: max(size, made.get(storage, 0)) for storage, size in writes.items()})
    kept = {storage: size for storage, size in made.items() if last.get(storage, -1) >= end}
    moved = sum(read.values()) + sum(kept.values())
    most = max(run, key=lambda operation: operation.moved)
    return [replace(most, name="fused", shapes=f"{len(run)} operations", moved=moved, free=False, reads=read, writes=kept)]
