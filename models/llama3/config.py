"""Llama 3 hyperparameters. No torch.

Source: "The Llama 3 Herd of Models" (arXiv:2407.21783, table 3) for 8b, 70b and 405b, with the RoPE scaling that the 3.1
release published; the Llama 3.2 model cards and their config.json for 1b and 3b (tied embeddings); "Llama 2"
(arXiv:2307.09288) and its config.json for llama2-7b, the same architecture with a head of keys and values for each query head.
`debug` is ours: small, with every width divisible by 16, so that each parallel plan can be tried on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One Llama: every field can be set in the TOML as model.<field>."""

    dim: int = 128
    """Width of the residual stream."""
    n_layers: int = 8
    """Transformer blocks."""
    n_heads: int = 8
    """Query heads; head_dim = dim / n_heads."""
    n_kv_heads: int = 4
    """Key and value heads, each shared by n_heads / n_kv_heads query heads (grouped-query attention)."""
    ffn_dim: int = 352
    """Width of the feed-forward layer, between gate/up and down."""
    vocab_size: int = 512
    """Rows of the embedding and of the head; the tokenizer may have fewer."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool = False
    """The head uses the embedding's weight."""
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths."""
    rope_factor: float = 1.0
    """Llama 3.1 scaling: long wavelengths are stretched by this factor. 1: none."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths longer than rope_original_length / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths shorter than rope_original_length / this are kept."""
    rope_original_length: int = 8192
    """Sequence length that the unscaled wavelengths were trained on."""
    context_length: int = 131072
    """Longest sequence the model is meant for; Hugging Face's max_position_embeddings. Training on longer ones is refused."""

    def __post_init__(self) -> None:
        counts = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_original_length", "context_length")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("norm_eps", "rope_theta", "rope_low_freq_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads} (rotary pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_factor < 1 or self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError("rope_factor must be 1 or more and rope_high_freq_factor above rope_low_freq_factor")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


NO_MATTER = ("context_length",)
"""Fields that change nothing of what weights compute."""

SIZES = {
    "debug": Config(),
    "1b": Config(2048, 16, 32, 8, 8192, 128256, tied_embeddings=True, rope_factor=32.0),
    "3b": Config(3072, 28, 24, 8, 8192, 128256, tied_embeddings=True, rope_factor=32.0),
    "8b": Config(4096, 32, 32, 8, 14336, 128256, rope_factor=8.0),
    "70b": Config(8192, 80, 64, 8, 28672, 128256, rope_factor=8.0),
    "405b": Config(16384, 126, 128, 8, 53248, 128256, rope_factor=8.0),
    "llama2-7b": Config(4096, 32, 32, 32, 11008, 32000, rope_theta=10000.0, context_length=4096),
}
