"""Hidden states and their gradients between stages, and a tied weight (`titan.parallel.pipeline`)."""

from __future__ import annotations

from titan.layout import local
from titan.parallel.timeline import Recv, Send, program
from titan.traffic.shape import Flow, Shape


def pipeline(shape: Shape) -> list[Flow]:
    """Hidden states and their gradients between stages, as the schedule has them; a tied weight, its gradient (`pipeline`)."""
    mesh, parts = shape.mesh, shape.parts
    if mesh.degree("pp") == 1:
        return []
    made = shape.schedule
    items = program(made.orders, made.owners, mesh.coordinate("pp"))
    stream = shape.batch * shape.tokens // parts.step.plan.sequence_degree * parts.table.width
    found = []
    for op, kind in (("send", Send), ("recv", Recv)):
        count = sum(isinstance(item, kind) for item in items)
        what = "hidden states and their gradients, by the schedule"
        found.append(shape.flow("hand-over", "pp", op, shape.dtype, count, stream, what, "borders x M x B s d / T"))
    tied = parts.step.plan.tied
    if tied is not None and tied.first != tied.last and tied.rank in (tied.first, tied.last):
        weight, copy = (None if p is None else local(p).numel() for p in tied._pair())
        there, back = ("send", "recv") if weight is not None else ("recv", "send")
        elements = weight if weight is not None else copy
        assert elements is not None
        found.append(shape.flow("weights", "pp", there, "float32", 1, elements, "the tied weight", "P tied"))
        found.append(shape.flow("gradients", "pp", back, "float32", 1, elements, "its copy's gradient", "P tied"))
    return found
