"""Floating-point operations of a training token.

A matrix of m x n takes 2mn operations for a token's forward pass and twice that backward: 6 per weight. Attention
multiplies queries with keys and probabilities with values, over half the sequence on average since it is causal:

    matrices    6 x (weights of matrices, the head's included, the embeddings' lookups not)
    attention   6 x layers x heads x head_dim x seq_len

Recomputed operations are not counted: the share of the hardware's peak (MFU) is of the operations that training needs, not of
those that a plan makes it do. Source: Chowdhery et al., "PaLM" (arXiv:2204.02311), appendix B, with the causal half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Flops:
    """Forward and backward operations per token, in FLOP."""

    matrices: int
    attention: int

    @property
    def total(self) -> int:
        return self.matrices + self.attention


def flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Operations per token of the whole model, wherever its shards are."""
    config: Any = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    weights -= sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    if model.head is None:  # the embedding's weight is the head's, and is multiplied with
        weights += model.embedding.weight.numel()  # type: ignore[union-attr, operator]
    return Flops(6 * weights, 6 * config.n_layers * config.n_heads * config.head_dim * seq_len)
