"""Which committed steps stay: the last few, every n-th, and the best by validation.

The newest is always among the last few, and it is what a start after a crash needs; older ones go only once a newer one is
committed. A step is removed by the way it came, rename first (`commit.remove`), so no half of one is ever seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from titan.checkpoint.commit import committed_steps, remove, step_folder
from titan.checkpoint.manifest import CheckpointError, read_json
from titan.config import Checkpoint

STATE = "state.json"


def prune(root: Path, config: Checkpoint) -> list[int]:
    """Remove the steps under `root` that the config does not keep, and return them. For rank 0, after a commit."""
    if not config.keep_last:
        return []
    steps = committed_steps(root)
    best = best_step(root, steps) if config.keep_best else None
    gone = surplus(steps, config.keep_last, config.keep_every, set() if best is None else {best})
    for step in gone:
        remove(root, step)
    return gone


def surplus(steps: Iterable[int], keep_last: int, keep_every: int, others: set[int]) -> list[int]:
    """The steps to remove. keep_last, keep_every: 0 for all, and for none of that kind. others: steps that stay, too."""
    steps = sorted(steps)
    kept = {*others, *(steps[-keep_last:] if keep_last else steps)}
    return [step for step in steps if step not in kept and not (keep_every and step % keep_every == 0)]


def best_step(root: Path, steps: Iterable[int]) -> int | None:
    """The step with the least validation loss, the latest of equals; None where none was validated."""
    losses = [(loss, -step) for step in steps if (loss := validation_loss(step_folder(root, step))) is not None]
    return -min(losses)[1] if losses else None


def validation_loss(folder: Path) -> float | None:
    """A committed step's loss on held-out data, where it was validated."""
    try:
        loss = read_json(folder / STATE).get("validation_loss")
    except CheckpointError:
        return None
    return float(loss) if isinstance(loss, (int, float)) and not isinstance(loss, bool) else None
