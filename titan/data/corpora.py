"""Corpora: where text comes from, before it is tokens.

A corpus is an ordered set of named files. A text file is one document. A file of rows holds many: JSONL, plain or packed by
gzip or zstd, Parquet, or the Arrow files that Hugging Face's `datasets` keeps; a key or column of it has the text. Two corpora
more need no download, because CPython carries them: `builtin:topics`, the language topics of pydoc (about 80 documents, half
a megabyte of English), and `builtin:stdlib`, the sources of the standard library (about 600 documents, 11 MB). Their texts
differ between Python versions, which the fingerprint shows.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")
COLUMNS = (".parquet", ".arrow")
ROWS = (*LINES, *COLUMNS)
SUFFIXES = (".txt", *ROWS)
CHOICES = (
    "a .txt, .jsonl (.gz, .zst) or .parquet file, a folder or a pattern of them, hf:NAME for a Hugging Face dataset, "
    "builtin:topics or builtin:stdlib"
)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
HUGGING_FACE = "hf:"


class CorpusError(ValueError):
    """There is no text where it was looked for. The message names the file or folder and says what would do."""


@dataclass(frozen=True)
class Corpus:
    """Texts and files by name, in order."""

    name: str
    texts: Mapping[str, str | Path]

    def size(self, name: str) -> int:
        """Size of a text's UTF-8, or of a file, in bytes, without reading it."""
        text = self.texts[name]
        return text.stat().st_size if isinstance(text, Path) else len(text.encode())

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


def is_rows(text: str | Path) -> bool:
    """Whether a corpus' text is a file of rows."""
    return isinstance(text, Path) and text.name.endswith(ROWS)


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern of files' names."""
    return glob.has_magic(path) and not os.path.exists(path)


def open_corpus(path: str, report: Callable[[str], None], choices: str = CHOICES) -> Corpus:
    """The text that a path or a builtin: names. Raises CorpusError, with the choices that there are."""
    if path == "builtin:topics":
        return topics(report)
    if path == "builtin:stdlib":
        return stdlib(Path(sysconfig.get_path("stdlib")), report)
    if path.startswith(HUGGING_FACE):
        return hugging_face(path.removeprefix(HUGGING_FACE), report)
    root = Path(path)
    if root.is_dir():
        files, others = _files_in(root)
        if files and others:
            report(f"data: of {path}, {others} other {'files are' if others > 1 else 'file is'} not read")
        if files:
            return Corpus(root.resolve().name, files)
        raise CorpusError(f"the folder {path!r} holds no file whose name ends in {', '.join(SUFFIXES)}; give {choices}")
    if is_pattern(path):
        matches = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]
        if unknown := [file for file in matches if not file.name.endswith(SUFFIXES)]:
            raise CorpusError(f"{path!r} matches {str(unknown[0])!r}, whose name ends in none of {', '.join(SUFFIXES)}")
        if matches:
            return Corpus(root.parent.name or "text", {file.as_posix(): file for file in matches})
        raise CorpusError(f"no file matches {path!r}; give {choices}")
    if root.is_file() and root.name.endswith(SUFFIXES):
        return Corpus(root.stem, {root.name: root})
    if root.exists():
        raise CorpusError(f"{path!r} has a name that ends in none of {', '.join(SUFFIXES)}; rename it, or give {choices}")
    raise CorpusError(f"there is no {path!r}; give {choices}")


def _files_in(root: Path) -> tuple[dict[str, str | Path], int]:
    """The files of text in a folder and those below it, linked ones too, by relative path; and how many others there are.

    Raises CorpusError for a folder that may not be read and a link that leads nowhere.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"the folder {error.filename} cannot be read ({error.strerror})") from error

    found: dict[str, str | Path] = {}
    others, seen = 0, set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:  # a link in a circle, or a second way here
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        for name in names:
            file = Path(folder, name)
            others += not name.endswith(SUFFIXES)
            if name.endswith(SUFFIXES):
                if not file.is_file():
                    raise CorpusError(f"{file} is no file, or a link that leads nowhere; take it out")
                found[file.relative_to(root).as_posix()] = file
    return dict(sorted(found.items())), others


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


def hugging_face(spec: str, report: Callable[[str], None]) -> Corpus:
    """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (default: train) of a dataset that `datasets` loads, from the hub, its cache or a
    folder: the Arrow files that it makes of it. It runs no code of the dataset's."""
    name, config, split, *more = [*spec.split(":"), "", ""]
    if any(more):
        raise CorpusError(f"hf:{spec}: expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"hf:{spec}: pip install 'titan-pretraining[hf]', which brings Hugging Face's datasets") from error
    report(f"data: loading the Hugging Face dataset {name}")
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises what its sources raise
        raise CorpusError(f"hf:{spec} cannot be loaded: {error}") from error
    files = [Path(file["filename"]) for file in data.cache_files]
    return Corpus(Path(name).name, {f"{number:05d}-{file.name}": file for number, file in enumerate(files)})
