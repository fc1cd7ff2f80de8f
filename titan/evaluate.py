"""Loss on held-out data: always the same samples, summed over tokens and divided once.

Bits per byte makes losses of different tokenizers comparable: nats per token, over ln 2, times the held-out split's tokens
per byte of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from titan.batch import Batch
from titan.ranks import Ranks, agree, total
from titan.step import Step


def evaluate(
    step: Step,
    batches: Iterable[Batch],
    tokens_per_byte: float | None,
    ranks: Ranks,
    stopping: Callable[[], bool],
    beat: Callable[[], None],
) -> dict[str, float]:
    """validation_loss, the mean per token in nats over all ranks' batches; and validation_bits_per_byte, where the tokens per
    byte of text are known.

    Nothing, where any rank is `stopping` before the last batch, or where no token counts. beat: called before each batch.
    Gradients and random states are left alone.
    """
    loss = torch.zeros((), dtype=torch.float64, device=step.device)
    valid = 0
    with step.inference():
        for batch in batches:
            beat()
            if agree(ranks, 0, stopping())[1]:
                return {}
            loss += step.loss(batch)
            valid += step.count(batch)
    loss_sum, valid_sum = total(ranks, loss.item(), valid)
    if not valid_sum:
        return {}
    mean = loss_sum / valid_sum
    if tokens_per_byte is None:
        return {"validation_loss": mean}
    return {"validation_loss": mean, "validation_bits_per_byte": mean / math.log(2) * tokens_per_byte}
