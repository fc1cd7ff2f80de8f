"""about.json: what a checkpoint's folder needs to be used on its own, away from the run that wrote it.

Which model its weights are of, and which tokenizer its numbers stand for. The tokenizer's own files lie beside it, so
`titan generate`, `titan export` and `checkpoint.load` ask for nothing but the folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan import zoo
from titan.checkpoint.commit import CheckpointError, is_plain_name, read_format, write_json

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
    name, fields, tokenizer = raw.get("model"), raw.get("config"), raw.get("tokenizer")
    if name not in zoo.names():
        raise CheckpointError(f"{path}: model is {name!r}; this titan has {', '.join(zoo.names())}")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: config is {fields!r}, expected an object; use another checkpoint")
    if not (tokenizer == "bytes" or is_plain_name(tokenizer)):
        raise CheckpointError(f"{path}: tokenizer is {tokenizer!r}, neither bytes nor a plain file name; do not trust it")
    start, fingerprint = raw.get("document_start"), raw.get("fingerprint")
    if type(start) is not int or not isinstance(fingerprint, str):
        raise CheckpointError(f"{path}: document_start {start!r} and fingerprint {fingerprint!r} make no sense")
    try:
        config = zoo.config_class(str(name))(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config is not one of {name} ({error}); use the titan that wrote it") from error
    return About(str(name), config, str(tokenizer), fingerprint, start)


def tokenizer_spec(folder: Path, about: About) -> str:
    """What `load_tokenizer` takes for a checkpoint's own tokenizer."""
    return "bytes" if about.tokenizer == "bytes" else str(folder / about.tokenizer)


def refuse_another_tokenizer(folder: Path, fingerprint: str) -> None:
    """CheckpointError where a checkpoint's weights were trained with another tokenizer than this one."""
    there = read_about(folder)
    if there.fingerprint != fingerprint:
        raise CheckpointError(
            f"checkpoint.load: {folder} was trained with the tokenizer {there.fingerprint[:12]}, data.tokenizer is "
            f'{fingerprint[:12]}, whose tokens mean something else: set data.tokenizer = "{tokenizer_spec(folder, there)}"'
        )
