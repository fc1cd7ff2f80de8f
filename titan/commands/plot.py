"""titan plot OUTPUT [OUTPUT ...] [--out FILE.svg] [--x AXIS] [--y FIGURE] [--log]

Draws the curves of one run or of several side by side, in the terminal and, with --out, as an SVG that a README or a browser
shows. OUTPUT is a run's folder (job.output); it is read while the run goes on, too. Below stands a table of the runs.

  --x AXIS        step, tokens, or time (spent in training, without pauses)
  --y FIGURE      loss (with validation as dots), validation_loss, grad_norm,
                  lr, tokens_per_second or mfu
  --log           a logarithmic scale for FIGURE
  --out FILE.svg  the picture as a file, too

  titan plot outputs/debug
  titan plot outputs/debug outputs/warm outputs/cold --out loss.svg
  titan plot outputs/debug --x tokens --log
  titan plot outputs/debug --y grad_norm

Colours only on a terminal, and not where NO_COLOR is set. COLUMNS and LINES set the size.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import fill

from titan.arguments import Parser
from titan.files import write_atomically
from titan.metrics.console import count
from titan.metrics.history import number, numbers, read_history
from titan.metrics.plot import X, Y, picture, shown_value
from titan.metrics.plot_svg import svg
from titan.metrics.plot_text import text
from titan.terminal import asked, columns, has_colours, lines, showable
from titan.toml import ConfigError

HEADS = ("run", "steps", "tokens", "loss", "best validation", "tokens/s")
SMALL = 20  # lines of a terminal in which none is to spare


def run(words: list[str]) -> int:
    """Print the picture and the table, write the SVG."""
    parser = Parser("plot")
    parser.add_argument("outputs", nargs="+", metavar="OUTPUT")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--x", choices=X, default="step")
    parser.add_argument("--y", choices=Y, default="loss")
    parser.add_argument("--log", action="store_true")
    given = parser.parse_args(words)
    if given.out is not None and given.out.suffix != ".svg":
        raise ConfigError(f"command line: --out {given.out}: what is written is SVG; name it {given.out.with_suffix('.svg')}")
    if given.out is not None and not given.out.parent.is_dir():
        raise ConfigError(f"command line: --out {given.out}: there is no folder {given.out.parent}")
    files = metrics_files(given.outputs)
    try:
        drawn = picture(files, given.x, given.y, given.log)
    except ValueError as error:
        raise ConfigError(f"{error}{'; none above 0, which --log needs' if given.log else ''}") from None
    if given.out is not None:
        try:
            write_atomically(given.out, svg(drawn))
        except OSError as error:
            raise ConfigError(f"command line: --out {given.out}: {error.strerror}") from None
    width = columns(sys.stdout, otherwise=asked("COLUMNS") or 80)
    height = lines(sys.stdout) or asked("LINES")
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    # A run's name is its folder's, which may hold anything.
    named = [replace(curve, name=showable(curve.name, sys.stdout)) for curve in drawn.curves]
    below = table(files, width)
    if height is None or height >= SMALL:
        below.insert(0, "")
    if given.out is not None:
        below += ["", str(given.out)]
    room = height - len(below) - 1 if height is not None else None  # the shell's prompt needs a line
    print(text(replace(drawn, curves=named), width, room, has_colours(sys.stdout), unicode), end="")
    print(showable("\n".join(below), sys.stdout))
    return 0


def metrics_files(outputs: list[str]) -> dict[str, Path]:
    """A run's name -> its file of metrics: the folder's name, or its path where two have one name. Raises ConfigError."""
    files: dict[str, Path] = {}
    paths = [Path(output) for output in outputs]
    folders = list(dict.fromkeys(path.parent if path.name == "metrics.jsonl" else path for path in paths))
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        file = folder / "metrics.jsonl"
        if not file.is_file():
            runs = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
            hint = f"; did you mean {runs[0]!r}?" if runs else "; expected a run's folder (job.output)"
            raise ConfigError(f"command line: titan plot: {file} does not exist{hint}")
        files[name if names.count(name) == 1 else str(folder)] = file
    return files


def table(files: dict[str, Path], width: int) -> list[str]:
    """The runs' figures in rows; where there is no room for the rightmost columns, what they are is said below."""
    rows = [HEADS]
    for name, file in files.items():
        records = read_history(file)
        losses, speeds = numbers(records, "loss"), numbers(records, "tokens_per_second")
        best = min(numbers(records, "validation_loss"), default=None)
        rows.append(
            (
                name,
                f"{records[-1]['step']:,}" if records else "",
                count(number(records[-1], "tokens") or 0) if records else "",
                shown_value(losses[-1]) if losses else "",
                shown_value(best) if best is not None else "",
                count(statistics.median(speeds)) if speeds else "",
            )
        )
    sizes = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    sizes[0] = min(sizes[0], max(8, width - 40))
    shown = 1
    while shown < len(HEADS) and sum(sizes[: shown + 1]) + 2 * shown <= width:
        shown += 1
    said = [
        "  ".join([f"{row[0][: sizes[0]]:{sizes[0]}}", *(f"{row[i]:>{sizes[i]}}" for i in range(1, shown))]).rstrip()
        for row in rows
    ]
    return said + (fill(f"not shown: {', '.join(HEADS[shown:])}", width).split("\n") if shown < len(HEADS) else [])
