"""Llama 3 in plain PyTorch: one device, no knowledge of ranks.

    h = embedding(tokens)
    h = h + o(attention(rope(q(n)), rope(k(n)), v(n)))     with n = rms_norm(h)
    h = h + down(silu(gate(n)) * up(n))                    with n = rms_norm(h)
    loss = sum over tokens of cross_entropy(head(rms_norm(h)), labels)

Source: "The Llama 3 Herd of Models" (arXiv:2407.21783); RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), SwiGLU
(arXiv:2002.05202), grouped-query attention (arXiv:2305.13245). RoPE rotates halves, as Hugging Face lays weights out.

What keeps this file free of parallelism and of kernels: heads are counted from the tensor (`unflatten(-1, (-1, head_dim))`);
attention core, norms, rotation, activation and loss are submodules that can be replaced; and `embedding`, `norm` and `head` may
be None, so that a part of the layers is the same class with rooms left empty: without an embedding its input is hidden states,
without a norm its output.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config


class Transformer(nn.Module):
    """The whole model, or, with rooms emptied, a run of its layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.loss = SummedCrossEntropy()

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with labels the summed loss.

        tokens: int64 [batch, seq], or hidden states [batch, seq, dim] where an earlier part of the layers made them.
        labels: int64 [batch, seq], -100 where nothing is to be predicted. positions: int64 [seq] or [batch, seq], by default
        0 .. seq-1. document_ids: int64 [batch, seq], or what another attention core takes for it; a token attends only within
        its own document.
        Returns logits [batch, seq, vocab], a float32 scalar with labels, or hidden states where there is no norm.
        """
        h = tokens
        if not tokens.is_floating_point():
            assert self.embedding is not None, "token ids reached a part of the model that has no embedding"
            h = self.embedding(tokens)
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        cos, sin = rope_tables(positions, self.config)
        for block in self.layers.values():
            h = block(h, cos=cos, sin=sin, document_ids=document_ids)
        if self.norm is None:
            return h
        h = self.norm(h)
        head = self.head if self.head is not None else self.embedding
        assert head is not None, "the last part of a model needs a head, or the embedding it is tied to"
        return self.loss(h, head.weight, labels)

    def init_rule(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial values.

        Norms start at one, matrices at a normal with deviation 0.02; the two that write into the residual stream are divided
        by sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2's rule).
        """
        if name.endswith("norm.weight"):
            return 1.0, 0.0
        residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
        return 0.0, 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02

    def init_weights(self) -> None:
        """Initial weights for a model that is used alone, from torch's random state."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, *self.init_rule(name))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = AddNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, h: Tensor, *, cos: Tensor, sin: Tensor, document_ids: Tensor | None = None) -> Tensor:
        branch = self.attention(self.attention_norm(h), cos=cos, sin=sin, document_ids=document_ids)
        h, normal = self.ffn_norm(h, branch)
        return h + self.ffn(normal)


class AddNorm(nn.RMSNorm):
    """h, branch -> their sum, and its norm. All: [batch, seq, dim]."""

    def forward(self, h: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = h + branch
        return h, super().forward(h)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.rope = Rotation()
        self.core = AttentionCore()

    def forward(self, h: Tensor, *, cos: Tensor, sin: Tensor, document_ids: Tensor | None = None) -> Tensor:
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))
        values = self.core(self.rope(q, cos, sin), self.rope(k, cos, sin), v, document_ids=document_ids)
        return self.o(values.flatten(-2))


class Rotation(nn.Module):
    """Rotates the pairs (x[j], x[j + head_dim / 2]) by their angles, in float32. x: [batch, seq, heads, head_dim]; cos, sin:
    from `rope_tables`. Returns x's shape."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class AttentionCore(nn.Module):
    """Causal attention. q: [batch, seq, heads, head_dim]; k, v: the same with fewer heads. Returns q's shape."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        mask = None
        if document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        values = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return values.transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.activation = SwiGLU()

    def forward(self, h: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(h), self.up(h)))


class SwiGLU(nn.Module):
    """silu(gate) up, element by element."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class SummedCrossEntropy(nn.Module):
    """Cross-entropy summed over the tokens whose label is not -100, in float32; without labels the logits. It uses the head's
    weight itself, so that a replacement need not hold all logits at once."""

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = F.linear(h, weight)
        if labels is None:
            return logits
        logits = logits.float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def rope_tables(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: float32 [(batch,) seq, 1, head_dim / 2].

    Pair j of a head turns by position / theta^(2j / head_dim). Llama 3.1 divides the frequencies whose wavelength is longer
    than the original context by `rope_factor`, keeps the short ones and goes linearly between the two, in turns per context.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequency = 1 / config.rope_theta**exponent  # in these words: an ulp is 0.01 radians at position 100,000
    if config.rope_factor != 1:
        turns = config.rope_original_length / (2 * math.pi / frequency)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - keep) * frequency / config.rope_factor + keep * frequency
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()
