"""A model's name -> its folder in models/.

A model is a folder with config.py (Config, SIZES, NO_MATTER; no torch), model.py (class Transformer; plain torch), sharding.py
(sharding(config); no torch) and, where Hugging Face has its like, hf.py (names and config.json; no torch). Its folder's name
is its name: nothing is registered, and no model is imported unless asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from titan.sharding import Sharding

FOLDER = Path(__file__).parent / "models"


def names() -> list[str]:
    """Every model there is. Raises FileNotFoundError, saying what to do, where a copy has dropped the links."""
    if not FOLDER.is_dir():
        raise FileNotFoundError(
            f"{FOLDER} is missing: it is a symbolic link to ../models which this copy has dropped "
            "(an archive or a file system without links?). Clone with git, or run `ln -s ../models titan/models`, "
            "and the same for kernels."
        )
    return sorted(p.parent.name for p in FOLDER.glob("*/model.py"))


def sizes(name: str) -> dict[str, Any]:
    """The model's published sizes: name -> its Config."""
    table: dict[str, Any] = import_module(f"titan.models.{name}.config").SIZES
    return table


def config_class(name: str) -> type[Any]:
    """The model's Config."""
    found: type[Any] = import_module(f"titan.models.{name}.config").Config
    return found


def no_matter(name: str) -> tuple[str, ...]:
    """Fields of the model's Config that change nothing of what its weights compute: a checkpoint may have others."""
    fields: tuple[str, ...] = import_module(f"titan.models.{name}.config").NO_MATTER
    return fields


def sharding(name: str, config: Any) -> Sharding:
    """The model's sharding table."""
    table: Sharding = import_module(f"titan.models.{name}.sharding").sharding(config)
    return table


def hugging_face(name: str) -> ModuleType | None:
    """The model's hf.py (MODEL_TYPE, BASE, IGNORED, TRANSPOSED, tensor_names, copies, to_hf, from_hf), or None if it has none.

    tensor_names may give several of ours one name of theirs: they are joined there along their outputs, in this order.
    """
    if not (FOLDER / name / "hf.py").is_file():
        return None
    return import_module(f"titan.models.{name}.hf")


def make(name: str, config: Any) -> nn.Module:
    """The model itself, on the current default device. This imports torch."""
    model: nn.Module = import_module(f"titan.models.{name}.model").Transformer(config)
    return model
