"""GPT-2 in plain PyTorch: one device, no knowledge of ranks.

    h = embedding(tokens) + position_embedding(positions)
    h = h + o(attention(q(n), k(n), v(n)))                 with n = layer_norm(h)
    h = h + down(gelu(up(n)))                              with n = layer_norm(h)
    loss = sum over tokens of cross_entropy(head(layer_norm(h)), labels)

with biases in every matrix but the head's, which is the embedding's weight, and dropout after the embeddings and at the end of
both branches. A position is a row of a table, learned like any other weight: there is none beyond `context_length`.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and github.com/openai/gpt-2, src/model.py;
LayerNorm (arXiv:1607.06450), GELU in its tanh form (arXiv:1606.08415), dropout (jmlr.org/papers/v15/srivastava14a.html).

The published weights hold q, k and v in one matrix. Here they are three, so that a part of each is a part of the heads.

What keeps this file free of parallelism: heads are counted from the tensor (`unflatten(-1, (-1, head_dim))`), the attention
core, the dropouts and the loss are submodules that can be replaced, and `embedding`, `position_embedding`, `norm` and `head`
may be None, so that a part of the layers is the same class with rooms left empty: a part that begins with hidden states uses no
embedding, and without a norm its output is hidden states.
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
        self.position_embedding: nn.Embedding | None = nn.Embedding(config.context_length, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.norm: nn.LayerNorm | None = nn.LayerNorm(config.dim, eps=config.norm_eps)
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
        labels: int64 [batch, seq], -100 where nothing is to be predicted. positions: int64 [seq] or [batch, seq], each below
        context_length, by default 0 .. seq-1. document_ids: int64 [batch, seq], or what another attention core takes for it; a
        token attends only within its own document.
        Returns logits [batch, seq, vocab], a float32 scalar with labels, or hidden states where there is no norm.
        """
        h = tokens
        if not tokens.is_floating_point():
            assert self.embedding is not None, "token ids reached a part of the model that has no embedding"
            assert self.position_embedding is not None, "token ids reached a part of the model that has no position embedding"
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            h = self.dropout(self.embedding(tokens) + self.position_embedding(positions))
        for block in self.layers.values():
            h = block(h, document_ids=document_ids)
        if self.norm is None:
            return h
        h = self.norm(h)
        head = self.head if self.head is not None else self.embedding
        assert head is not None, "the last part of a model needs a head, or the embedding it is tied to"
        return self.loss(h, head.weight, labels)

    def init_rule(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial values.

        Norms start at one, biases at zero, positions at a normal with deviation 0.01, matrices at one with 0.02; the two that
        write into the residual stream are divided by sqrt(2 n_layers), so that its variance does not grow with depth.
        """
        if name.endswith("bias"):
            return 0.0, 0.0
        if name.endswith("norm.weight"):
            return 1.0, 0.0
        if name == "position_embedding.weight":
            return 0.0, 0.01
        residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
        return 0.0, 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02

    def init_weights(self) -> None:
        """Initial weights for a model that is used alone, from torch's random state."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, *self.init_rule(name))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, h: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        h = h + self.attention(self.attention_norm(h), document_ids=document_ids)
        return h + self.ffn(self.ffn_norm(h))


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.core = AttentionCore()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))
        values = self.core(q, k, v, document_ids=document_ids)
        return self.dropout(self.o(values.flatten(-2)))


class AttentionCore(nn.Module):
    """Causal attention. q, k, v: [batch, seq, heads, head_dim]. Returns q's shape."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        mask = None
        if document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(h), approximate="tanh")))


class SummedCrossEntropy(nn.Module):
    """Cross-entropy summed over the tokens whose label is not -100, in float32; without labels the logits. It uses the head's
    weight itself, so that a replacement need not hold all logits at once."""

    def forward(self, h: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = F.linear(h, weight)
        if labels is None:
            return logits
        logits = logits.float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
