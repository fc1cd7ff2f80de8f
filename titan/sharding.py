"""What a model says about its own shape, so that the parallel dimensions need not know it.

The table is data: dotted paths and globs of module names, and for each module a word for how tensor parallelism cuts it. One
entry, `block`, serves every technique that works layer by layer: FSDP, the pipeline's split, recompute and compile. A pattern
that matches no module is an error, so that a renamed layer is noticed at start and not in the memory.

The words, with T ranks of which each holds a part of every sequence between the blocks (the stream, [batch, seq / T, dim]):

    gather    collects the whole sequence before the module runs; the module's last matrix (row) cuts it again
    col       a matrix cut by outputs: each rank computes some of the columns
    heads     col, in whole query heads
    kv        col, in whole key and value heads; where T is larger than their number, ranks share a head
    row       a matrix cut by inputs: the ranks' outputs are added, and each keeps its part of the sequence
    seq       runs on this rank's part of the sequence with whole weights, such as a norm
    scatter   takes a whole sequence, keeps this rank's part of it, then runs with whole weights
    embed     a lookup table cut by rows (tokens): the ranks' outputs are added, each keeps its part of the sequence
    head      the output matrix cut by rows (tokens): the loss works on the cut logits

In `[parallel.sharding]` a TOML gives modules other words; `styles` says whether they fit together. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

Entry = TypeVar("Entry")
Style = Literal["gather", "col", "heads", "kv", "row", "seq", "scatter", "embed", "head"]
STYLES: tuple[str, ...] = get_args(Style)
BY_OUTPUT = ("col", "heads", "kv")


@dataclass(frozen=True)
class Sharding:
    """A model's table; each model folder has one in sharding.py."""

    block: str
    """Glob of the repeated blocks, such as "layers.*"."""
    blocks: int
    """How many there are."""
    width: int
    """Width of the hidden states between blocks, [batch, seq, width]."""
    vocabulary: int
    """Width of the logits."""
    heads: int
    """Query heads of a block."""
    kv_heads: int
    """Key and value heads of a block."""
    core: str
    """Glob of the attention cores, such as "layers.*.attention.core": q, k, v [batch, seq, heads, head_dim] in, values out."""
    before: tuple[str, ...]
    """Modules at the top that run before the blocks, such as the embedding: a pipeline's first stage has them."""
    after: tuple[str, ...]
    """Modules with parameters at the top that run after the blocks, such as norm and head: the last stage has them."""
    tensor: Mapping[str, str] = field(hash=False)
    """Glob of module names -> the word for how tensor parallelism treats them. Every module with parameters is in it."""
    matrices: Mapping[str, tuple[int, int]] = field(hash=False)
    """Glob of the blocks' linear layers -> their outputs and inputs."""
    kernels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Glob of modules that a kernel can stand in for -> which one: rms_norm, add_rms_norm, rope or swiglu."""
    loss: str = "loss"
    """The module that takes hidden states, the head's weight and labels: the summed loss, or without labels the logits."""
    tied: str = ""
    """The one of `before` whose weight is the head's, too."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Module names that a glob matches, part by part: `layers.*` is every layer, not what is inside one.

    Raises ValueError where nothing matches.
    """
    names = list(names)
    found = [name for name in names if _matches(pattern, name)]
    if not found:
        shown = ", ".join(n for n in names if n and n.count(".") <= 1)[:300]
        raise ValueError(f"the sharding table's pattern {pattern!r} matches no module; there are {shown}")
    return found


def replace_module(model: Any, name: str, module: Any) -> None:
    """Put a module in the place of the one with this dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(dict(model.named_modules())[parent], own, module)


def styles(table: Sharding, overrides: Mapping[str, str]) -> dict[str, str]:
    """Module name -> word, for the whole model, the overrides applied in their order.

    Raises ValueError, with a sentence, where an override matches nothing or the words do not fit together.
    """
    found = of_each_block(table, table.tensor)
    for pattern, style in overrides.items():
        if style not in STYLES:
            raise ValueError(f"{pattern!r}: no style {style!r}; there are {', '.join(STYLES)}")
        for name in matching(pattern, found):
            found[name] = style
    inside: dict[str, set[str]] = {}
    for name, style in found.items():
        path = name.split(".")
        for n in range(1, len(path)):
            inside.setdefault(".".join(path[:n]), set()).add(style)
    for name, style in found.items():
        _refuse_misfit(name, style, found, inside.get(name, set()), table)
    return found


def key_of(kernel: str) -> str:
    """The key of [kernels] for one of `Sharding.kernels`: those of a norm with and without an addition have one."""
    return kernel.removeprefix("add_")


def of_each_block(table: Sharding, by_glob: Mapping[str, Entry]) -> dict[str, Entry]:
    """What a table says by glob, by the modules' names: an entry of the repeated block once for each block."""
    found: dict[str, Entry] = {}
    for pattern, entry in by_glob.items():
        inside = _matches(table.block, ".".join(pattern.split(".")[: table.block.count(".") + 1]))
        for number in range(table.blocks) if inside else (0,):
            found[pattern.replace("*", str(number), 1) if inside else pattern] = entry
    return found


def _refuse_misfit(name: str, style: str, all_styles: Mapping[str, str], inside: set[str], table: Sharding) -> None:
    """ValueError unless a module's word fits those of the modules around it and inside."""
    path = name.split(".")
    around = [all_styles.get(".".join(path[:n])) for n in range(1, len(path))]
    if style in (*BY_OUTPUT, "row") and "gather" not in around:
        raise ValueError(f"{name!r} cannot be {style!r}: no module around it is 'gather'; write 'seq' to leave it whole")
    if style not in (*BY_OUTPUT, "row") and "gather" in around:
        raise ValueError(f"{name!r} cannot be {style!r}: the module around it is 'gather'; make that 'seq', too")
    if style == "gather" and ("row" not in inside or not set(BY_OUTPUT) & inside):
        raise ValueError(f"{name!r} cannot be 'gather': of the modules inside, one has to be 'col' and one 'row'")
    if style in ("embed", "scatter") and name not in table.before:
        raise ValueError(f"{name!r} cannot be {style!r}: that is for {', '.join(table.before)}")
    if name in table.before and style not in ("embed", "scatter"):
        raise ValueError(f"{name!r} cannot be {style!r}: it takes whole sequences; write 'embed' or 'scatter'")
    if style == "head" and name not in table.after:
        raise ValueError(f"{name!r} cannot be 'head': that is for the output matrix")


def _matches(pattern: str, name: str) -> bool:
    parts, path = pattern.split("."), name.split(".")
    return len(parts) == len(path) and all(fnmatchcase(n, p) for n, p in zip(path, parts, strict=True))
