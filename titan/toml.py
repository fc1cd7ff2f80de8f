"""Strict TOML and command-line overrides into a Config; every mistake is a ConfigError that says what to write instead.

A TOML file is read by tomli, then held against the dataclasses of `titan.config`: unknown tables and keys (with the
nearest name), wrong types, numbers that are not finite and values that fail their field's check are refused with the
file, the line and the key. An override `--table.key=value` goes the same way, after the file. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli

from titan import zoo
from titan.config import Config, Model
from titan.fields import Check

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
LISTS = {int: "whole numbers", float: "numbers", bool: "true or false", str: 'texts in quotes, such as ["The", "def"]'}


class ConfigError(Exception):
    """The config or the command line is wrong. The message is the whole answer to the user: exit code 2."""


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply `--table.key=value` overrides; the result is checked field by field."""
    path = Path(path)
    tables, places = _tables(path, list(table_kinds()))
    for override in overrides or []:
        table, key, raw = _split_override(override)
        tables.setdefault(table, {})[key] = _Raw(raw)
        places = {name: place for name, place in places.items() if not name.startswith((f"{table}.{key}.", f"{table}.{key}["))}
        places[f"{table}.{key}"] = places[table] = "command line"
    return _resolve(tables, path, places)


def load_tables(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Another TOML file, where every key without a default has to be: table -> its dataclass, checked field by field."""
    tables, places = _tables(path, list(kinds))
    _require_known(tables, list(kinds), places)
    found = {}
    for name, kind in kinds.items():
        own = tables.get(name, {})
        _require_known_keys(kind, name, own, places)
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        for key, hint in keys(kind).items():
            if key not in own and key in needed:
                raise ConfigError(f"{places.get(name, path)}: {name}.{key}: missing; expected {expected(hint)}")
        found[name] = _resolve_table(kind, name, own, places)
    return found


def _tables(path: Path, known: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """A file's tables, and where each table and key stands: file and line."""
    text = read_text(path)
    try:
        tables: dict[str, Any] = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        twice = _twice(text) if re.search("overwrite|declare|twice", str(error), re.IGNORECASE) else None
        raise ConfigError(f"{path}: {twice or f'not valid TOML: {error}'}") from None
    places = {"": str(path)}
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}:{_line(text, '', name)}: {name}: stands outside a table; keys belong in one of {_list(known)}"
            )
        places[name] = f"{path}:{_line(text, name, None)}"
        for key, item in value.items():
            line = _line(text, name, key)
            places[f"{name}.{key}"] = f"{path}:{line}"
            entries = item if isinstance(item, dict) else {}
            places.update({f"{name}.{key}.{entry}": f"{path}:{_line(text, f'{name}.{key}', entry, line)}" for entry in entries})
            for number, table in enumerate(item if isinstance(item, list) else []):
                for entry in table if isinstance(table, dict) else ():
                    found = _line(text, f"{name}.{key}", entry, line, number)
                    places[f"{name}.{key}[{number}].{entry}"] = f"{path}:{found}"
    return tables, places


def read_text(path: Path) -> str:
    """The file's text. Missing files, folders, a byte order mark and bytes that are not UTF-8 are named as such."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        files = [file for folder in (Path("train_configs"), path.parent) for file in sorted(folder.glob("*.toml"))]
        known = {file.stem: file for file in files if file.name != "pyproject.toml"}
        near = difflib.get_close_matches(path.stem, known, 1)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: starts with a byte order mark; save it as plain UTF-8, without BOM")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8") from None


def dump(config: Config, describe: bool = True) -> str:
    """The resolved config as TOML, with every default and, if asked, each field's documentation above it."""
    lines: list[str] = []
    for name in table_kinds():
        value = getattr(config, name)
        lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
        lines += _dump_fields(value, describe)
        if name == "model":
            lines += _dump_fields(value.config, describe)
    return "\n".join(lines) + "\n"


