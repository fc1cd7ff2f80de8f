"""Recompute (activation checkpointing): what a block can compute again in the backward pass is not kept for it.

Backward needs values of the forward pass. Of a Llama block of width d, feed-forward width f and keys k wide it keeps, in
elements a token: of each norm the input, the normalised value and the output (6 d); the rotated q and k, v and attention's
output (2 d + 2 k); gate, its silu, up and their product (4 f). So this is what a rank keeps of n tokens in its L blocks, and
what it computes for that in the backward passes, a step's forward passes being 1 and its backward passes 2:

    none                 n L (8 d + 2 k + 4 f)
    full                 n L d                      1         a block keeps its input alone
    block, every m-th    between the two            1 / m
    selective            n L (5 d + 2 k + 2 f)      little    by default keeps its input, matrix products and attention

Besides, in each but the first, there is 8 d + 2 k + 4 f a token of the one block whose turn it is in the backward pass.

`selective` watches the operations that pass PyTorch's dispatcher: results of the named ones are looked up in the second pass,
the others computed again. Products of a batch of matrices are not in `mm`: where a model writes its attention out, they are
the S x S scores; "aten.bmm" names them.

`block.forward` is replaced, so that hooks around a block, such as FSDP's, run once. The second pass has to compute what the
first one did: its arguments are kept, nothing here uses PyTorch's random state, and the dropouts' keys are set again. It ends
as soon as backward has what it needs, on all ranks at the same place; exchanges between ranks before that are done again.

Sources: Chen et al., "Training deep nets with sublinear memory cost" (arXiv:1604.06174); for the selective kind, Korthikanti
et al., "Reducing activation recomputation in large transformer models" (arXiv:2205.05198).
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

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if policy is not None:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(again, *args, **options, **kwargs)

    return forward


def _saving(words: list[str]) -> Policy:
    """The rule that keeps the named operations' results."""
    saved = {overload for word in words for name in GROUPS.get(word, (word,)) for overload in _overloads(name, word)}

    def policy(ctx: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _overloads(name: str, word: str) -> list[Any]:
    """An ATen operation's variants by its name, such as "aten.silu". A group's member that this PyTorch lacks has none.

    Variants that write into their arguments are left out: of those there is no result to look up.
    """
    own = name.removeprefix("aten.")
    packet = getattr(torch.ops.aten, own, None) if own.isidentifier() else None
    if packet is None and word in GROUPS:
        return []
    if packet is None:
        names = torch._C._dispatch_get_all_op_names()
        known = {full.removeprefix("aten::").split(".")[0] for full in names if full.startswith("aten::")}
        near = difflib.get_close_matches(own, known, 1)
        hint = f"did you mean 'aten.{near[0]}'?" if near else "expected an ATen operation, such as 'aten.silu'"
        raise ValueError(f"recompute.save: PyTorch has no operation {name!r}; {hint}")
    found = [getattr(packet, overload) for overload in packet.overloads()]
    found = [overload for overload in found if not overload._schema.is_mutable]
    if not found:
        raise ValueError(f"recompute.save: {name!r} changes its input; name an operation whose result is new")
    return found
