"""Sequences gathered and cut, the loss over cut logits, whole weights (`titan.parallel.tensor`)."""

from __future__ import annotations

from titan.layout import local
from titan.sharding import styles
from titan.traffic.shape import Flow, Shape


def tensor(shape: Shape) -> list[Flow]:
    """Sequences gathered before a pair of matrices and cut after it, the loss over cut logits, whole weights (`tensor`)."""
    degree = shape.mesh.degree("tp")
    if degree == 1:
        return []
    config, parts, micros = shape.config, shape.parts, shape.micros
    stream = shape.batch * shape.tokens * parts.table.width
    pairs = shape.number("gather") + shape.number("row")
    again = sum(exchanges(shape, block) for block in shape.again())
    head = cut_head(shape)
    ends = shape.number("embed") + (head is True)
    found: list[Flow] = []
    if config.parallel.async_tp:
        steps = micros * (degree - 1)
        for phase, count in (("forward", pairs), ("backward", pairs + again)):
            for op in ("send", "recv"):
                what = "parts of sequences beside the products"
                more = " + done again" if count > pairs else ""
                formula = f"M x (gather + row{more}) x (T - 1) x B s d / T"
                found.append(shape.flow(phase, "tp", op, shape.dtype, steps * count, stream // degree, what, formula))
        pairs = again = 0
    for phase, count in (("forward", pairs + ends), ("backward", pairs + ends + again)):
        what = "sequences gathered, sums shared out"
        more = " + done again" if count > pairs + ends else ""
        formula = f"M x (gather + row + embed + head{more}) x B s d"
        found.append(shape.flow(phase, "tp", "all_to_all", shape.dtype, micros * count, stream, what, formula))
    rows = shape.batch * shape.tokens
    if head is True:
        found.append(shape.flow("forward", "tp", "all_reduce", "float32", micros, rows, "largest logits", "M x B s"))
        what = "sums of exponentials, labels' logits"
        found.append(shape.flow("forward", "tp", "all_reduce", "float32", micros, 2 * rows, what, "M x 2 B s"))
    elif head is False:
        found.append(shape.flow("forward", "tp", "all_reduce", "float32", micros, 1, "the loss", "M x 1"))
    named = dict(parts.model.named_parameters())
    own = parts.step.plan.tensor
    assert own is not None
    whole = sum(local(named[name]).numel() for name in own.whole if name in named)
    what = "gradients of whole weights, in one message"
    found.append(shape.flow("gradients", "tp", "all_reduce", "float32", int(whole > 0), whole, what, "P whole"))
    for name in sorted(own.shared & named.keys()):
        elements = parts.table.kv_heads * local(named[name]).numel()
        found.append(shape.flow("gradients", "tp", "all_reduce", "float32", 1, elements, f"gradient of {name}", "G x P shared"))
    return found


def exchanges(shape: Shape, block: str) -> int:
    """Exchanges of a block's forward pass that recompute does again: it ends where nothing more is needed, so it leaves out the
    one that comes last, unless that is part of a product (`async_tp`)."""
    words = [
        word for name, word in styles(shape.parts.table, shape.config.parallel.sharding).items() if name.startswith(f"{block}.")
    ]
    last = words[-1] == "row" and not shape.config.parallel.async_tp
    return words.count("gather") + words.count("row") - last


def cut_head(shape: Shape) -> bool | None:
    """Whether this rank's output matrix is cut by tokens; None where it has none."""
    table, plan = shape.parts.table, shape.parts.step.plan
    assert plan.tensor is not None
    if not any(name in dict(stage.named_modules()) for stage in shape.stages.values() for name in table.after):
        return None
    words = styles(table, shape.config.parallel.sharding)
    return words[table.tied] == "embed" if table.tied else any(words[name] == "head" for name in table.after)
