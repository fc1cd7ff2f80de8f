"""Which token files a path holds, and which split they are.

    a folder of  *.tokens                titan's own, train-* and validation-*
                 *.ds with *.ds.index    datatrove's
                 *.bin with *.idx        Megatron's; also the common part of the two names
                 *.bin                   llm.c's and nanoGPT's
    or one such file

A file of another program belongs to the split that its name speaks of.
"""

from __future__ import annotations

import re
from pathlib import Path

from titan.data.corpora import SUFFIXES
from titan.data.foreign import Unsaid
from titan.data.shards import Shard, ShardError, TokenShard

KINDS = {".tokens": "titan's token shards", ".ds": "datatrove's .ds", ".idx": "Megatron's .bin and .idx", ".bin": "flat .bin"}
HELD_OUT = re.compile(r"(^|[^a-z])(val|valid|validation|dev)([^a-z]|$)", re.IGNORECASE)
UNFINISHED = ".unfinished"
"""What the name of a folder ends in while it is prepared."""
LEFT_OUT = re.compile(r"(^|[^a-z])test([^a-z]|$)", re.IGNORECASE)


def token_files(path: Path) -> list[Path]:
    """The files of tokens that a path names, of one kind, by name; none where it names something else.

    Raises ShardError where there are several kinds, or where their preparation was not finished.
    """
    if path.name.endswith(UNFINISHED):
        raise ShardError(f"{path}: is a preparation that was not finished; give the text again, and it goes on")
    prefix = path.with_name(path.name + ".idx")
    if path.is_file() or prefix.is_file():
        file = path if path.is_file() else prefix
        found = {_kind(file): [file.with_suffix(".bin") if file.suffix == ".idx" else file]} if file.suffix in KINDS else {}
    else:
        found = {}
        for file in sorted(file for suffix in KINDS for file in path.glob(f"*{suffix}") if not file.name.startswith(".")):
            empty = file.suffix == ".ds" and not file.stat().st_size  # of a datatrove task without documents
            if not empty and (_kind(file) != ".idx" or file.suffix == ".bin"):
                found.setdefault(_kind(file), []).append(file)
        if ".tokens" in found:
            found = {".tokens": found[".tokens"]}
        elif list(found) == [".bin"] and any(file.name.endswith(SUFFIXES) for file in path.iterdir()):
            found = {}  # text, and a .bin of who knows what
    if len(found) > 1:
        kinds = " and ".join(KINDS[kind] for kind in sorted(found))
        raise ShardError(f"{path}: holds {kinds}; put each kind in a folder of its own")
    return next(iter(found.values()), [])


def _kind(file: Path) -> str:
    """A file's kind; Megatron's .bin is told by its .idx."""
    return ".idx" if file.suffix == ".bin" and file.with_suffix(".idx").exists() else file.suffix


def split_files(path: Path, split: str) -> tuple[list[Path], bool]:
    """The files of a split, and whether their names tell the splits apart. Raises ShardError where there is none."""
    files = token_files(path)
    if not files or files[0].suffix == ".tokens":
        files = [file for file in files if file.name.startswith(f"{split}-")]
        if not files:
            raise ShardError(f"{path}: no {split}-*.tokens here, so there is no {split} data")
        return files, True
    if len(files) > 1:
        files = [file for file in files if not LEFT_OUT.search(file.stem)] or files
    held_out = [file for file in files if HELD_OUT.search(file.stem)]
    rest = [file for file in files if file not in held_out]
    if not held_out or not rest:
        return files, False
    return (held_out if split == "validation" else rest), True


def open_file(file: Path, unsaid: Unsaid | None) -> Shard:
    """A file of `token_files`. Raises ShardError where it is not what it should be."""
    if file.suffix == ".tokens":
        return TokenShard(file)
    if unsaid is None:
        raise ShardError(f"{file}: does not say which tokenizer made it")
    kind = _kind(file)
    if kind == ".ds":
        from titan.data.datatrove import DatatroveFile

        return DatatroveFile(file, unsaid)
    if kind == ".idx":
        from titan.data.megatron import MegatronFile

        return MegatronFile(file, unsaid)
    from titan.data.flat import FlatFile

    return FlatFile(file, unsaid)
