"""The pieces that our pictures are made of: SVG that needs nothing else, in light and dark, for phones and desks.

A picture is 640 units wide: on a phone, at 390 pixels, its small letters are still eight pixels high. The colours are Okabe and
Ito's, which people with any of the common forms of colour blindness can tell apart.
"""

from __future__ import annotations

from html import escape
from textwrap import shorten, wrap

WIDTH = 640
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY = "#8c959f"
LETTER = 7.4
"""About the width of a letter of 14 units."""
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #24292f } .small { font-size: 13px; fill: #57606a }
  .title { font-size: 17px; font-weight: 600 } .in { font-size: 12px; fill: #ffffff; text-anchor: middle }
  .dark { font-size: 12px; fill: #24292f; text-anchor: middle } .end { text-anchor: end } .mid { text-anchor: middle }
  .page { fill: #ffffff } .none { fill: #eaeef2 } .line { stroke: #8c959f; fill: none } .grid { stroke: #d8dee4 }
  .gap { stroke: #ffffff; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .page { fill: #0d1117 } .none { fill: #21262d } .line { stroke: #6e7681 }
    .in { fill: #ffffff } .dark { fill: #24292f } .grid { stroke: #2b313a } .gap { stroke: #0d1117 }
  }
"""


def page(height: float, title: str, description: str, body: list[str]) -> str:
    """An SVG document with a title on top; `body` begins below y = 40. description: for those who do not see it."""
    head = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {head}>',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height:.0f}" rx="6"/>',
            label(16, 28, shorten(title, 70, placeholder=" ..."), "title"),
            *body,
            "</svg>\n",
        ]
    )


def label(x: float, y: float, said: str, kind: str = "") -> str:
    """Text that begins at (x, y); kind: words of STYLE."""
    return f'<text{_class(kind)} x="{x:.1f}" y="{y:.1f}">{escape(said)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = "", kind: str = "", hint: str = "") -> str:
    """A rectangle. fill: a colour, or none where `kind` has one. hint: what a pointer on it shows."""
    paint = f' fill="{fill}"' if fill else ""
    shape = f'<rect{_class(kind)} x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"{paint}'
    return f"{shape}><title>{escape(hint)}</title></rect>" if hint else f"{shape}/>"


def keys(x: float, y: float, entries: list[tuple[str, str]]) -> tuple[list[str], float]:
    """A legend: (colour, words) side by side, in as many rows as they need; and where the rows end."""
    parts, at = [], x
    for colour, words in entries:
        width = 20 + LETTER * len(words) + 16
        if at + width > WIDTH and at > x:
            at, y = x, y + 20
        parts.append(box(at, y - 11, 13, 13, colour, "" if colour else "none"))
        parts.append(label(at + 19, y, words, "small"))
        at += width
    return parts, y + 20


def wrapped(x: float, y: float, said: str, kind: str = "small") -> tuple[list[str], float]:
    """A text in as many lines as it needs; and where they end."""
    rows = wrap(said, int((WIDTH - x - 16) / 6.6))
    return [label(x, y + 18 * i, row, kind) for i, row in enumerate(rows)], y + 18 * len(rows)


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
