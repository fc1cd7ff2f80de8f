"""Numbers that say where they come from.

A number on the page is either worked out or given. One that is worked out has a formula with its figures filled in, and its
value is what that very formula gives: so what is shown cannot drift from what is said. One that is given names its source: a
key of the config, of the cluster's file, or the dry run, which found it by following every tensor and message and has no
formula for it.

A formula is arithmetic for people: `4,096 x 14,336 / 8 (tp) x 4 bytes`. Words, and brackets with words alone, say what a figure
is and count for nothing. ceil and floor round up and down.

Memory is in GiB of 1,024^3 bytes, as GPUs are sold; what travels in GB of 1,000^3, as links are.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import dataclass
from html import escape

LABEL = re.compile(r"(?<!ceil)(?<!floor)\((?=[A-Za-z])[^()]*\)")
WORD = re.compile(r"\b(?!x\b|ceil\b|floor\b)[A-Za-z_]+\b")
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ROUNDED = {"ceil": math.ceil, "floor": math.floor}
BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))
DECIMAL = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
FLOP = ((1e24, "YFLOP"), (1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
SCALES = {"memory": BINARY, "sent": DECIMAL, "seconds": SECONDS, "flop": FLOP}
DRY_RUN = "dry run"


@dataclass(frozen=True)
class Number:
    """What is shown, and why."""

    value: float
    unit: str
    """memory, sent, seconds, flop, share, or a word that is shown behind it."""
    formula: str = ""
    """Filled in; empty where the number is given."""
    source: str = ""
    """Of one that is given: DRY_RUN, or a key such as training.steps or cluster.gpu.memory_gib."""

    def __str__(self) -> str:
        return shown(self.value, self.unit)

    def html(self, formula: bool = True) -> str:
        """The number, and beside it its formula. formula=False: what it is made of shows when a pointer rests on it."""
        why = f'data-formula="{escape(self.formula)}"' if self.formula else f'data-from="{escape(self.source)}"'
        hint = f' title="= {escape(self.formula)}"' if self.formula else f' title="{escape(said_of(self.source))}"'
        kind = "number found" if self.source == DRY_RUN else "number"
        tail = f' <span class="formula">= {escape(self.formula)}</span>' if formula and self.formula else ""
        data = f'data-value="{self.value!r}" data-unit="{escape(self.unit)}"'
        return f'<span class="{kind}" {data} {why}{hint}><b>{escape(str(self))}</b>{tail}</span>'


def worked(formula: str, unit: str = "") -> Number:
    """A number that is what its formula gives. ValueError where the formula is none."""
    return Number(evaluate(formula), unit, formula)


def given(value: float, unit: str = "", source: str = DRY_RUN) -> Number:
    """A number from elsewhere."""
    return Number(value, unit, source=source)


def first_that_gives(value: float, unit: str, formulas: list[str]) -> Number:
    """Of formulas the first that gives what the dry run found, to the byte; without one, what it found."""
    return next((number for number in (worked(f, unit) for f in formulas) if number.value == value), given(value, unit))


def evaluate(formula: str) -> float:
    """What a filled-in formula gives."""
    plain = WORD.sub("", LABEL.sub("", formula)).replace(",", "").replace(" x ", " * ")
    try:
        return _value(ast.parse(plain.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"no arithmetic: {formula!r}") from error


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        a, b = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Div) and isinstance(a, int) and isinstance(b, int) and a % b == 0:
            return a // b  # whole numbers stay exact, however large
        found: float = SIGNS[type(node.op)](a, b)
        return found
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ROUNDED and len(node.args) == 1:
        return ROUNDED[node.func.id](_value(node.args[0]))
    raise ValueError(f"no arithmetic: {ast.unparse(node)}")


def figure(value: float) -> str:
    """A number for a formula: whole ones in full, others with six digits."""
    if value == round(value):
        return f"{round(value):,}"
    places = max(0, 5 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".rstrip("0").rstrip(".")


def shown(value: float, unit: str) -> str:
    """A number for people, with its unit: three or four digits of what is measured, all of what is counted."""
    if unit == "share":
        return f"{value:.1%}" if not 0 < value < 0.001 else f"{digits(100 * value)}%"
    if unit in SCALES:
        scale, word = next((pair for pair in SCALES[unit] if abs(value) >= pair[0]), SCALES[unit][-1])
        return f"{digits(value / scale)} {word}" if value else f"0 {word}"
    count = f"{round(value):,}" if value == round(value) else digits(value)
    return f"{count} {unit}".rstrip()


def digits(value: float) -> str:
    """Three digits at least."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def said_of(source: str) -> str:
    """Where a given number comes from, in words."""
    return "found by the dry run" if source == DRY_RUN else source
