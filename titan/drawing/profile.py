"""Where steps' time went: a bar for each trace, kinds side by side."""

from __future__ import annotations

from titan.drawing.svg import BLUE, GREEN, GREY, ORANGE, PINK, SKY, WIDTH, YELLOW, box, keys, label, page
from titan.metrics.profile import KINDS, Shares

COLOURS = dict(zip(KINDS, (BLUE, SKY, GREEN, PINK, YELLOW, ORANGE, GREY, ""), strict=True))
LEFT, RIGHT, HIGH = 16, 16, 26


def svg(found: dict[str, Shares]) -> str:
    """The traces by name, on one scale."""
    body, y = keys(LEFT, 54, [(COLOURS[kind], kind) for kind in KINDS])
    longest = max(where.seconds for where in found.values())
    said = []
    for name, where in found.items():
        words = f"{name}: {where.seconds * 1e3:,.1f} ms a step"
        hidden = f", {where.hidden * 1e3:,.1f} ms of communication hidden" if where.hidden else ""
        body.append(label(LEFT, y + 22, words + hidden))
        x = float(LEFT)
        for kind, seconds in where.kinds.items():
            wide = seconds / longest * (WIDTH - LEFT - RIGHT)
            hint = f"{kind}: {seconds * 1e3:,.1f} ms, {seconds / where.seconds:.0%}"
            body.append(box(x, y + 30, wide, HIGH, COLOURS[kind], "" if COLOURS[kind] else "none", hint))
            if wide > 34:
                letters = "dark" if kind in ("attention", "optimizer") else "small mid" if kind == "idle" else "in"
                body.append(label(x + wide / 2, y + 30 + HIGH / 2 + 4, f"{seconds / where.seconds:.0%}", letters))
            x += wide
        said.append(words)
        y += 30 + HIGH + 12
    return page(y + 8, "Where a step's time went", "; ".join(said), body)
