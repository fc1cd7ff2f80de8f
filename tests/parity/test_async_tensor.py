"""Asynchronous tensor parallelism: exchange and product in one, piece by piece, against a product of whole matrices."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import small
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titan.build import build
from titan.config import Config, degrees
from titan.linear import PLAIN
from titan.parallel.mesh import make_mesh
from titan.parallel.tensor_async import gather_linears, linear_reduce
from titan.parallel.weight_gradients import WeightGradients
from titan.pool import Pool

OUTPUTS = (5, 1, 12)
"""Rows of the matrices that take a gathered sequence; the one of the second is asked for, but then not used."""


def tensors(seed: int, degree: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """A whole sequence in float64, then every rank's matrices and gradients of outputs, each with ranks in front."""
    source = torch.Generator().manual_seed(seed)
    batch, part, width = (int(torch.randint(1, 5, (), generator=source)) for _ in range(3))
    x = torch.randn(batch, degree * part, width, generator=source, dtype=torch.float64)
    weights = [torch.randn(degree, outputs, width, generator=source, dtype=torch.float64) for outputs in OUTPUTS]
    down = torch.randn(degree, width, OUTPUTS[2], generator=source, dtype=torch.float64)
    return x, weights, down


def dense(x: Tensor, weights: list[Tensor], down: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Two products in a row, with two other uses of x beside them, in one process: the result, and the gradients of x and of
    the matrices that were used."""
    inputs = [t.clone().requires_grad_() for t in (x, *weights, down)]
    x, first, _, up, down = inputs
    z = x.square().sum() + x.sum(-1, keepdim=True).exp().sum()
    y = torch.zeros_like(x)
    for rank in range(len(first)):
        z = z + (x @ first[rank].T).sin().sum()
        y = y + (x @ up[rank].T).tanh() @ down[rank].T
    (z + y.cos().sum()).backward()
    return y.detach(), [t.grad for t in inputs if t.grad is not None]


def shared(rank: int, seed: int, put_off: bool) -> tuple[Tensor, ...]:
    """On a worker: this rank's part of the same."""
    group = dist.group.WORLD
    assert group is not None
    whole, weights, down = tensors(seed, group.size())
    x = whole.chunk(group.size(), dim=1)[rank].clone().requires_grad_()
    mine = [w[rank].clone().requires_grad_() for w in weights]
    own_down = down[rank].clone().requires_grad_()
    with WeightGradients() if put_off else nullcontext() as put:
        gathered, first, _, up = gather_linears(x, mine, [PLAIN] * len(mine), group)
        # What is not multiplied is the same on all ranks, so that each adds its share of the gradient.
        z = (x.square().sum() + (gathered.sum(-1, keepdim=True).exp().sum() / group.size())) + first.sin().sum()
        y = linear_reduce(up.tanh(), own_down, PLAIN, group)
        (z + y.cos().sum()).backward()
    if put is not None:
        assert mine[0].grad is None
        assert own_down.grad is None
        put.run()
    assert mine[1].grad is None
    return tuple(t.detach() for t in (y, x.grad, mine[0].grad, mine[2].grad, own_down.grad) if t is not None)


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_give_what_whole_matrices_give(pool: Pool, degree: int, seed: int) -> None:
    y, (dx, *d_weights) = dense(*tensors(seed, degree))
    expected = [torch.stack(t.chunk(degree, dim=1)) for t in (y, dx)] + d_weights
    for rank, got in enumerate(pool.run(degree, shared, seed, bool(seed % 2))):
        for mine, whole in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, whole[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_every_product_is_computed_once(pool: Pool, short_documents: Path, model: str) -> None:
    configs = [small(short_documents, f"tp=2,async_tp={on}", model) for on in ("false", "true")]
    plain, ahead = (pool.run(degrees(config.parallel, 1).world, operations, config) for config in configs)
    assert plain == ahead


def operations(rank: int, config: Config) -> int:
    """On a worker: floating-point operations of a training step's products."""
    mesh = make_mesh("cpu", degrees(config.parallel, dist.get_world_size()), 30)
    parts = build(config, torch.device("cpu"), mesh)
    tokens = torch.randint(257, (2, config.training.seq_len), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counted:
        parts.step.forward_backward({"tokens": tokens, "labels": tokens}, tokens.numel(), 1)
    return counted.get_total_flops()