def field_docs(kind: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[statement.target.id] = inspect.cleandoc(str(after.value.value))  # type: ignore[union-attr]
    return docs


def table_kinds() -> dict[str, Any]:
    """The tables of a TOML: name -> dataclass."""
    return {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}


def keys(kind: Any) -> dict[str, Any]:
    """The keys of a table: name -> type hint with its check."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if "table" not in f.metadata}


def unwrap(hint: Any) -> tuple[Any, Check | None]:
    """The plain type and the check in a key's type hint; that the key may be left unset (None) is its default's affair."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    return get_args(hint) if get_origin(hint) is Annotated else (hint, None)


def expected(hint: Any) -> str:
    """What a key takes, in words."""
    kind, check = unwrap(hint)
    if check is not None:
        return check.expected
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(kind))
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        return "tables with " + ", ".join(keys(get_args(kind)[0]))
    if get_origin(kind) is list:
        return f"a list of {LISTS[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return f"a table, {{\"name\" = value}}, where a value is {expected(get_args(kind)[1])}"
    return NAMES[kind]


class _Raw(str):
    """A value from the command line: text whose reading depends on the field's type."""


def _resolve(tables: Mapping[str, dict[str, Any]], path: Path, places: Mapping[str, str]) -> Config:
    kinds = table_kinds()
    _require_known(tables, list(kinds), places)
    resolved = {
        name: _resolve_table(kind, name, tables.get(name, {}), places) for name, kind in kinds.items() if kind is not Model
    }
    resolved["model"] = _resolve_model(tables.get("model", {}), places)
    if not resolved["job"].output:
        resolved["job"] = replace(resolved["job"], output=f"outputs/{path.stem}")
    return Config(source=str(path), **resolved)


def _require_known(tables: Mapping[str, Any], known: list[str], places: Mapping[str, str]) -> None:
    for name in tables:
        if name not in known:
            raise ConfigError(f"{places[name]}: [{name}]: unknown table; {_nearest(name, known, 'the tables are')}")


def _require_known_keys(kind: Any, table: str, values: Iterable[str], places: Mapping[str, str]) -> None:
    known = list(keys(kind))
    for key in values:
        if key not in known:
            where = places[f"{table}.{key}"]
            raise ConfigError(f"{where}: {table}.{key}: unknown key; {_nearest(key, known, f'[{table}] has')}")


def _resolve_table(kind: Any, table: str, values: Mapping[str, Any], places: Mapping[str, str], base: Any = None) -> Any:
    known = keys(kind)
    _require_known_keys(kind, table, values, places)
    read = {key: _read(value, known[key], f"{table}.{key}", places) for key, value in values.items()}
    return replace(base, **read) if base is not None else kind(**read)


def _resolve_model(values: Mapping[str, Any], places: Mapping[str, str]) -> Model:
    """[model]: name and size choose the model's Config; every other key changes one of its fields."""
    own = {key: values[key] for key in ("name", "size") if key in values}
    choice: Model = _resolve_table(Model, "model", own, places)
    try:
        names = zoo.names()
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    if choice.name not in names:
        raise ConfigError(
            f"{places['model.name']}: model.name: no model {choice.name!r}; {_nearest(choice.name, names, 'there is')}"
        )
    sizes = zoo.sizes(choice.name)
    if choice.size not in sizes:
        where = places.get("model.size", places.get("model.name", places[""]))
        nearest = _nearest(choice.size, list(sizes), "the sizes are")
        raise ConfigError(f"{where}: model.size: {choice.name} has no size {choice.size!r}; {nearest}")
    base = sizes[choice.size]
    rest = {key: value for key, value in values.items() if key not in own}
    try:
        return replace(choice, config=_resolve_table(type(base), "model", rest, places, base))
    except ValueError as error:  # the model's own Config checks what its fields must satisfy together
        where = places.get("model", places[""])
        raise ConfigError(f"{where}: model: {error}") from None


def _read(value: Any, hint: Any, key: str, places: Mapping[str, str]) -> Any:
    """One value against one type hint: the value as the field's type, or a ConfigError that says what was expected."""
    where = f"{places[key]}: {key}"
    if isinstance(value, _Raw) and value == "none" and type(None) in get_args(hint):
        return None
    kind, check = unwrap(hint)
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        return _read_tables(value, get_args(kind)[0], key, places)
    shown = repr(str(value)) if isinstance(value, _Raw) else to_toml(value)
    refusal = f"{where}: expected {expected(hint)}, not {shown}"
    if get_origin(kind) in (list, dict):
        refusal += _meant(value, kind, check, key)
    if isinstance(value, _Raw):
        value = _read_raw(value, kind, refusal)
    if get_origin(kind) is dict and isinstance(value, dict):
        value = {name: _read_entry(item, kind, key, name, places) for name, item in value.items()}
    value = _typed(value, kind, refusal)
    if check is not None and not check.holds(value):
        raise ConfigError(refusal)
    return value


def _read_tables(value: Any, kind: Any, key: str, places: Mapping[str, str]) -> list[Any]:
    """A list of tables, [[table.key]], or on the command line as a list of inline tables."""
    refusal = f"{places[key]}: {key}: expected [[{key}]] tables, or [{{{next(iter(keys(kind)))} = ...}}, ...]"
    if isinstance(value, _Raw):
        value = _read_raw(value, list[kind], refusal)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(refusal)
    found = []
    for number, item in enumerate(value):
        own = {f"{key}.{name}": places.get(f"{key}[{number}].{name}", places[key]) for name in item}
        found.append(_resolve_table(kind, key, item, own))
    return found


def _read_entry(item: Any, kind: Any, key: str, name: str, places: Mapping[str, str]) -> Any:
    """One value of a table that is itself a key's value."""
    full = f"{key}.{to_toml(name)}"
    where = places.get(f"{key}.{name}", places[key])
    if isinstance(item, dict):
        hint = f"a name with dots stands in quotes: {to_toml(f'{name}.{next(iter(item), name)}')}"
        raise ConfigError(f"{where}: {full}: expected {expected(get_args(kind)[1])}, not a table; {hint}")
    return _read(item, get_args(kind)[1], full, {full: where})


def _meant(value: Any, kind: Any, check: Check | None, key: str) -> str:
    """The nearest list or table that a key takes; from the command line, in quotes of which a shell leaves the inner ones."""
    meant: Any = None
    if kind == list[str]:
        meant = _meant_texts(value, check)
    elif isinstance(value, _Raw):
        pairs = [part.split("=") for part in value.strip(" {}").split(",")] if get_origin(kind) is dict else []
        if get_origin(kind) is list:
            with suppress(ConfigError):
                items = _typed(_read_raw(_Raw(f"[{value.strip(' []')}]"), kind, ""), kind, "")
                meant = items if check is None or check.holds(items) else None
        elif all(len(pair) == 2 for pair in pairs):
            meant = {name.strip(" \"'"): word.strip(" \"'") for name, word in pairs}
    if not meant:
        return ""
    spelled = to_toml(meant)
    quotes = ", all quotes included" if '"' in spelled else ""
    return "; did you mean " + (f"'--{key}={spelled}'{quotes}?" if isinstance(value, _Raw) else f"{spelled}?")


def _meant_texts(value: Any, check: Check | None) -> list[str]:
    """The nearest texts that a list may hold, which its check names, or any where it names none."""
    rules = check.keywords["items"] if check else {}
    known: list[str] = next((rule["enum"] for rule in (rules, *rules.get("anyOf", ())) if "enum" in rule), [])
    if isinstance(value, _Raw):
        inside = value.strip().removeprefix("[").removesuffix("]")
        items = [item.strip(" \"'") for item in inside.split(",")] if known or inside != value else [str(value)]
    else:
        items = [item for item in value if isinstance(item, str)] if isinstance(value, list) else [str(value)]
    if check and known:
        right = [check.holds([item]) for item in items]
        nearest = [[item] if ok else difflib.get_close_matches(item, known, 1) for item, ok in zip(items, right, strict=True)]
        items = [near[0] for near in nearest if near]
    return list(dict.fromkeys(items))


def _read_raw(raw: _Raw, hint: Any, refusal: str) -> Any:
    """Text from the command line: as it stands for texts, by TOML's rules for everything else."""
    if hint is str or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str)):
        return str(raw)
    try:
        return tomli.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        raise ConfigError(refusal) from None


