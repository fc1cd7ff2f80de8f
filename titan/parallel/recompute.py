"""Recompute (activation checkpointing): values that a block could compute again in the backward pass are not kept for it.

Backward needs what forward computed. For a micro batch of n tokens a Llama block of width d and feed-forward width f, its keys and
values k wide, keeps per token, in elements: the input (d), two norms' outputs (2d), q, k and v before and after rotation
(2d + 3k), attention's output (d) and log-sum-exp (heads), the stream between the halves (d), gate, up, silu and their product (4f):

    none         n (7 d + 3 k + 4 f)          nothing is computed twice
    full         n d                          every block's forward again: about a third more FLOPs, as a backward is two forwards
    block (m)    a block in m as full         a third of a third more, and so on
    selective    n (d + what `save` names)    mm and attention: 4 d + 2 k + 2 f; only norms, rotations and products again

With L blocks on a rank, the part of L - 1 of them is saved, as one block at a time is whole. `selective` watches the operations
that pass PyTorch's dispatcher: the results of the named ones are kept and looked up in the second pass, the others done again.
A matrix product's FLOPs grow with the width, its result's size does not: they are what is worth keeping. Batched matrix products
(bmm) are not in `mm`: where attention is written out they are the scores of S x S; name "aten.bmm" to keep them.

It replaces `block.forward`, so hooks around a block run once. What a block draws or looks up besides its arguments has to be the
same in the second pass: nothing here uses PyTorch's random state, and the dropouts' keys are kept with the pass. The second pass
ends as soon as all that backward needs is there, the same place on every rank: exchanges before it are done again.

Sources: Chen et al., "Training deep nets with sublinear memory cost" (arXiv:1604.06174); Korthikanti et al., "Reducing activation
recomputation in large transformer models" (arXiv:2205.05198) for the selective kind.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan.config import Recompute
from titan.dropout import Noise

Policy = Callable[..., CheckpointPolicy]
GROUPS = {
    "mm": ("aten.mm", "aten.addmm", "aten.linear", "aten._scaled_mm", "aten._grouped_mm"),
    "attention": (
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "aten._flash_attention_forward",
        "aten._efficient_attention_forward",
        "aten._cudnn_attention_forward",
    ),
}


def recompute(blocks: list[nn.Module], config: Recompute, noise: Noise) -> None:
    """Have blocks compute their activations again in the backward pass, in place. noise: what the model's dropouts share.

    Raises ValueError where `config.save` names an operation that PyTorch does not have.
    """
    if config.mode == "none":
        return
    policy = _saving(config.save) if config.mode == "selective" else None
    for block in blocks[:: config.every if config.mode == "block" else 1]:
        block.forward = _recomputed(block.forward, policy, noise)


def _recomputed(original: Callable[..., Any], policy: Policy | None, noise: Noise) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        keys = noise.keys

        def again(*args: Any, **kwargs: Any) -> Any:
            with noise.using(keys):
                return original(*args, **kwargs)

        contexts = {} if policy is None else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    return forward


def _saving(words: list[str]) -> Policy:
    """The rule that keeps the named operations' results."""
    saved = {overload for word in words for name in GROUPS.get(word, (word,)) for overload in _overloads(name, word)}

    def policy(ctx: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _overloads(name: str, word: str) -> list[Any]:
    """An ATen operation's variants by its name, such as "aten.silu". A group's member that this PyTorch lacks has none."""
    own = name.removeprefix("aten.")
    packet = getattr(torch.ops.aten, own, None) if own.isidentifier() else None
    if packet is None and word in GROUPS:
        return []
    if packet is None:
        known = {full.removeprefix("aten::").split(".")[0] for full in torch._C._dispatch_get_all_op_names() if full[:6] == "aten::"}
        near = difflib.get_close_matches(own, known, 1)
        hint = f"; did you mean 'aten.{near[0]}'?" if near else f"; there are {', '.join(GROUPS)} and ATen operations: aten.silu"
        raise ValueError(f"recompute.save: PyTorch has no operation {name!r}{hint}")
    if own.endswith("_") and not own.startswith("_"):
        raise ValueError(f"recompute.save: {name!r} changes its input, which cannot be kept; name the operation before it")
    return [getattr(packet, overload) for overload in packet.overloads()]
