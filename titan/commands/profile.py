"""titan profile OUTPUT [--out FILE.svg]

Where a step's time went, from the traces that a run wrote: `--profiling.start=10` has step 10 written. OUTPUT is the run's
folder, or one trace (profile/step-00000010-rank-0.json.gz, or any of PyTorch's that titan train wrote). A line a kind: matrix
products, attention, norms and pointwise work, the loss, the optimizer, communication that nothing was computed beside,
waiting for data, and what is left, when nothing ran at all. Communication hidden behind computation takes no time of its own.

  --out FILE.svg  the bars as a picture, too

  titan train train_configs/debug.toml --profiling.start=5 --training.steps=6 --job.output=outputs/looked
  titan profile outputs/looked
  titan profile outputs/looked --out step.svg

The traces themselves open in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import sys
from pathlib import Path

from titan.arguments import Parser
from titan.drawing.profile import svg
from titan.files import write_atomically
from titan.metrics.profile import KINDS, Shares, read, shares
from titan.status import Exit
from titan.terminal import columns, plural
from titan.toml import ConfigError


def run(words: list[str]) -> int:
    """Print the bars of each trace, write the picture."""
    parser = Parser("profile")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    if given.out is not None and (given.out.suffix != ".svg" or not given.out.parent.is_dir()):
        raise ConfigError(f"command line: --out {given.out}: name an .svg in a folder that exists")
    found: dict[str, Shares] = {}
    for path in traces(given.output):
        try:
            found[path.name.removesuffix(".json.gz")] = shares(read(path))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for name, where in found.items():
        print("\n".join(bars(name, where, columns(sys.stdout, 80))), end="\n\n")
    if given.out is not None:
        write_atomically(given.out, svg(found))
        print(f"written: {given.out}")
    return Exit.FINISHED


def traces(output: Path) -> list[Path]:
    """The traces of a run, or the one that is named."""
    if output.is_file():
        return [output]
    found = sorted((output / "profile").glob("step-*.json.gz"))
    if not found:
        hint = "train with --profiling.start=10 to have step 10 written" if output.is_dir() else "there is no such folder"
        raise ConfigError(f"command line: no profile in {output}: {hint}")
    return found


def bars(name: str, where: Shares, width: int) -> list[str]:
    """A trace's lines."""
    lines = [f"{name}: {where.seconds * 1e3:,.1f} ms a step, {plural(where.steps, 'step')}"]
    room = max(10, min(40, width - 34))
    for kind in KINDS:
        share = where.kinds[kind] / where.seconds
        lines.append(f"{kind:13} {where.kinds[kind] * 1e3:9,.1f} ms {share:4.0%}  {'#' * round(share * room)}".rstrip())
    if where.hidden:
        lines.append(f"besides, {where.hidden * 1e3:,.1f} ms of communication were hidden behind computation")
    return lines
