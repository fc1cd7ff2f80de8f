"""The pictures of the README and the lessons, made by the commands that they show.

    python docs/pictures.py            docs/console.svg and docs/loss.svg, the README's
    python docs/pictures.py lessons    docs/lessons/*.svg; or NAME ... for some of them, as in `pipeline`

The README's console is a real one: `titan train` runs in a pseudo-terminal of 96 columns, and what a terminal would show of its
output, colours and redrawn lines included, becomes text in an SVG.
"""

from __future__ import annotations

import html
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEBUG = "train_configs/debug.toml"
SHORT = "--training.steps=40 --validation.interval=0 --checkpoint.interval=8"
LESSONS = {
    "init": (
        f"train {DEBUG} {SHORT} --job.output=outputs/seed-1",
        f"train {DEBUG} {SHORT} --job.output=outputs/seed-1-tp-2 --parallel.tp=2",
        f"train {DEBUG} {SHORT} --job.output=outputs/seed-2 --training.seed=2",
        "plot outputs/seed-1 outputs/seed-1-tp-2 outputs/seed-2",
    ),
    "data": (f"draw mesh {DEBUG} --plan dp_replicate=2,dp_shard=2,cp=2",),
    "fsdp": (f"draw weights {DEBUG} --plan dp_shard=2,tp=2",),
    "fsdp-memory": (f"draw memory {DEBUG} --plan dp_shard=2",),
    "tensor": (f"draw weights {DEBUG} --plan tp=4",),
    "pipeline": (f"schedule {DEBUG} --plan pp=4 --training.micro_batch_size=2",),
    "pipeline-zbv": (f"schedule {DEBUG} --plan pp=4,pp_schedule=ZBVZeroBubble --training.micro_batch_size=2",),
    "context": (f"draw tokens {DEBUG} --plan cp=4",),
    "recompute-none": (f"draw memory {DEBUG} --plan recompute.mode=none",),
    "recompute-full": (f"draw memory {DEBUG} --plan recompute.mode=full",),
    "checkpoints": (
        f"train {DEBUG} {SHORT} --job.output=outputs/whole",
        f"train {DEBUG} {SHORT} --job.output=outputs/killed --job.fault=kill@21",
        f"train {DEBUG} {SHORT} --job.output=outputs/killed --parallel.tp=2",
        "plot outputs/whole outputs/killed",
    ),
    "precision": (
        f"train {DEBUG} {SHORT} --job.output=outputs/float32",
        f"train {DEBUG} {SHORT} --job.output=outputs/bfloat16 --precision.param=bfloat16",
        f"train {DEBUG} {SHORT} --job.output=outputs/float8 --precision.param=bfloat16 --precision.float8=tensorwise",
        "plot outputs/float32 outputs/bfloat16 outputs/float8",
    ),
}
"""Name of a picture -> the commands that make it; the last one draws."""
COLUMNS = 96
TITAN = [sys.executable, "-m", "titan.cli"]
GROUND, INK, LAMPS = "#1f2328", "#e6edf3", ("#ff5f57", "#febc2e", "#28c840")


def record(command: list[str], folder: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm-256color"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))  # as when it is activated
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        seen += part
    if process.wait() != 0:
        sys.exit(seen.decode(errors="replace"))
    return seen.decode(errors="replace")


def shown(text: str) -> list[str]:
    """The lines that stay on the screen: what a carriage return starts over is gone."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        last = re.split(r"\r|\x1b\[2K", line)[-1]
        if last.strip() or not line.strip():
            lines.append(last)
    return lines


def picture(lines: list[str], title: str) -> str:
    """An SVG of a terminal with these lines; escape codes for bold, dim and colour are kept."""
    height, spans = 18 * len(lines) + 52, []
    for row, line in enumerate(lines):
        style = ""
        pieces = re.split(r"\x1b\[([0-9;]*)m", line)
        spans.append(f'<text x="16" y="{50 + 18 * row}" xml:space="preserve">')
        for i, piece in enumerate(pieces):
            if i % 2:
                codes = piece.split(";")
                style = "b" if "1" in codes else "d" if "2" in codes else ""
            elif piece:
                body = html.escape(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece))
                spans.append(f'<tspan class="{style}">{body}</tspan>' if style else body)
        spans.append("</text>")
    width = 32 + int(COLUMNS * 7.83)
    lamps = "".join(f'<circle cx="{20 + 20 * i}" cy="18" r="6" fill="{c}"/>' for i, c in enumerate(LAMPS))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{html.escape(title)}</title>
<style>text {{ font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: {INK} }}
.b {{ font-weight: bold; fill: #ffffff }} .d {{ fill: #8b949e }}</style>
<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>
{lamps}
{"".join(spans)}
</svg>
"""


def lesson(name: str) -> None:
    """Draw one of LESSONS."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train_configs").symlink_to(ROOT / "train_configs")
        *before, last = LESSONS[name]
        for words in before:
            subprocess.run([*TITAN, *words.split()], cwd=folder, check="job.fault" not in words, stdout=subprocess.DEVNULL)
        out = ROOT / "docs" / "lessons" / f"{name}.svg"
        subprocess.run([*TITAN, *last.split(), "--out", str(out)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        print(f"written: {out.relative_to(ROOT)}")


def readme() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train_configs").symlink_to(ROOT / "train_configs")
        command = [*TITAN, "train", "train_configs/debug.toml"]
        lines = ["$ titan train train_configs/debug.toml", *shown(record(command, folder))]
        while not lines[-1].strip():
            lines.pop()
        (ROOT / "docs" / "console.svg").write_text(picture(lines, "titan train train_configs/debug.toml"))
        record([*TITAN, "plot", "outputs/debug", "--out", str(ROOT / "docs" / "loss.svg")], folder)


def main(names: list[str]) -> None:
    if unknown := set(names) - {"lessons", *LESSONS}:
        sys.exit(f"no picture {', '.join(unknown)}; there are {', '.join(LESSONS)}")
    for name in LESSONS if "lessons" in names else names:
        lesson(name)
    if not names:
        readme()


if __name__ == "__main__":
    main(sys.argv[1:])
