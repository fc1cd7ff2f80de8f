"""torch.compile of each block, in place: operations between the matrix products become one kernel each.

An elementwise operation costs a trip through memory; a norm, a rotation or a silu is several, each a kernel. The compiler
traces a block's forward once, and its backward with it, and writes kernels in which those trips become one. Blocks are compiled
one by one because they are alike: the second one finds the first one's code, so that a hundred cost what one does, and the
stream between them, the collectives of FSDP and the pipeline stay as they are.

What is compiled is `block.forward`, as recomputation and mixed precision left it; hooks around a block (FSDP's) run outside.
Names of parameters do not change. It is compiled for the shapes of the training step and used there alone: text is
generated, and validation done, without it, where other shapes and other attention cores would compile anew.

What the compiler cannot trace, such as attention over documents or an exchange between ranks that it does not know, runs as it
is, between two compiled parts. Inside a recomputed block that would leave all of the block uncompiled. So a block is compiled
before recomputation wraps it; only selective recomputation has to come first, since the compiler hides from it the operations
that it looks for, and instead carries out itself what it asks for.

Source: Ansel et al., "PyTorch 2" (ASPLOS 2024).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from titan.config import Compile


def compile_blocks(blocks: list[nn.Module], config: Compile) -> None:
    """Compile the blocks' forward passes for training, in place, each when it first runs.

    Raises ValueError where PyTorch has no such backend.
    """
    if not config.enable:
        return
    known = torch.compiler.list_backends(None)
    if config.backend not in known:
        near = difflib.get_close_matches(config.backend, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"compile.backend: PyTorch has no backend {config.backend!r}; {hint}")
    # Recomputation sets what a block's pass depends on and takes it back, weights in a narrow format say; the compiler has to
    # be told that for whoever looks from outside nothing has happened.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for block in blocks:
        block.forward = _in_training(block, block.forward, torch.compile(block.forward, backend=config.backend, dynamic=False))


def _in_training(block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward
