"""Corpora: where text comes from, before it is tokens.

A corpus is an ordered set of named documents. Users bring a .txt file or a folder of them. Two more need no download,
because CPython carries them: `builtin:topics`, the language topics of pydoc (about 80 documents, half a megabyte of
English), and `builtin:stdlib`, the sources of the standard library (about 600 documents, 11 MB). Their texts
differ between Python versions, which the fingerprint shows.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHOICES = "a .txt file, a folder of .txt files, builtin:topics or builtin:stdlib"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


class CorpusError(ValueError):
    """There is no text where it was looked for. The message names the file or folder and says what would do."""


@dataclass(frozen=True)
class Corpus:
    """Documents by name, in order; each a text, or the file that holds it."""

    name: str
    texts: Mapping[str, str | Path]

    def size(self, name: str) -> int:
        """Size of a document's UTF-8 text in bytes, without reading its file."""
        text = self.texts[name]
        return text.stat().st_size if isinstance(text, Path) else len(text.encode())

    def documents(self, names: list[str]) -> Iterator[tuple[str, str]]:
        """(name, text) of the named documents. Raises CorpusError for a file that is not UTF-8 or cannot be read."""
        for name in names:
            text = self.texts[name]
            try:
                yield name, text.read_bytes().decode() if isinstance(text, Path) else text
            except UnicodeDecodeError as error:
                raise CorpusError(f"{text} is not UTF-8 text ({error}); convert it or take it out") from error
            except OSError as error:
                raise CorpusError(f"{text} cannot be read ({error.strerror})") from error

    def fingerprint(self) -> str:
        """Hex SHA-256 of names and contents; of a file, its size and time of change stand for the content."""
        digest = hashlib.sha256()
        for name, text in self.texts.items():
            if isinstance(text, Path):
                content = f"{text.stat().st_size} {text.stat().st_mtime_ns}"
            else:
                content = hashlib.sha256(text.encode()).hexdigest()
            digest.update(f"{len(name.encode())} {name} {content}\n".encode())
        return digest.hexdigest()


def open_corpus(path: str, report: Callable[[str], None], choices: str = CHOICES) -> Corpus:
    """The text that a path or a builtin: names. Raises CorpusError, with the choices that there are."""
    if path == "builtin:topics":
        return topics(report)
    if path == "builtin:stdlib":
        return stdlib(Path(sysconfig.get_path("stdlib")), report)
    root = Path(path)
    if root.is_dir():
        files = sorted((file.relative_to(root).as_posix(), file) for file in root.rglob("*.txt") if file.is_file())
        if files:
            return Corpus(root.resolve().name, dict(files))
        raise CorpusError(f"the folder {path!r} holds no file whose name ends in .txt; give {choices}")
    if root.is_file() and root.suffix == ".txt":
        return Corpus(root.stem, {root.name: root})
    if root.exists():
        raise CorpusError(f"{path!r} has a name that does not end in .txt; rename it if it is text, or give {choices}")
    raise CorpusError(f"there is no {path!r}; give {choices}")


def topics(report: Callable[[str], None]) -> Corpus:
    """pydoc's language topics; where this Python was stripped of them, the standard library's sources."""
    try:
        texts: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        report("this Python lacks pydoc_data.topics, reading builtin:stdlib instead of builtin:topics")
        return stdlib(Path(sysconfig.get_path("stdlib")), report)
    return Corpus("topics", dict(sorted(texts.items())))


def stdlib(root: Path, report: Callable[[str], None]) -> Corpus:
    """The .py files under `root` by relative path, without tests and installed packages; those not in UTF-8 are left out."""
    texts: dict[str, str | Path] = {}
    skipped = 0
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - LEFT_OUT
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        try:
            texts[name] = file.read_bytes().decode()
        except UnicodeDecodeError:
            skipped += 1
    if skipped:
        report(f"builtin:stdlib: {skipped} files that are not UTF-8 were left out")
    if not texts:
        raise CorpusError(f"this Python carries no sources in {root}; give a .txt file or a folder of them")
    return Corpus("stdlib", texts)
