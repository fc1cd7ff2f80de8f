"""about.json: what a checkpoint's folder needs to be used on its own, away from the run that wrote it.

Which model its weights are of, and which tokenizer its numbers stand for. The tokenizer's own files lie beside it, so
`titan generate`, `titan export` and `checkpoint.load` ask for nothing but the folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from titan import zoo
from titan.checkpoint.manifest import CheckpointError, is_plain_name, read_format, write_json

FORMAT = "titan-about"
VERSION = 1
ABOUT = "about.json"


@dataclass(frozen=True)
class About:
    """The model and the tokenizer of a checkpoint."""

    model: str
    """The model's name in models/."""
    config: Any
    """Its Config."""
    tokenizer: str
    """"bytes", or the name of a file in the folder."""
    fingerprint: str
    """The tokenizer's."""
    document_start: int
    """The token that stands before a document's first: the one that ends a document, unless the model came with another."""


def write_about(folder: Path, about: About, files: dict[str, bytes]) -> None:
    """Write about.json and the tokenizer's files (name -> contents) into a folder that is being made."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    facts = {**asdict(about), "config": asdict(about.config)}
    write_json(folder / ABOUT, {"format": FORMAT, "version": VERSION, **facts})


def read_about(folder: Path) -> About:
    """What a committed folder says of itself. CheckpointError where it says nothing, or nothing that makes sense."""
    path = folder / ABOUT
    raw = read_format(path, FORMAT, VERSION)
    name, values, tokenizer = raw.get("model"), raw.get("config"), raw.get("tokenizer")
    if name not in zoo.names():
        raise CheckpointError(f"{path}: model is {name!r}; this titan has {', '.join(zoo.names())}")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: config is {values!r}, expected an object; use another checkpoint")
    if not (tokenizer == "bytes" or is_plain_name(tokenizer)):
        raise CheckpointError(f"{path}: tokenizer is {tokenizer!r}, neither bytes nor a plain file name; do not trust it")
    start, fingerprint = raw.get("document_start"), raw.get("fingerprint")
    if type(start) is not int or not isinstance(fingerprint, str):
        raise CheckpointError(f"{path}: document_start {start!r} and fingerprint {fingerprint!r} make no sense")
    kind = zoo.config_class(str(name))
    try:
        wrong = [f.name for f in fields(kind) if f.name in values and type(values[f.name]) is not type(f.default)]
        if wrong:
            raise TypeError(f"{wrong[0]} is {values[wrong[0]]!r}")
        config = kind(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config is not one of {name} ({error}); use the titan that wrote it") from error
    if not 0 <= start < getattr(config, "vocab_size", start + 1):
        raise CheckpointError(f"{path}: document_start is {start}, which is no token of the model; do not trust it")
    return About(str(name), config, str(tokenizer), fingerprint, start)


def tokenizer_spec(folder: Path, about: About) -> str:
    """What `load_tokenizer` takes for a checkpoint's own tokenizer."""
    return "bytes" if about.tokenizer == "bytes" else str(folder / about.tokenizer)


def refuse_another_model(folder: Path, model: str, config: Any, fingerprint: str) -> About:
    """What a checkpoint's folder says of itself; CheckpointError unless its weights are of this model and this tokenizer.

    Equal shapes do not make an equal model: with another rope_theta the same weights compute something else.
    """
    there = read_about(folder)
    if there.model != model:
        raise CheckpointError(f'checkpoint.load: {folder} holds a {there.model}: set model.name = "{there.model}"')
    saved, here = asdict(there.config), asdict(config)
    changed = [key for key in here if key not in zoo.no_matter(model) and saved[key] != here[key]]
    if changed:
        words = " ".join(f"--model.{key}={json.dumps(saved[key])}" for key in changed)
        said = ", ".join(f"{key} is {saved[key]} there and {here[key]} here" for key in changed)
        raise CheckpointError(f"checkpoint.load: {folder} is another model: {said}; set {words}")
    if there.fingerprint != fingerprint:
        raise CheckpointError(
            f"checkpoint.load: {folder} was trained with the tokenizer {there.fingerprint[:12]}, data.tokenizer is "
            f'{fingerprint[:12]}, whose tokens mean something else: set data.tokenizer = "{tokenizer_spec(folder, there)}"'
        )
    return there
