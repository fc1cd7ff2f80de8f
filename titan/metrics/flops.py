"""Floating-point operations of a training token, and the share of the hardware's peak they reach (MFU).

A matrix of m x n takes 2mn operations for a token's forward pass and twice that backward: 6 per weight. Attention
multiplies queries with keys and probabilities with values, over half the sequence on average since it is causal:

    6 x (weights of matrices, the head's included, the embedding's lookup not)  +  6 x layers x width x seq_len

Recomputed operations are not counted. Source: Chowdhery et al., "PaLM" (arXiv:2204.02311), appendix B, with the causal half.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

# Dense bfloat16 peaks in FLOP/s, without sparsity, from NVIDIA's data sheets. The longest name that fits a device counts.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Forward and backward operations per token of the whole model, wherever its shards are."""
    config: Any = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if model.head is not None:  # else the embedding's weight is the head's, and is multiplied with
        weights -= model.embedding.weight.numel()  # type: ignore[union-attr, operator]
    return 6 * weights + 6 * config.n_layers * config.n_heads * config.head_dim * seq_len


def peak_flops(device: torch.device) -> float | None:
    """A device's dense bfloat16 peak in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = re.split(r"[\s-]+", name)
    known = [key for key in PEAKS if set(key.split()) <= set(words)]
    return PEAKS[max(known, key=len)] if known else None
