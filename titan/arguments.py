"""The command line's words: CONFIG with its overrides, and, for the other commands, a parser that keeps our manners.

Every mistake is a ConfigError, which is exit code 2 and one sentence. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from titan import toml
from titan.check import problems
from titan.config import Config


def read_config(words: list[str]) -> Config:
    """CONFIG and overrides from the command line, each field checked. Raises ConfigError."""
    for word, after in pairwise(words):
        if re.fullmatch(r"--\w+\.\w+", word) and not after.startswith("--") and not after.endswith(".toml"):
            raise toml.ConfigError(f"command line: {word} {after}: an override has an = and no space: {word}={after}")
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1:
        found = f"found {len(paths)}: {', '.join(paths)}" if paths else "found none"
        raise toml.ConfigError(f"command line: expected one CONFIG, a TOML file, {found}; overrides are --table.key=value")
    return toml.load(paths[0], [word for word in words if word.startswith("-")])


def check_config(config: Config, world_size: int | None, words: Iterable[str] = ()) -> Config:
    """The config, if it breaks no rule. Raises ConfigError with every rule that it breaks. words: the command line."""
    found_problems = problems(config, world_size)
    if found_problems:
        raise toml.ConfigError("\n".join(blame(config, words, f"{p.key}: {p.sentence}") for p in found_problems))
    return config


def blame(config: Config, words: Iterable[str], refusal: str) -> str:
    """A refusal, "table.key: why", with where the key, or one of the table's, was set: on the command line, or in the TOML."""
    key = refusal.split(":")[0]
    there = any(word.startswith((f"--{key}=", f"--{key}.")) for word in words)
    return f"{'command line' if there else config.source}: {refusal}"


def require_new(out: Path) -> None:
    """ConfigError where there is something at `out` already, or where nothing can be made."""
    if os.path.lexists(out):
        raise toml.ConfigError(f"command line: {out} is there already, and is left as it is: name another, or move it away")
    if why := unwritable(out.parent):
        raise toml.ConfigError(f"command line: {out} cannot be made: {why}")


def unwritable(folder: Path) -> str:
    """Why a folder, or the nearest one above it that is there, cannot be written; "" where it can. It leaves nothing behind."""
    import tempfile

    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        return f"{nearest} cannot be written ({error.strerror})"
    return ""


class Parser(argparse.ArgumentParser):
    """argparse whose help is a command's docstring and whose errors are ConfigErrors.

    A command adds its arguments and calls `parse_args`. `name` is the command: "export hf".
    """

    def __init__(self, name: str) -> None:
        super().__init__(prog=f"titan {name}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        command = " ".join(self.prog.split()[:2])
        raise toml.ConfigError(f"command line: {self.prog}: {message}; see {command} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # argparse's own names an unknown option and stops
        found, unknown = self.parse_known_args(args, namespace)
        self._refuse(unknown)
        return found

    def parse_with_config(self, words: list[str]) -> tuple[Any, list[str]]:
        """The command's own options, and what is for `read_config`: CONFIG and its overrides."""
        found, rest = self.parse_known_args(words)
        self._refuse([word for word in rest if word.startswith("-") and "." not in word.split("=")[0]])
        return found, rest

    def _refuse(self, unknown: list[str]) -> None:
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown {unknown[0]!r}" + did_you_mean(unknown[0].split("=")[0], known))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """"; did you mean 'x'?", or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
