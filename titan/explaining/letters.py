"""The formulas of `titan.traffic` with their letters filled in.

A flow's formula has letters, `M x (gather + row) x B s d`. Here each becomes its figure and stands behind it in brackets:
`8 (M) x (16 (gather) + 16 (row)) x 1 (B) x 4,096 (s) x 4,096 (d) x 2 bytes`. What comes of it must be the flow's bytes. Where a
formula is no product of letters (rows padded until they can be shared, weights partly in Float8), the product that
`titan trace` shows is taken instead.
"""

from __future__ import annotations

import re

import torch

from titan.explaining.numbers import Number, evaluate, figure, given, worked
from titan.rehearsal import FLAGS
from titan.traffic.shape import Flow, Shape
from titan.traffic.tensor import cut_head, exchanges

TOKEN = re.compile(r"done again|P tied|P whole|P shared|flags|borders|[A-Za-z]+|\d+|[()+\-/]")
OPERATORS = ("x", "+", "-", "/", "(", ")")


def bytes_of(flow: Flow, shape: Shape) -> Number:
    """Of all of a flow's messages in a step, with what they are made of."""
    size = getattr(torch, flow.dtype).itemsize
    symbols, _, product = flow.formula.partition(" = ")
    letters = letters_of(flow, shape)
    tokens = TOKEN.findall(symbols.split(",")[0])
    if all(token in OPERATORS or token.isdecimal() or token in letters for token in tokens):
        said = filled(tokens, letters)
        said = f"({said})" if "+" in re.sub(r"\([^()]*\)", "", said) and "(" not in tokens else said
        formula = f"{said} x {size} {'bytes' if size > 1 else 'byte'}"
        if evaluate(formula) == flow.bytes:
            return worked(formula, "sent")
    if product and evaluate(product) == flow.bytes:
        return worked(product.removesuffix(" B") + " bytes", "sent")
    return given(flow.bytes, "sent")


def filled(tokens: list[str], letters: dict[str, float]) -> str:
    """Figures for letters; a sign between what stands side by side."""
    said, after_operand = "", False
    for token in tokens:
        operand = token not in OPERATORS
        if after_operand and (operand or token == "("):
            said += " x "
        if operand:
            said += f"{int(token):,}" if token.isdecimal() else f"{figure(letters[token])} ({token})"
        else:
            said += token if token in "()" else f" {token} "
        after_operand = operand or token == ")"
    return said


def letters_of(flow: Flow, shape: Shape) -> dict[str, float]:
    """What the letters of a flow's formula stand for, of one rank."""
    table, mesh = shape.parts.table, shape.mesh
    tp, cp, size = mesh.degree("tp"), mesh.degree("cp"), getattr(torch, flow.dtype).itemsize
    elements = flow.bytes // size
    found: dict[str, float] = {"M": shape.micros, "B": shape.batch, "s": shape.tokens, "d": table.width, "T": tp, "n": cp}
    found |= {"flags": len(FLAGS), "h": table.width // table.heads, "H": table.heads // tp, "L": shape.cores()}
    if flow.dimension == "tp":
        found |= {word: shape.number(word) for word in ("gather", "row", "embed")}
        found |= {"head": int(cut_head(shape) is True), "done again": sum(exchanges(shape, block) for block in shape.again())}
        found |= {"G": table.kv_heads, "P whole": elements, "P shared": elements // table.kv_heads}
    elif flow.dimension == "cp":
        found |= {"G": max(1, table.kv_heads // tp), "done again": len(shape.again())}
    elif flow.dimension == "pp":
        found |= {"borders": flow.count // shape.micros, "P tied": elements}
    if flow.phase in ("forward", "backward") and elements % shape.micros == 0:
        found["P"] = elements // shape.micros
    return found
