"""docs/config.md: the config's dataclasses as a page to read. No torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, get_args

from titan import zoo
from titan.config import Model
from titan.toml import expected, field_docs, keys, table_kinds, to_toml, unwrap

HEAD = """# Config reference

Written by `titan schema --markdown` from the config's dataclasses; do not edit it. `titan config CONFIG` prints the same for
one config, with its values. On the command line every key is `--table.key=value`; a key that is unset is `none` there.
Editors complete and check keys by [config.schema.json](config.schema.json), which a TOML's first line names."""


def markdown() -> str:
    """The config reference: each table's keys, what they take, their defaults and what they mean."""
    lines = [HEAD]
    for name, kind in table_kinds().items():
        docs, defaults = field_docs(kind), vars(kind())
        rows = [(f"`{key}`", expected(hint), _default(defaults[key]), docs.get(key, "")) for key, hint in keys(kind).items()]
        lines += ["", f"## [{name}]", "", _escaped(inspect.getdoc(kind) or ""), ""]
        lines += _grid(("key", "takes", "default", "meaning"), rows)
        for key, hint in keys(kind).items():
            if is_dataclass(entry := (*get_args(unwrap(hint)[0]), None)[0]):
                lines += _entries(f"{name}.{key}", entry)
        if kind is Model:
            for model in zoo.names():
                lines += _model(model)
    return "\n".join(lines) + "\n"


def _entries(name: str, kind: Any) -> list[str]:
    """The keys of a list's tables."""
    docs, defaults = field_docs(kind), vars(kind())
    rows = [(f"`{key}`", expected(hint), _default(defaults[key]), docs.get(key, "")) for key, hint in keys(kind).items()]
    said = f"On the command line all at once: `--{name}='[{{name = \"a\", path = \"...\"}}, ...]'`."
    head = ["", f"### [[{name}]]", "", f"{_escaped(inspect.getdoc(kind) or '')} {said}", ""]
    return head + _grid(("key", "takes", "default", "meaning"), rows)


def _model(name: str) -> list[str]:
    """The fields of a model's Config, and their values by size."""
    kind, sizes = zoo.config_class(name), zoo.sizes(name)
    docs = field_docs(kind)
    meanings = [(f"`{key}`", expected(hint), docs.get(key, "")) for key, hint in keys(kind).items()]
    values = [(f"`{key}`", *(to_toml(getattr(config, key)) for config in sizes.values())) for key in keys(kind)]
    intro = "[model] also takes the fields of this model's Config; the size gives their defaults:"
    return [
        "",
        f'### name = "{name}"',
        "",
        intro,
        "",
        *_grid(("key", "takes", "meaning"), meanings),
        "",
        *_grid(("size", *sizes), values),
    ]


def _default(value: Any) -> str:
    return "unset" if value is None else f"`{to_toml(value)}`"


def _grid(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table. Cells in backticks stay as they are."""
    cells = [tuple(cell if cell.startswith("`") else _escaped(cell) for cell in row) for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *cells)]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))
