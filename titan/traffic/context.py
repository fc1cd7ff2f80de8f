"""Keys and values of a sequence's other parts, and their gradients (`titan.parallel.context`)."""

from __future__ import annotations

import math

from titan.traffic.shape import Flow, Shape


def context(shape: Shape) -> list[Flow]:
    """Keys and values of a sequence's other parts, and their gradients (`context`)."""
    degree = shape.mesh.degree("cp")
    if degree == 1:
        return []
    table, method = shape.parts.table, shape.config.parallel.cp_method
    tp = shape.mesh.degree("tp")
    heads, keys, width = table.heads // tp, max(1, table.kv_heads // tp), table.width // table.heads
    layers, tokens = shape.micros * shape.cores(), shape.batch * shape.tokens
    again = shape.micros * len(shape.again())
    blocks = {"forward": "L", "backward": "(L + done again)" if again else "L"}
    found: list[Flow] = []
    if method == "ring":
        block, what = 2 * tokens * keys * width, "keys and values passed on"
        for op in ("send", "recv"):
            for phase, times in (("forward", layers), ("backward", layers + again)):
                count = times * (degree - 1)
                found.append(
                    shape.flow(phase, "cp", op, shape.dtype, count, block, what, f"M {blocks[phase]} (n - 1) x 2 B s G h")
                )
            what_back = "their gradients on the way home"
            found.append(shape.flow("backward", "cp", op, "float32", layers * degree, block, what_back, "M L n x 2 B s G h"))
    elif method == "allgather":
        whole = 2 * tokens * degree * keys * width
        for phase, times in (("forward", layers), ("backward", layers + again)):
            what = "keys and values of the whole sequence"
            found.append(
                shape.flow(phase, "cp", "all_to_all", shape.dtype, times, whole, what, f"M {blocks[phase]} x 2 B s n G h")
            )
        what = "their gradients, shared out"
        found.append(shape.flow("backward", "cp", "all_to_all", "float32", layers, whole, what, "M L x 2 B s n G h"))
    else:
        repeated = keys * (degree // math.gcd(degree, keys))
        for phase, times in (("forward", layers), ("backward", layers + again)):
            for elements, what, formula in (
                ((heads + 2 * repeated) * width, "tokens for heads", f"M {blocks[phase]} x B s (H + 2 G) h"),
                (heads * width, "heads for tokens", f"M {blocks[phase]} x B s H h"),
            ):
                found.append(shape.flow(phase, "cp", "all_to_all", shape.dtype, times, tokens * elements, what, formula))
    return found
