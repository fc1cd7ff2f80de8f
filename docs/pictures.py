"""The README's pictures, made by the commands they show: `python docs/pictures.py` writes docs/console.svg and docs/loss.svg.

The console is a real one: `titan train` runs in a pseudo-terminal of 96 columns, and what a terminal would show of its output,
colours and redrawn lines included, becomes text in an SVG. The curve is `titan plot`'s own.
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
COLUMNS = 96
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


def main() -> None:
    titan = [sys.executable, "-m", "titan.cli"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train_configs").symlink_to(ROOT / "train_configs")
        command = [*titan, "train", "train_configs/debug.toml"]
        lines = ["$ titan train train_configs/debug.toml", *shown(record(command, folder))]
        while not lines[-1].strip():
            lines.pop()
        (ROOT / "docs" / "console.svg").write_text(picture(lines, "titan train train_configs/debug.toml"))
        record([*titan, "plot", "outputs/debug", "--out", str(ROOT / "docs" / "loss.svg")], folder)


if __name__ == "__main__":
    main()
