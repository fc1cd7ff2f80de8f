"""The pieces of HTML that the sections are made of. Every text is escaped here; what is HTML already is of the type Html."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from titan.explaining.numbers import Number


class Html(str):
    """Markup, not to be escaped again."""

    __slots__ = ()


Content = str | Html | Number


def html(*parts: Content) -> Html:
    """Texts, numbers and markup, one after the other."""
    return Html(
        "".join(part.html() if isinstance(part, Number) else part if isinstance(part, Html) else escape(part) for part in parts)
    )


def plain(number: Number) -> Html:
    """A number in running text: its formula shows when a pointer rests on it."""
    return Html(number.html(formula=False))


def name(said: str) -> Html:
    """What something is called, such as a rank or a layer: digits in it are no figures."""
    return Html(f'<span class="name">{escape(said)}</span>')


def paragraph(*parts: Content, kind: str = "") -> Html:
    return Html(f"<p{_class(kind)}>{html(*parts)}</p>")


def listed(items: Iterable[Html], kind: str = "") -> Html:
    return Html(f"<ul{_class(kind)}>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>")


def section(key: str, title: str, lesson: str, *body: Html) -> Html:
    """A part of the page, with the idea that it teaches."""
    head = f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}</h2>'
    return Html(f'{head}<p class="lesson">{escape(lesson)}</p>' + "\n".join(body) + "</section>")


def folded(title: Content, *body: Html) -> Html:
    """Shown when asked for; it works without a script."""
    return Html(f"<details><summary>{html(title)}</summary>{html(*body)}</details>")


def bar(said: Content, number: Content, share: float, colour: str, *below: Content) -> Html:
    """A row of a picture: what, how much, and a bar of so much of the width (0 .. 1)."""
    width = f"{100 * min(1.0, max(share, 0.0)):.2f}%"
    drawn = f'<div class="bar" style="width:{width};background:{colour}"></div>' if share > 0 else ""
    drawn = f'<div class="track" aria-hidden="true">{drawn}</div>'
    more = f'<div class="below">{html(*below)}</div>' if below else ""
    return Html(f'<div class="row"><div class="what"><span>{html(said)}</span>{html(number)}</div>{drawn}{more}</div>')


def picture(drawn: str) -> Html:
    """An SVG document as a figure, in the page's style; on a phone it is moved sideways where it is too small to read."""
    inside = re.sub(r"<style>.*?</style>", "", drawn, flags=re.DOTALL)
    return Html(f'<figure class="picture" tabindex="0">{inside}</figure>')


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
