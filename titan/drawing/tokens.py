"""Context parallelism: which tokens a rank has, and when its queries meet which keys.

The square has the queries' tokens from top to bottom, the keys' from left to right, in the chunks that the ranks hold; above
the diagonal nothing is computed. A colour tells whose queries they are, a number when they meet those keys: with ring, in which
hop; with allgather all at once; with ulysses each rank has all tokens, of some of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from titan.drawing.mesh import COLOURS
from titan.drawing.svg import WIDTH, YELLOW, box, label, page, wrapped

Spans = Sequence[tuple[int, int]]


def when(method: str, rank: int, owner: int, degree: int) -> int:
    """In which turn, from 0 on, a rank's queries meet the keys of `owner`."""
    return (rank - owner) % degree if method == "ring" else 0


def work(spans: Sequence[Spans]) -> list[int]:
    """For each rank, how many pairs of a query and a key it computes."""
    return [sum(end * (end + 1) // 2 - begin * (begin + 1) // 2 for begin, end in own) for own in spans]


def svg(title: str, method: str, spans: Sequence[Spans], heads: int) -> str:
    """spans: the tokens that each rank has. heads: query heads that a rank computes, in all."""
    degree = len(spans)
    chunks = sorted((begin, end, rank) for rank, own in enumerate(spans) for begin, end in own)
    body, y = wrapped(16, 52, explanation(method, degree, heads))
    y += 10
    size = WIDTH - 116.0
    left, cell = 100.0, (WIDTH - 116.0) / len(chunks)
    total = chunks[-1][1]
    body.append(label(left, y, "keys of rank", "small"))
    for k, (_, _, owner) in enumerate(chunks):
        body.append(label(left + (k + 0.5) * cell, y + 20, str(owner), "small mid"))
    y += 28
    for q, (begin, end, rank) in enumerate(chunks):
        top = y + q * cell
        body.append(label(left - 8, top + cell / 2 - 3, f"rank {rank}", "small end"))
        body.append(label(left - 8, top + cell / 2 + 13, f"{begin}-{end - 1}", "small end"))
        for k, (_, _, owner) in enumerate(chunks):
            x = left + k * cell
            if k > q:
                body.append(box(x, top, cell, cell, kind="none"))
                continue
            turn = when(method, rank, owner, degree)
            colour = COLOURS[rank % len(COLOURS)]
            hint = f"rank {rank}'s queries {begin} to {end - 1} meet keys of rank {owner} in turn {turn}"
            if k == q:
                body.append(box(x, top, cell, cell, kind="none"))
                corners = f"{x:.1f},{top:.1f} {x:.1f},{top + cell:.1f} {x + cell:.1f},{top + cell:.1f}"
                body.append(f'<polygon class="gap" points="{corners}" fill="{colour}"><title>{hint}</title></polygon>')
            else:
                body.append(box(x, top, cell, cell, colour, "gap", hint))
            if method == "ring" and cell > 18:
                at = (x + cell * 0.3, top + cell * 0.8) if k == q else (x + cell / 2, top + cell / 2 + 4)
                body.append(label(*at, str(turn), "dark" if colour == YELLOW else "in"))
    y += size + 22
    shares = work(spans)
    said = f"Each rank computes {shares[0]:,} of {total * (total + 1) // 2:,} pairs."
    if method == "ulysses":
        said = f"Each rank computes all {total * (total + 1) // 2:,} pairs for {heads // degree} of {heads} heads."
    body.append(label(16, y, said if len(set(shares)) == 1 else f"Pairs that the ranks compute: {shares}"))
    return page(y + 18, title, said, body)


def explanation(method: str, degree: int, heads: int) -> str:
    """What the numbers and colours mean, by method."""
    again = f" (after {len(COLOURS)}, they begin again)" if degree > len(COLOURS) else ""
    colours = f"A colour: whose queries{again}. Each rank has a chunk from the sequence's head and one from its tail."
    if method == "ring":
        return f"{colours} A number: in which of {degree} turns they meet those keys, which travel from rank to rank."
    if method == "allgather":
        return f"{colours} All keys are gathered first, then met at once."
    return (
        f"{colours} For attention alone, tokens are exchanged for heads: each rank then has all of them, for {heads // degree} "
        f"of {heads} heads, and computes the whole triangle."
    )
