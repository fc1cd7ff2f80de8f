"""A pipeline's grid: a row a rank, time from left to right, a bar for each pass of a micro batch through a stage.

In the picture a colour tells the pass, and a number the micro batch; later stages of a rank are paler. In the terminal F3 is a
forward pass of micro batch 3, B a backward pass, I and W its two halves where they are apart; small letters are a rank's later
stages, and dots stand for idling.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from titan.drawing.svg import BLUE, GREEN, ORANGE, WIDTH, YELLOW, box, keys, label, page, wrapped
from titan.parallel.timeline import Action, Times, bubble

COLOURS = {"F": BLUE, "B": ORANGE, "I": YELLOW, "W": GREEN}
MEANINGS = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}
TERMINAL = {"F": 32, "B": 202, "I": 214, "W": 35}
ROW, LEFT, RIGHT = 26, 64, 84


@dataclass(frozen=True)
class Panel:
    """One way in which the passes lie in time."""

    title: str
    note: str
    times: Times
    owners: Sequence[int]
    held: Sequence[int]
    """Of each rank, the most stages' activations that it holds at once."""

    @property
    def begin(self) -> float:
        return min(start for start, _ in self.times.values())

    @property
    def span(self) -> float:
        return max(end for _, end in self.times.values()) - self.begin

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they idle."""
        return bubble({action: (a - self.begin, b - self.begin) for action, (a, b) in self.times.items()}, self.owners)

    def rows(self) -> list[list[tuple[Action, float, float]]]:
        """For each rank its passes by time, as shares of the whole time."""
        found: list[list[tuple[Action, float, float]]] = [[] for _ in sorted(set(self.owners))]
        for action, (start, end) in sorted(self.times.items(), key=lambda item: item[1]):
            found[self.owners[action.stage]].append((action, (start - self.begin) / self.span, (end - self.begin) / self.span))
        return found

    def later(self, action: Action) -> bool:
        """Whether a pass is of another stage than its rank's first."""
        return action.stage != self.owners.index(self.owners[action.stage])


def svg(title: str, panels: Sequence[Panel]) -> str:
    """All panels, one below the other."""
    body: list[str] = []
    kinds = {action.kind for panel in panels for action in panel.times}
    key, y = keys(16, 54, [*((COLOURS[kind], MEANINGS[kind]) for kind in "FBIW" if kind in kinds), ("", "idle")])
    body += key
    scale = WIDTH - LEFT - RIGHT
    for panel in panels:
        y += 22
        body += [label(16, y, panel.title), label(WIDTH - 16, y, f"bubble {panel.bubble:.1%}", "end")]
        note, y = wrapped(16, y + 19, panel.note)
        body += note
        y -= 8
        for rank, (row, held) in enumerate(zip(panel.rows(), panel.held, strict=True)):
            body.append(label(16, y + 17, f"rank {rank}", "small"))
            body.append(box(LEFT, y, scale, ROW - 4, kind="none"))
            for action, start, end in row:
                x, width = LEFT + start * scale, (end - start) * scale
                hint = f"{MEANINGS[action.kind]}, stage {action.stage}, micro batch {action.micro}"
                pale = ' opacity="0.62"' if panel.later(action) else ""
                body.append(f"<g{pale}>{box(x, y, width, ROW - 4, COLOURS[action.kind], 'gap', hint)}</g>")
                if width > 8 * len(str(action.micro)) + 1:
                    kind = "dark" if action.kind == "I" or panel.later(action) else "in"
                    body.append(label(x + width / 2, y + 15, str(action.micro), kind))
            body.append(label(WIDTH - RIGHT + 8, y + 16, f"holds {held}", "small"))
            y += ROW
        y += 6
    shares = "; ".join(f"{panel.title}: bubble {panel.bubble:.1%}" for panel in panels)
    return page(y + 14, title, shares, body)


def text(panel: Panel, width: int, colours: bool, unicode: bool) -> str:
    """A panel for a terminal of so many columns, in several bands where it is longer. Lines end in a newline."""
    rows, head = panel.rows(), len(f"rank {len(panel.held) - 1}  ")
    digits = len(str(max(action.micro for action in panel.times)))
    forward = statistics.median(end - start for row in rows for action, start, end in row if action.kind == "F")
    columns = round((digits + 1) / forward)  # most passes have room for their letter and number
    room = max(width - head - len("  holds 99"), 20)
    columns *= max(1, room // columns)
    lines = [_line(panel, row, columns, "·" if unicode else ".") for row in rows]
    shown = []
    for first in range(0, columns, room):
        last = first + room >= columns
        for rank, (cells, held) in enumerate(zip(lines, panel.held, strict=True)):
            end = f"  holds {held}" if last else ""
            shown.append(f"{f'rank {rank}':{head}}{_painted(cells[first : first + room], colours)}{end}")
        if not last:
            shown.append("")
    return "\n".join(shown) + "\n"


def _line(panel: Panel, row: list[tuple[Action, float, float]], columns: int, idle: str) -> list[tuple[str, str]]:
    """A rank's columns, each a character and the pass's letter."""
    cells = [(idle, "")] * columns
    for action, start, end in row:
        first = min(round(start * columns), columns - 1)
        last = max(round(end * columns), first + 1)  # a short pass is there, too
        letter = action.kind.lower() if panel.later(action) else action.kind
        name = f"{letter}{action.micro}"
        words = (name if len(name) <= last - first else letter).ljust(last - first, "-")
        for i, sign in enumerate(words[: last - first]):
            cells[first + i] = (sign, action.kind)
    return cells


def _painted(cells: list[tuple[str, str]], colours: bool) -> str:
    """The cells as one string; with colours, on the ground of their pass."""
    if not colours:
        return "".join(sign for sign, _ in cells)
    shown, last = "", ""
    for sign, kind in cells:
        if kind != last:
            shown += f"\x1b[38;5;231;48;5;{TERMINAL[kind]}m" if kind else "\x1b[0m"
            last = kind
        shown += " " if kind and sign == "-" else sign
    return shown + ("\x1b[0m" if last else "")
