"""A rank's memory during a step: kinds one upon the other, over time, with the peak."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from titan.drawing.svg import BLUE, GREEN, GREY, LETTER, ORANGE, PINK, SKY, WIDTH, YELLOW, keys, label, page

KINDS = ("parameters", "optimizer", "gradients", "gathered", "activations", "backward", "buffers", "host")
COLOURS = dict(zip(KINDS, (BLUE, SKY, ORANGE, PINK, GREEN, YELLOW, GREY, GREY), strict=True))
LEFT, RIGHT, HEIGHT = 70, 16, 300
MOST_POINTS = 400


@dataclass(frozen=True)
class Story:
    """points: (seconds since the step's begin, bytes of each of KINDS). phases: (when it begins, name)."""

    points: list[tuple[float, tuple[int, ...]]]
    phases: list[tuple[float, str]]

    @property
    def peak(self) -> tuple[float, tuple[int, ...]]:
        """When most lies on the device, and what."""
        return max(self.points, key=lambda point: on_device(point[1]))

    def by_phase(self) -> dict[str, tuple[int, ...]]:
        """Of each phase, by its name, what lies on the device when most does."""
        found: dict[str, tuple[int, ...]] = {}
        starts = [when for when, _ in self.phases]
        for when, sizes in self.points:
            name = self.phases[max(0, bisect_right(starts, when) - 1)][1]
            if name not in found or on_device(sizes) > on_device(found[name]):
                found[name] = sizes
        return found

    def in_order(self) -> Story:
        """The same without a clock: the n-th change is at n. Few points, as `thinned` has them."""
        whens = [when for when, _ in self.points]
        points = [(float(place), sizes) for place, (_, sizes) in enumerate(self.points)]
        phases = [(float(bisect_left(whens, when)), name) for when, name in self.phases]
        return Story(Story(points, phases).thinned(), phases)

    @property
    def end(self) -> float:
        return max(self.points[-1][0], self.phases[-1][0])

    def thinned(self) -> list[tuple[float, tuple[int, ...]]]:
        """At most MOST_POINTS, of each short while the one with most."""
        size, best = self.end / MOST_POINTS or 1.0, dict[int, tuple[float, tuple[int, ...]]]()
        for point in self.points:
            place = int(point[0] / size)
            if place not in best or on_device(point[1]) >= on_device(best[place][1]):
                best[place] = point
        return [best[place] for place in sorted(best)]


def on_device(sizes: tuple[int, ...]) -> int:
    """All but what lies with the host."""
    return sum(sizes[: KINDS.index("host")])


def amount(size: float) -> str:
    """Bytes for people: 512 B, 1.5 MB, 4.8 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def svg(title: str, story: Story, below: str = "") -> str:
    """Stacked areas, the largest moment marked. below: what the axis is; "": time, in seconds."""
    when, most = story.peak
    used = [kind for i, kind in enumerate(KINDS) if any(sizes[i] for _, sizes in story.points) and kind != "host"]
    body, y = keys(16, 54, [(COLOURS[kind], kind) for kind in used])
    top, bottom = y + 34, y + 34 + HEIGHT
    across, high = WIDTH - LEFT - RIGHT, on_device(most) * 1.06
    x = lambda t: LEFT + t / story.end * across  # noqa: E731
    up = lambda size: bottom - size / high * HEIGHT  # noqa: E731
    for i in range(5):
        level = on_device(most) * i / 4
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(level):.1f}" y2="{up(level):.1f}"/>')
        body.append(label(LEFT - 8, up(level) + 4, amount(level), "small end"))
    points = story.thinned()
    base = [0] * len(points)
    for i, kind in enumerate(KINDS):
        if kind not in used:
            continue
        above = [under + sizes[i] for under, (_, sizes) in zip(base, points, strict=True)]
        shape = area(points, base, above, x, up, story.end)
        body.append(f'<path fill="{COLOURS[kind]}" d="{shape}"><title>{kind}</title></path>')
        base = above
    body += bands(story, x, top - 20, bottom)
    body.append(f'<line class="line" stroke-dasharray="4 3" x1="{x(when):.1f}" x2="{x(when):.1f}" y1="{top}" y2="{bottom}"/>')
    said = f"peak {amount(on_device(most))}"
    at = min(max(x(when) + 6, LEFT), WIDTH - RIGHT - LETTER * len(said))
    body.append(label(at, top + 12, said))
    axis = below or f"one step: {story.end * 1e3:.0f} ms, while being watched"
    body.append(label(LEFT + across / 2, bottom + 22, axis, "small mid"))
    there = "; ".join(f"{kind} {amount(size)}" for kind, size in zip(KINDS, most, strict=True) if size)
    return page(bottom + 40, title, f"{said}: {there}", body)


def area(points, below, above, x, up, end) -> str:  # type: ignore[no-untyped-def]
    """A path round one kind: steps, since memory changes at once."""
    times = [x(t) for t, _ in points] + [x(end)]
    path, level = f"M{times[0]:.1f},{up(above[0]):.1f}", above[0]
    for at, size in zip(times[1:-1], above[1:], strict=True):
        if size != level:
            path, level = path + f"H{at:.1f}V{up(size):.1f}", size
    path, level = path + f"H{times[-1]:.1f}V{up(below[-1]):.1f}", below[-1]
    for at, size in zip(reversed(times[1:-1]), reversed(below[:-1]), strict=True):
        if size != level:
            path, level = path + f"H{at:.1f}V{up(size):.1f}", size
    return path + f"H{times[0]:.1f}Z"


def bands(story: Story, x, top: float, bottom: float) -> list[str]:  # type: ignore[no-untyped-def]
    """Which part of the step it is: letters where there is room."""
    parts = []
    for (start, name), following in zip(story.phases, [*(t for t, _ in story.phases[1:]), story.end], strict=True):
        left, right = x(start), x(following)
        if right - left > 3:
            parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left:.1f}" y1="{top + 6:.1f}" y2="{bottom:.1f}"/>')
        if right - left > LETTER * len(name):
            parts.append(label((left + right) / 2, top + 4, name, "small mid"))
    return parts
