"""Functions of a Triton file, imported when they are first called: without a GPU there need not be a Triton."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(where: str) -> Callable[..., Any]:
    """A function beside this file, by module and name, such as "rope_triton.turn"."""
    module, name = where.split(".")

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f".{module}", __package__), name)(*arguments)

    return call
