"""AdamW over sharded or whole parameters, and clipping by the exact global norm.

Matrices decay and vectors (norms, biases) do not. States are made at once, so that memory is what it will be and a checkpoint
has somewhere to load into. Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv:1711.05101).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from titan.config import Optimizer
from titan.sharding import matching


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW with states made. The learning rate is set before each step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's states by name: optimizer.<state>.<parameter>."""
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `max_norm` (0: leave them); returns the norm before.

    The norm is over the whole model wherever its shards are: squares are summed over this rank's shards, then over the mesh.
    Nothing waits for the device.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], scale)
    return norm


def gradient_norms(model: nn.Module, block: str) -> dict[str, Tensor]:
    """The gradient's 2-norm of each repeated block, and of what else the model has: {"embedding": ..., "layers.0": ...}.

    block: glob of the repeated blocks, as in the sharding table; every other parameter belongs to the module at the top that
    it is in. Norms are float32 scalars on the device, over the whole model wherever its shards are, and nothing waits for them.
    Every rank takes part.
    """
    blocks = set(matching(block, dict(model.named_modules())))
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path = name.split(".")
            inside = ".".join(path[: block.count(".") + 1])
            groups.setdefault(inside if inside in blocks else path[0], []).append(parameter.grad)
    # Gradients that lie over the ranks in one way are summed by one collective: this rank's squares by group, then the mesh.
    squares: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, Tensor] = {}
    for index, grads in enumerate(groups.values()):
        for grad in grads:
            layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            sums = squares.setdefault(layout, torch.zeros(len(groups), device=local.device))
            sums[index] += local.float().square().sum()
    total = torch.stack([_over_mesh(sums, layout) for layout, sums in squares.items()]).sum(0)
    return dict(zip(groups, total.sqrt(), strict=True))


def _over_mesh(sums: Tensor, layout: tuple[DeviceMesh, tuple[Placement, ...]] | None) -> Tensor:
    """Sums over shards, added over the mesh dimensions that cut; over the others every rank has them already."""
    if layout is None:
        return sums
    mesh, placements = layout
    return DTensor.from_local(sums, mesh, [Partial() if p.is_shard() else Replicate() for p in placements]).full_tensor()
