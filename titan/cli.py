"""The command line: `titan COMMAND ...`. A command is a file of titan/commands and nothing is imported for another's sake.

Exit codes: 0 finished; 1 failed; 2 the config or the command line is wrong, said before any rank starts; 75 stopped on request
with everything saved: submit the same command again and it goes on; 130 interrupted before there was anything to save.

Almost everything is imported inside main's `try`, so that a Ctrl-C while Python still imports is as quiet as a later one.
"""

from __future__ import annotations

import os
import sys

COMMANDS = {
    "train": "check a config, start this machine's ranks, train or resume",
    "config": "check a config, print it with every default and its meaning",
    "verify": "show that a parallel plan computes what one process computes",
    "trace": "show what the ranks say to each other in a step, and the formulas for it",
    "plan": "what a job would take of GPUs that are not here: memory, messages",
    "explain": "a plan as a page that teaches: who holds what, memory, traffic, time",
    "schedule": "draw a pipeline: what each rank does when, ideal and measured",
    "draw": "pictures of a plan: its mesh, cut weights, tokens, memory over a step",
    "kernels": "compile a config's GPU kernels, without a GPU; what each takes of it",
    "profile": "where a step's time went, from the traces that a run wrote",
    "plot": "draw the loss curves of runs, in the terminal and as a picture",
    "generate": "let a trained model go on from a text",
    "checkpoint": "list a run's checkpoints; check one against its checksums",
    "export": "a checkpoint as a Hugging Face folder",
    "import": "a Hugging Face folder as a checkpoint to start from",
    "data": "train a tokenizer; make token shards ahead of a run; look into data",
    "schema": "the JSON Schema of a config, for editors",
}

HELP = ("-h", "--help")

USAGE = """titan: distributed pretraining in native PyTorch

{commands}

titan COMMAND --help tells more, with examples. To begin:

  titan train train_configs/debug.toml
  titan train train_configs/debug.toml --training.steps=20
  titan plot outputs/debug
  titan generate outputs/debug "The with statement"

Exit codes: 0 finished, 1 failed, 2 the config or the command line is wrong, 75 stopped on request with everything saved:
the same command goes on, 130 interrupted."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        return _answer(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # train has its own way; the others leave nothing half done under its name
        print("\ntitan: interrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    except BrokenPipeError:  # the reader, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE


def _answer(words: list[str]) -> int:
    from importlib import import_module

    from titan import __version__
    from titan.arguments import did_you_mean
    from titan.status import Exit, Failed
    from titan.toml import ConfigError

    if not words or words[0] in (*HELP, "help"):
        print(folded(USAGE.format(commands="\n".join(f"  titan {name:10} {line}" for name, line in COMMANDS.items()))))
        return Exit.FINISHED if words else Exit.WRONG_CONFIG
    if words[0] == "--version":
        print(f"titan {__version__}")
        return Exit.FINISHED
    try:
        if words[0] not in COMMANDS:
            hint = did_you_mean(words[0], COMMANDS) or "; see titan --help"
            raise ConfigError(f"no command {words[0]!r}{hint}")
        command = import_module(f"titan.commands.{words[0]}")
        rest = words[1:]
        known = getattr(command, "ACTIONS", rest[:1])  # there is no help for what there is not
        if set(HELP) & set(rest) and (rest[0].startswith("-") or rest[0] in known):
            print(folded(command.__doc__ or ""))
            return Exit.FINISHED
        code: int = command.run(rest)
        return code
    except ConfigError as error:
        print("\n".join(f"titan: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return Exit.WRONG_CONFIG
    except Failed as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.FAILED


def folded(text: str) -> str:
    """A help text for this terminal: its paragraphs refilled, its indented lines as they are."""
    from textwrap import fill

    from titan.terminal import columns

    width = min(100, columns(sys.stdout, 100))
    blocks = text.strip().split("\n\n")
    return "\n\n".join(b if b.startswith((" ", "titan ")) or "\n " in b else fill(b, width) for b in blocks)


if __name__ == "__main__":
    sys.exit(main())
