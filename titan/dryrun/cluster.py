"""A cluster as `titan plan` knows it: train_configs/clusters/*.toml, every figure with its source. No torch.

Figures of data sheets are what nothing exceeds; what a program reaches of them is measured, not written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titan.arguments import did_you_mean
from titan.fields import Count, Positive, PositiveOrZero, Text
from titan.toml import ConfigError, load_tables

FOLDER = Path(__file__).parents[2] / "train_configs" / "clusters"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: Text
    """What it is called."""
    memory_gib: Positive
    """What PyTorch can have of its memory, in GiB."""
    reserved_gib: PositiveOrZero
    """What is taken before any tensor, in GiB: the driver's context, libraries, communicators' buffers."""
    bfloat16_tflops: Positive
    """Dense matrix products in bfloat16, 10^12 operations a second."""


@dataclass(frozen=True)
class Links:
    """Between GPUs; bandwidths are of one GPU in one direction, 10^9 bytes a second."""

    gpus_per_node: Count
    """GPUs that the faster links join."""
    inside_gb_per_second: Positive
    """Within a node."""
    between_gb_per_second: Positive
    """Between nodes."""


@dataclass(frozen=True)
class Cluster:
    """A file."""

    gpu: Gpu
    links: Links


def read_cluster(name: str) -> Cluster:
    """A cluster by its name, such as "h100", or a file's path. Raises ConfigError."""
    path = Path(name)
    if path.suffix != ".toml":
        path, known = FOLDER / f"{name}.toml", sorted(p.stem for p in FOLDER.glob("*.toml"))
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}, or write a .toml file's path"
            raise ConfigError(f"command line: --cluster: no cluster {name!r}{hint}")
    return Cluster(**load_tables(path, {"gpu": Gpu, "links": Links}))
