"""The command line: `titan COMMAND ...`. A command is a file of titan/commands and nothing is imported for another's sake.

Exit codes: 0 finished; 1 failed; 2 the config or the command line is wrong, said before any rank starts; 75 stopped on request
with everything saved: submit the same command again and it goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from textwrap import fill

from titan import __version__
from titan.arguments import did_you_mean
from titan.status import Exit
from titan.terminal import columns
from titan.toml import ConfigError

COMMANDS = {
    "train": "check a config, start this machine's ranks, train or resume",
    "config": "check a config, print it with every default and its meaning",
    "plot": "draw the loss curves of runs, in the terminal and as a picture",
    "generate": "let a trained model go on from a text",
    "export": "a checkpoint as a Hugging Face folder",
    "import": "a Hugging Face folder as a checkpoint to start from",
    "data": "train a tokenizer; make token shards ahead of a run",
    "schema": "the JSON Schema of a config, for editors",
}

USAGE = """titan: distributed pretraining in native PyTorch

{commands}

titan COMMAND --help tells more, with examples. To begin:

  titan train train_configs/debug.toml
  titan train train_configs/debug.toml --training.steps=20
  titan plot outputs/debug
  titan generate outputs/debug "The with statement"

Exit codes: 0 finished, 1 failed, 2 the config or the command line is wrong, 75 stopped on request with everything saved:
the same command goes on."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(folded(USAGE.format(commands="\n".join(f"  titan {name:9} {line}" for name, line in COMMANDS.items()))))
        return Exit.FINISHED if words else Exit.WRONG_CONFIG
    if words[0] == "--version":
        print(f"titan {__version__}")
        return Exit.FINISHED
    try:
        if words[0] not in COMMANDS:
            hint = did_you_mean(words[0], COMMANDS) or "; see titan --help"
            raise ConfigError(f"no command {words[0]!r}{hint}")
        command = import_module(f"titan.commands.{words[0]}")
        if {"-h", "--help"} & set(words[1:]):
            print(folded(command.__doc__ or ""))
            return Exit.FINISHED
        code: int = command.run(words[1:])
        return code
    except ConfigError as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.WRONG_CONFIG
    except KeyboardInterrupt:  # train has its own way; the others leave nothing half done under its name
        print("\ntitan: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def folded(text: str) -> str:
    """A help text for this terminal: its paragraphs refilled, its indented lines as they are."""
    width = min(100, columns(sys.stdout, 100))
    blocks = text.strip().split("\n\n")
    return "\n\n".join(b if b.startswith((" ", "titan ")) or "\n " in b else fill(b, width) for b in blocks)


if __name__ == "__main__":
    sys.exit(main())
