"""GPT-2 hyperparameters. No torch.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2, and the hparams.json of the four
released models: 124, 355, 774 and 1,558 million parameters (the paper's own counts were wrong). `debug` is ours: small, with
every width divisible by 16, so that each parallel plan can be tried on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One GPT-2: every field can be set in the TOML as model.<field>."""

    dim: int = 128
    """Width of the residual stream."""
    n_layers: int = 8
    """Transformer blocks."""
    n_heads: int = 8
    """Heads; head_dim = dim / n_heads."""
    ffn_dim: int = 512
    """Width of the feed-forward layer, between up and down; 4 dim in every published size."""
    vocab_size: int = 512
    """Rows of the embedding and of the head; the tokenizer may have fewer."""
    norm_eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    tied_embeddings: bool = True
    """The head uses the embedding's weight."""
    dropout: float = 0.0
    """Share of channels zeroed in training, after the embeddings and in both residual branches. Not of attention's
    probabilities: fused attention never has them in memory, and takes no mask that is a function of the position, so they could
    not be the same under every parallel plan. 0.1 was usual where data is seen many times; 0 suits a single pass."""
    context_length: int = 1024
    """Rows of the position embedding: the longest sequence that the model can read. Training on longer ones is refused."""

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 up to (not including) 1, not {self.dropout}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


NO_MATTER = ("dropout",)
"""Fields that change nothing of what weights compute."""

SIZES = {
    "debug": Config(),
    "124m": Config(768, 12, 12, 3072, 50257),
    "355m": Config(1024, 24, 16, 4096, 50257),
    "774m": Config(1280, 36, 20, 5120, 50257),
    "1558m": Config(1600, 48, 25, 6400, 50257),
}
