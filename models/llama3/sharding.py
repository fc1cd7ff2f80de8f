"""How Llama 3 may be cut. No torch."""

from __future__ import annotations

from titan.sharding import Sharding

from .config import Config


def sharding(config: Config) -> Sharding:
    """The table."""
    tensor = {
        "embedding": "embed",
        "layers.*.attention_norm": "seq",
        "layers.*.attention": "gather",
        "layers.*.attention.q": "heads",
        "layers.*.attention.k": "kv",
        "layers.*.attention.v": "kv",
        "layers.*.attention.o": "row",
        "layers.*.ffn_norm": "seq",
        "layers.*.ffn": "gather",
        "layers.*.ffn.gate": "col",
        "layers.*.ffn.up": "col",
        "layers.*.ffn.down": "row",
        "norm": "seq",
    }
    keys = config.n_kv_heads * config.head_dim
    matrices = {
        "layers.*.attention.q": (config.dim, config.dim),
        "layers.*.attention.k": (keys, config.dim),
        "layers.*.attention.v": (keys, config.dim),
        "layers.*.attention.o": (config.dim, config.dim),
        "layers.*.ffn.gate": (config.ffn_dim, config.dim),
        "layers.*.ffn.up": (config.ffn_dim, config.dim),
        "layers.*.ffn.down": (config.dim, config.ffn_dim),
    }
    kernels = {
        "layers.*.attention_norm": "rms_norm",
        "layers.*.ffn_norm": "add_rms_norm",
        "norm": "rms_norm",
        "layers.*.attention.rope": "rope",
        "layers.*.ffn.activation": "swiglu",
    }
    return Sharding(
        block="layers.*",
        blocks=config.n_layers,
        width=config.dim,
        vocabulary=config.vocab_size,
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        core="layers.*.attention.core",
        before=("embedding",),
        after=("norm",) if config.tied_embeddings else ("norm", "head"),
        tied="embedding" if config.tied_embeddings else "",
        matrices=matrices,
        kernels=kernels,
        tensor=tensor if config.tied_embeddings else {**tensor, "head": "head"},
    )
