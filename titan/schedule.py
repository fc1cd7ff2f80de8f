"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

With W warm-up steps, N steps in all and f = min_lr_ratio, the share of the peak rate at step s (the first step is 1):

    warm-up    s / W                                          s <= W
    constant   1
    linear     1 - (1-f) t                                    t = (s-W) / (N-W)
    cosine     f + (1-f) (1 + cos(pi t)) / 2
    wsd        1, and over the last D steps linear down to f  (warm-up, stable, decay; arXiv:2404.06395)
"""

from __future__ import annotations

import math

from titan.config import Schedule


def lr_share(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak learning rate that step `step` (1 .. steps) uses."""
    warmup, floor = schedule.warmup_steps, schedule.min_lr_ratio
    if step < warmup:
        return step / warmup
    if schedule.name == "constant":
        return 1.0
    start = warmup
    if schedule.name == "wsd":
        start = max(warmup, steps - (schedule.decay_steps or steps // 5))
    t = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    if schedule.name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2
    return 1 - (1 - floor) * t
