"""A cluster as `titan plan` knows it: train_configs/clusters/*.toml, every figure with its source. No torch.

Figures of data sheets are what nothing exceeds; `reach` is the share of them that programs get. A file that
`titan plan --calibrate` wrote has, besides, what was measured: seconds of single operations and messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from titan.arguments import did_you_mean
from titan.fields import Count, Positive, PositiveOrZero, PositiveShare, Text
from titan.files import write_atomically
from titan.toml import ConfigError, keys, load_tables, to_toml

DATA_SHEETS = ("a100", "h100", "h200", "b200")
FOLDER = Path(__file__).parents[2] / "train_configs" / "clusters"


@dataclass(frozen=True)
class Gpu:
    """One GPU, or what stands for it."""

    name: Text
    """What it is called."""
    memory_gib: Positive
    """What PyTorch can have of its memory, in GiB."""
    reserved_gib: PositiveOrZero
    """What is taken before any tensor, in GiB: the driver's context, libraries, communicators' buffers."""
    float32_tflops: Positive
    """Dense matrix products in float32, 10^12 operations a second."""
    tf32_tflops: Positive
    """With precision.tf32."""
    bfloat16_tflops: Positive
    """In bfloat16."""
    float8_tflops: Positive
    """With precision.float8; where the device has no such products, what they are done in instead."""
    reach: PositiveShare
    """The share of these that large products get."""
    attention_reach: PositiveShare
    """And fused attention."""
    memory_gb_per_second: Positive
    """Of its memory, 10^9 bytes a second, read or written."""
    memory_reach: PositiveShare
    """The share of it that elementwise operations get."""
    launch_microseconds: PositiveOrZero
    """What the host takes to start an operation."""
    asynchronous: bool
    """Whether the device works while the host goes on, and messages travel while it computes."""


@dataclass(frozen=True)
class Links:
    """Between GPUs; bandwidths are of one GPU in one direction, 10^9 bytes a second."""

    gpus_per_node: Count
    """GPUs that the faster links join."""
    inside_gb_per_second: Positive
    """Within a node."""
    between_gb_per_second: Positive
    """Between nodes."""
    reach: PositiveShare
    """The share of these that large messages get."""
    inside_microseconds: PositiveOrZero
    """Until a message's first byte is there, within a node."""
    between_microseconds: PositiveOrZero
    """Between nodes."""


@dataclass(frozen=True)
class Measured:
    """What was measured of single operations and messages."""

    operations: dict[str, list[float]] = field(default_factory=dict)
    """Operation with its shapes -> floating-point operations, bytes moved, seconds."""
    messages: dict[str, list[float]] = field(default_factory=dict)
    """Operation with ranks and bytes -> ranks, bytes, seconds."""


@dataclass(frozen=True)
class Cluster:
    """A file."""

    gpu: Gpu
    links: Links
    measured: Measured = field(default_factory=Measured)


def place(name: str) -> Path:
    """A cluster's file, by its name or path."""
    return Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"


def read_cluster(name: str) -> Cluster:
    """A cluster by its name, such as "h100", or a file's path. Raises ConfigError."""
    path = place(name)
    if not name.endswith(".toml"):
        known = sorted(p.stem for p in FOLDER.glob("*.toml"))
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}, or write a .toml file's path"
            hint = "; titan plan --calibrate writes it" if name == "local" else hint
            raise ConfigError(f"command line: --cluster: no cluster {name!r}{hint}")
    cluster = Cluster(**load_tables(path, {"gpu": Gpu, "links": Links, "measured": Measured}))
    for table in ("operations", "messages"):
        for key, values in getattr(cluster.measured, table).items():
            if len(values) != 3 or min(values) < 0 or not values[2]:
                said = "expected three numbers, 0 or more, the seconds last and above 0"
                raise ConfigError(f"{path}: measured.{table}: {key!r}: {said}")
    return cluster


def joined(old: Cluster, new: Cluster) -> Cluster:
    """What was measured before and now, of the same kind of device; of another one only what is new."""
    if old.gpu.name != new.gpu.name:
        return new
    operations = old.measured.operations | new.measured.operations
    links = new.links if new.measured.messages else old.links
    return replace(new, links=links, measured=Measured(operations, old.measured.messages | new.measured.messages))


def write(path: Path, cluster: Cluster) -> None:
    """As a file."""
    write_atomically(path, "\n".join(_lines(cluster)) + "\n")


def _lines(cluster: Cluster) -> Iterator[str]:
    yield "# Measured by `titan plan CONFIG --calibrate`, which adds to it where the device is the same."
    yield f"# PyTorch {version('torch')}, {time.strftime('%Y-%m-%d')}."
    for table in ("gpu", "links"):
        yield f"\n[{table}]"
        own = getattr(cluster, table)
        for key in keys(type(own)):
            value = getattr(own, key)
            yield f"{key} = {to_toml(float(f'{value:.4g}') if isinstance(value, float) else value)}"
    for table, said in (("operations", "flops, bytes moved, seconds"), ("messages", "ranks, bytes, seconds")):
        yield f"\n[measured.{table}]  # {said}"
        for key, values in getattr(cluster.measured, table).items():
            yield f"{to_toml(key)} = [{values[0]:.0f}, {values[1]:.0f}, {values[2]:.4g}]"
