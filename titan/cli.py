"""The command line: `titan train | config | schema`. Nothing heavy is imported until the config has been checked.

Exit codes: 0 finished; 1 failed; 2 the config or the command line is wrong, said before any rank starts; 75 stopped on request
with everything saved: submit the same command again and it goes on.
"""

from __future__ import annotations

import difflib
import json
import sys

from titan import __version__, toml
from titan.check import problems
from titan.config import Config
from titan.status import Exit

USAGE = """titan: distributed pretraining in native PyTorch

  titan train CONFIG [--table.key=value ...]    check the config, start this machine's ranks, train; resumes by itself
  titan config CONFIG [--table.key=value ...]   check the config and print it with every default and its meaning
  titan schema                                  the JSON Schema of a config, for editors
  titan --version

CONFIG is a TOML file; train_configs/ has some to start from. Any key can be set on the command line:

  titan train train_configs/debug.toml --training.steps=20 --parallel.dp_replicate=2 --parallel.dp_shard=1

Ranks on this machine: NPROC=4 titan train ... (default: one a GPU, or 2 on a CPU). More machines: NNODES=2
RDZV_ENDPOINT=host:29400 on each of them, or run it under SLURM.

Exit codes: 0 finished, 1 failed, 2 the config or command line is wrong, 75 stopped on request with everything saved:
the same command goes on."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "config": show_config, "schema": show_schema}
    if not words or words[0] in ("-h", "--help", "help") or (words[0] in commands and {"-h", "--help"} & set(words[1:])):
        print(USAGE)
        return Exit.FINISHED if words else Exit.WRONG_CONFIG
    if words[0] == "--version":
        print(f"titan {__version__}")
        return 0
    if words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, 1)
        print(
            f"titan: no command {words[0]!r}; " + (f"did you mean {near[0]!r}?" if near else "see titan --help"),
            file=sys.stderr,
        )
        return Exit.WRONG_CONFIG
    try:
        return commands[words[0]](words[1:])
    except toml.ConfigError as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.WRONG_CONFIG


def read_config(words: list[str]) -> Config:
    """CONFIG and overrides from the command line, each field checked. Raises ConfigError."""
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1:
        found = f"found {len(paths)}: {', '.join(paths)}" if paths else "found none"
        raise toml.ConfigError(f"command line: expected one CONFIG, a TOML file, {found}; overrides are --table.key=value")
    return toml.load(paths[0], [word for word in words if word.startswith("-")])


def check_config(config: Config, world_size: int | None) -> Config:
    """The config, if it breaks no rule. Raises ConfigError with every rule that it breaks."""
    found_problems = problems(config, world_size)
    if found_problems:
        raise toml.ConfigError("\n".join(f"{config.source}: {p.key}: {p.sentence}" for p in found_problems))
    return config


def train(words: list[str]) -> int:
    """Check the config against this launch's world size, then start the ranks."""
    from titan import launch

    try:
        node = launch.local_world()
    except ValueError as error:
        raise toml.ConfigError(f"environment: {error}") from None
    config = check_config(read_config(words), node.world_size)
    try:
        launch.prepare_data(config, node)
    except (ValueError, FileNotFoundError) as error:
        raise toml.ConfigError(f"{config.source}: {error}") from None
    return launch.launch(config, words, node)


def show_config(words: list[str]) -> int:
    print(toml.dump(check_config(read_config(words), None)), end="")
    return 0


def show_schema(words: list[str]) -> int:
    if words:
        raise toml.ConfigError(f"command line: titan schema takes nothing, found {' '.join(words)}")
    print(json.dumps(toml.schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
