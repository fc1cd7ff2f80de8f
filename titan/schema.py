"""The config's dataclasses as JSON Schema, for editors. No torch.

An editor that knows the schema completes keys, shows what they mean and refuses what `titan train` would refuse, while one
types. What it cannot say stays with titan: rules over several keys (`titan.check`), whole numbers written as 1.0, nan.
Each key's type is its annotation, its bounds are its check's keywords, its meaning is the string under the field.

[model] holds the fields of the chosen model's Config, so its keys depend on the value of one of them: for each model there is
an `if` on model.name whose `then` lists all the keys that [model] then has. It is draft 7, the newest that every editor reads.
"""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

from titan import zoo
from titan.config import Model
from titan.toml import field_docs, keys, table_kinds, to_toml, unwrap

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def schema() -> dict[str, Any]:
    """JSON Schema of a TOML config."""
    tables = {name: _table(kind) for name, kind in table_kinds().items()}
    tables["model"]["properties"]["name"]["enum"] = zoo.names()
    del tables["model"]["additionalProperties"]
    tables["model"]["allOf"] = [_model(name, tables["model"]["properties"]) for name in zoo.names()]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of titan train",
        "type": "object",
        "properties": tables,
        "additionalProperties": False,
    }


def _table(kind: Any) -> dict[str, Any]:
    docs, defaults = field_docs(kind), vars(kind())
    properties = {}
    for key, hint in keys(kind).items():
        default = {} if defaults[key] is None else {"default": defaults[key]}
        properties[key] = type_schema(hint) | {"description": docs.get(key, "")} | default
    return {
        "type": "object",
        "description": inspect.getdoc(kind),
        "properties": properties,
        "additionalProperties": False,
    }


def _model(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """What [model] holds where its name is `name`: name, size and the fields of that model's Config."""
    kind, sizes = zoo.config_class(name), zoo.sizes(name)
    docs = field_docs(kind)
    properties = {"name": True, "size": own["size"] | {"enum": list(sizes)}}
    for key, hint in keys(kind).items():
        values = ", ".join(f"{size} {to_toml(getattr(config, key))}" for size, config in sizes.items())
        properties[key] = type_schema(hint) | {"description": f"{docs.get(key, '')}\nBy size: {values}."}
    chosen = {"properties": {"name": {"const": name}}}
    # A condition on a key that is left out holds: right for the default model alone.
    condition = chosen if name == Model.name else chosen | {"required": ["name"]}
    return {"if": condition, "then": {"properties": properties, "additionalProperties": False}}


def type_schema(hint: Any) -> dict[str, Any]:
    """JSON Schema of one key's type hint, its check's keywords in it."""
    kind, check = unwrap(hint)
    keywords = check.keywords if check is not None else {}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        return {"type": "array", "items": _table(get_args(kind)[0])}
    if get_origin(kind) is list:
        items = type_schema(get_args(kind)[0]) | keywords.get("items", {})
        return {"type": "array"} | keywords | {"items": items}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": type_schema(get_args(kind)[1])} | keywords
    return {"type": TYPES[kind]} | keywords