def _typed(value: Any, hint: Any, refusal: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(a) for a in get_args(hint)], 1)
            raise ConfigError(refusal + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(refusal)
        return [_typed(item, get_args(hint)[0], refusal) for item in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(refusal)
        return value
    if hint is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(refusal)
    return value


def _split_override(text: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"--([A-Za-z_]\w*)\.([A-Za-z_]\w*)=(.*)", text, re.DOTALL)
    if match is None:
        hint = "; put = between key and value" if re.fullmatch(r"--[A-Za-z_]\w*\.[A-Za-z_]\w*", text) else ""
        raise ConfigError(f"command line: {text!r} is not an override: expected --table.key=value{hint}")
    return match[1], match[2], match[3]


def _nearest(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {_list(known)}"


def _list(names: list[str]) -> str:
    return ", ".join(names)


def _line(text: str, table: str, key: str | None, hidden: int = 1, number: int = 0) -> int:
    """Line of a key in its table, or of a table's head; `hidden` where an unusual spelling hides it. For messages only.

    number: of several tables with this name, [[table]], which one.
    """
    inside, before = table == "", 0
    wanted = table if key is None else f"{table}.{key}"
    for at, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[+\s*([\w.\-\"']+)\s*\]+", line)
        if head:
            name = re.sub("[\"']", "", head[1])
            if name == wanted:
                return at
            inside = name == table and before == number
            before += name == table
        elif inside and key is not None and key in line and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return at
    return hidden


def _twice(text: str) -> str | None:
    """Words for the first key or table that a TOML text holds twice, which tomli reports without its name."""
    seen: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[([\w.\-]+)\]", line)
        if entry := re.match(r"\s*\[\[([\w.\-]+)\]\]", line):
            table = f"{entry[1]}[{number}]"  # another table each time
            continue
        key = re.match(r"""\s*([\w\-]+|"[^"]*"|'[^']*')\s*=""", line)
        table = head[1] if head else table
        name = f"{table}.{key[1]}".strip(".") if key else table
        if (head or key) and seen.setdefault(name, number) != number:
            what = name if key else f"[{name}]"
            return f"line {number}: {what} stands twice, first on line {seen[name]}; keep one"
    return None


def to_toml(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        body = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in value.replace("\\", "\\\\").replace('"', '\\"')
        )
        return f'"{body}"'
    if isinstance(value, list):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    if is_dataclass(value):
        value = {key: getattr(value, key) for key in keys(type(value))}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(str(key))} = {to_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _dump_fields(value: Any, describe: bool) -> Iterator[str]:
    docs = field_docs(type(value)) if describe else {}
    for key in keys(type(value)):
        for line in docs.get(key, "").splitlines():
            yield f"# {line}"
        item = getattr(value, key)
        yield f"# {key} = (unset)" if item is None else f"{key} = {to_toml(item)}"
