"""GPT-2 and Hugging Face's GPT2LMHeadModel: the same numbers under other names and in other shapes. No torch.

Theirs keep the layout of OpenAI's files: matrices are [inputs, outputs], and q, k and v lie side by side in one, c_attn. So in
NAMES three of ours have one name of theirs, which means joined along the outputs, and TRANSPOSED says which are turned round.

Dropout is how a model is trained, not what it computes: `resid_pdrop` is taken, the others (0.1 in every published config) are
left. What this model cannot express is refused with a sentence: weights that load and then compute something else are worse.
"""

from __future__ import annotations

from typing import Any

from .config import Config

MODEL_TYPE = "gpt2"
"""model_type in config.json."""

BASE = "transformer."
"""What their names begin with unless the model was saved without its head, as the published ones were."""

NAMES = {
    "embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "layers.{}.attention_norm.weight": "transformer.h.{}.ln_1.weight",
    "layers.{}.attention_norm.bias": "transformer.h.{}.ln_1.bias",
    "layers.{}.attention.q.weight": "transformer.h.{}.attn.c_attn.weight",
    "layers.{}.attention.k.weight": "transformer.h.{}.attn.c_attn.weight",
    "layers.{}.attention.v.weight": "transformer.h.{}.attn.c_attn.weight",
    "layers.{}.attention.q.bias": "transformer.h.{}.attn.c_attn.bias",
    "layers.{}.attention.k.bias": "transformer.h.{}.attn.c_attn.bias",
    "layers.{}.attention.v.bias": "transformer.h.{}.attn.c_attn.bias",
    "layers.{}.attention.o.weight": "transformer.h.{}.attn.c_proj.weight",
    "layers.{}.attention.o.bias": "transformer.h.{}.attn.c_proj.bias",
    "layers.{}.ffn_norm.weight": "transformer.h.{}.ln_2.weight",
    "layers.{}.ffn_norm.bias": "transformer.h.{}.ln_2.bias",
    "layers.{}.ffn.up.weight": "transformer.h.{}.mlp.c_fc.weight",
    "layers.{}.ffn.up.bias": "transformer.h.{}.mlp.c_fc.bias",
    "layers.{}.ffn.down.weight": "transformer.h.{}.mlp.c_proj.weight",
    "layers.{}.ffn.down.bias": "transformer.h.{}.mlp.c_proj.bias",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
"""Our name -> theirs; {} is the layer."""

IGNORED = ("*h.*.attn.bias", "*h.*.attn.masked_bias")
"""Globs of their tensors that are no weights: old folders carry the causal mask."""

TRANSPOSED = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
"""Globs of their matrices that are [inputs, outputs]."""


def tensor_names(config: Config) -> dict[str, str]:
    """Our name -> theirs of every parameter, layer by layer. A tied head has no weight of its own."""
    layers = [name for name in NAMES if "{}" in name]
    names = {name: theirs for name, theirs in NAMES.items() if "{}" not in name and not _is_tied_head(name, config)}
    return names | {name.format(i): NAMES[name].format(i) for i in range(config.n_layers) for name in layers}


def copies(config: Config) -> dict[str, str]:
    """Their tensors that may be there besides: their name -> the parameter of ours that each must equal."""
    return {NAMES["head.weight"]: "embedding.weight"} if config.tied_embeddings else {}


def _is_tied_head(name: str, config: Config) -> bool:
    return name == "head.weight" and config.tied_embeddings


def to_hf(config: Config) -> dict[str, Any]:
    """config.json of this model, without what the tokenizer and the files decide (token ids, dtype)."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.context_length,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config that a config.json describes. ValueError, saying what it is, where this model cannot be that."""
    _refuse_other_models(raw)
    dim = _number(raw, "n_embd", int, 768)
    return Config(
        dim=dim,
        n_layers=_number(raw, "n_layer", int, 12),
        n_heads=_number(raw, "n_head", int, 12),
        ffn_dim=_number(raw, "n_inner", int, 4 * dim),
        vocab_size=_number(raw, "vocab_size", int, 50257),
        norm_eps=_number(raw, "layer_norm_epsilon", float, 1e-5),
        tied_embeddings=raw.get("tie_word_embeddings", True) is True,
        dropout=_number(raw, "resid_pdrop", float, 0.1),
        context_length=_number(raw, "n_positions", int, 1024),
    )


def _refuse_other_models(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type is {raw.get('model_type')!r}, expected {MODEL_TYPE!r}")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is set: these are quantised weights; take the model's unquantised folder")
    if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function is {raw['activation_function']!r}; this model's is gelu_new (GELU by tanh)")
    if not raw.get("scale_attn_weights", True):
        raise ValueError("scale_attn_weights is false; this model divides scores by the root of the head's width")
    if raw.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError("scale_attn_by_inverse_layer_idx is true; this model scales attention alike in every layer")
    if raw.get("add_cross_attention"):
        raise ValueError("add_cross_attention is true; this model is a decoder alone")


def _number(raw: dict[str, Any], key: str, kind: type[int] | type[float], default: float) -> Any:
    """A number of this kind, or the default if it is missing; whole ones will do for float. ValueError where it is not one."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)):
        raise ValueError(f"{key} is {value!r}, expected a {'whole ' if kind is int else ''}number")
    return kind(value)
