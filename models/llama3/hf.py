"""Llama 3 and Hugging Face's LlamaForCausalLM: the same numbers under other names. No torch.

One table, NAMES, serves both directions, and it holds renames only: RoPE rotates halves here as there, and no matrix is
transposed, split or joined. config.json is written in the spelling of transformers 4 (`rope_theta`, `rope_scaling`), which
transformers 5 reads too, as it must for every Llama that was published before it. It is read in both spellings: transformers 5
itself writes `rope_parameters`. A key that is missing means what LlamaConfig takes it to mean.

What this model cannot express is refused with a sentence: weights that load and then compute something else are worse.
"""

from __future__ import annotations

from typing import Any

from .config import Config

MODEL_TYPE = "llama"
"""model_type in config.json."""

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.ffn.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.ffn.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our name -> theirs; {} is the layer."""

BASE = "model."
"""What their names begin with unless the model was saved without its head."""

IGNORED = ("*.rotary_emb.inv_freq",)
"""Globs of their tensors that are no weights: old folders carry the rotary frequencies, which the config decides."""

TRANSPOSED = ()
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
    scaling = {
        "rope_type": "llama3",
        "factor": config.rope_factor,
        "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_length,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_factor != 1 else None,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config that a config.json describes. ValueError, saying what it is, where this model cannot be that."""
    _refuse_other_models(raw)
    length = _number(raw, "max_position_embeddings", int, 2048)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type is {kind!r}; this model knows default and llama3")
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise ValueError(f"partial_rotary_factor is {share!r}; this model rotates whole heads")
    scaled: dict[str, Any] = {}
    if kind == "llama3":
        scaled = {
            "rope_factor": _number(rope, "factor", float),
            "rope_low_freq_factor": _number(rope, "low_freq_factor", float),
            "rope_high_freq_factor": _number(rope, "high_freq_factor", float),
            "rope_original_length": _number(rope, "original_max_position_embeddings", int, length),
        }
    heads = _number(raw, "num_attention_heads", int)
    config = Config(
        dim=_number(raw, "hidden_size", int),
        n_layers=_number(raw, "num_hidden_layers", int),
        n_heads=heads,
        n_kv_heads=_number(raw, "num_key_value_heads", int, heads),
        ffn_dim=_number(raw, "intermediate_size", int),
        vocab_size=_number(raw, "vocab_size", int),
        norm_eps=_number(raw, "rms_norm_eps", float, 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False) is True,
        rope_theta=_number(rope, "rope_theta", float, _number(raw, "rope_theta", float, 10000.0)),
        context_length=length,
        **scaled,
    )
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"head_dim is {raw['head_dim']!r}; this model's heads are hidden_size / num_attention_heads wide")
    return config


def _refuse_other_models(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type is {raw.get('model_type')!r}, expected {MODEL_TYPE!r}")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is set: these are quantised weights; take the model's unquantised folder")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{key} is {raw[key]!r}; this model has no biases")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; this model's is silu")
    if raw.get("sliding_window"):
        raise ValueError(f"sliding_window is {raw['sliding_window']!r}; this model attends to everything before a token")


def _number(raw: dict[str, Any], key: str, kind: type[int] | type[float], default: float | None = None) -> Any:
    """A number of this kind; whole ones will do for float. ValueError where it is missing without a default, or not one."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)):
        raise ValueError(f"{key} is {value!r}, expected a {'whole ' if kind is int else ''}number")
    return kind(value)
