"""Apply a plan to a model, in place: the one file that knows every dimension, and their order.

For each pipeline stage that this rank holds:

    kernels      in the place of what norms, rotations and activations compute
    Float8       from now on a linear layer's products are computed in another way, whoever asks for them
    loss         the model's own is replaced by one that never holds all logits; tensor parallelism wraps it
    tensor       decides which part of each matrix there is at all
    attention    the cores are replaced: by ones that know documents, or that see the other ranks' keys (context); compiled in
                 bfloat16 on a CPU whose fused operation is slow, by products of blocks
    dropout      by one that is a function of a token's place, so that it is the same under every plan
    precision    without FSDP, casts around each unit; before recompute, so that what is computed again is cast again
    compile      each block's forward with all of that inside; inside recompute, where the compiler need not know of it
    recompute    wraps what was compiled; but selective recompute watches single operations, so it goes inside
    offload      of activations: outside of recompute, so that of a recomputed block its input goes
    FSDP         last: it takes parameters as it finds them, and its hooks stay outside of all

A dimension of size one is skipped: FSDP2 on one rank would cost a small model a fifth of its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from titan.attention import TiledAttention
from titan.attention_blocks import BlockAttention, fused_is_slow
from titan.config import Config
from titan.dropout import Noise, replace_dropouts
from titan.fused import refuse_without_triton, use_kernels
from titan.layout import Cut
from titan.loss import LinearCrossEntropy
from titan.parallel.compile import compile_blocks
from titan.parallel.context import ContextAttention
from titan.parallel.data import GradientSync, Replicated, Sharded, shard
from titan.parallel.mesh import Mesh
from titan.parallel.offload import offload_activations
from titan.parallel.pipeline import TiedWeight
from titan.parallel.recompute import recompute
from titan.parallel.schedules import Table
from titan.parallel.stages import block_costs, shares, split
from titan.parallel.tensor import PartialGradients, cut_model
from titan.parallel.tensor_exchange import TensorParallel
from titan.precision.float8 import swap
from titan.precision.float8_layers import float8_layers
from titan.precision.float8_weight import Float8Shards
from titan.precision.mixed import compute_in
from titan.sharding import Sharding, matching, replace_module, styles

FLOAT8_CAPABILITY = (8, 9)


@dataclass
class Plan:
    """A model cut for this rank, and what its gradients need."""

    model: nn.Module
    """The model, or a pipeline's stages of it that this rank holds; parameters have their names in the whole model."""
    sync: GradientSync
    noise: Noise
    tensor: TensorParallel | None = None
    tied: TiedWeight | None = None
    partial: PartialGradients | None = None
    float8: Float8Shards | None = None

    @property
    def cuts(self) -> dict[str, Cut]:
        return {} if self.tensor is None else self.tensor.cuts

    @property
    def share(self) -> int:
        """1, or 0 on a rank whose loss another one counts: tensor-parallel ranks have the same."""
        return int(self.tensor is None or self.tensor.rank == 0)

    @property
    def sequence_degree(self) -> int:
        """Into how many parts the ranks' sequences are cut between blocks."""
        return 1 if self.tensor is None or not self.tensor.sequence else self.tensor.degree

    def refresh(self) -> None:
        """Before forward passes: a copy of a weight is what the weight is, and its scale fits."""
        if self.tied is not None:
            self.tied.copy_weight()
        if self.float8 is not None:
            self.float8.refresh()

    def finish(self) -> None:
        """After the last backward pass: every gradient becomes the sum over all ranks."""
        self.sync.finish()
        if self.tied is not None:
            self.tied.add_gradient()
        if self.partial is not None:
            self.partial.finish()

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """For a while, no sequence is cut over ranks."""
        if self.tensor is not None:
            self.tensor.sequence = False
        try:
            yield
        finally:
            if self.tensor is not None:
                self.tensor.sequence = True


def parallelize(
    whole: nn.Module, table: Sharding, mesh: Mesh, pipeline: Table | None, config: Config, device: torch.device
) -> Plan:
    """This rank's part of a model on the meta device, which itself stays as it is.

    device: where it will compute. pipeline: the schedule, where there is one, whose stages the model is cut into.
    Raises ValueError where the table does not fit the model.
    """
    tp = TensorParallel(mesh.group("tp"), table.kv_heads, config.parallel.async_tp) if mesh.degree("tp") > 1 else None
    noise = Noise(config.training.seed, *((0, 1) if tp is None else (tp.rank, tp.degree)))
    if pipeline is None:
        model: nn.Module = deepcopy(whole)
        parts = [model]
    else:
        sizes = config.parallel.pp_split or shares(block_costs(whole, table, config.training.seq_len), len(pipeline.owners))
        mine = [stage for stage, rank in enumerate(pipeline.owners) if rank == mesh.coordinate("pp")]
        model = stages = split(whole, table, sizes, mine)
        parts = list(stages)
    refuse_without_triton(config.kernels, device)
    layers = list(float8_layers(table, config.precision))
    if layers and device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f'precision.float8: the {name} multiplies no 8-bit numbers, Ada and Hopper do; write "none"')
    for part in parts:
        use_kernels(part, table, config.kernels)
        if layers:
            swap(part, layers, config.precision.float8, config.kernels.float8_cast == "triton")
        replace_module(part, table.loss, LinearCrossEntropy(config.loss, config.kernels.linear_cross_entropy))
        if tp is not None:
            cut_model(part, table, styles(table, config.parallel.sharding), tp)
        _replace_cores(part, table, mesh, config, device)
        replace_dropouts(part, noise)
    sync = _share_data(parts, table, mesh, config, noise, device)
    plan = Plan(model, sync, noise, tp)
    if pipeline is not None and table.tied:
        plan.tied = TiedWeight(stages, pipeline.owners, mesh.group("pp"))
    return plan


def _share_data(
    parts: list[nn.Module], table: Sharding, mesh: Mesh, config: Config, noise: Noise, device: torch.device
) -> GradientSync:
    """Precision, recompute, compile, offload and FSDP or replicas, whose order matters."""
    param, reduce = getattr(torch, config.precision.param), getattr(torch, config.precision.reduce)
    if mesh.degree("pp") > 1:  # gradients of all micro batches add up where they are, before they are summed over ranks
        reduce = torch.float32
    units = [_units(part, table) for part in parts]
    if mesh.fsdp is None and param != torch.float32:
        for of_part in units:
            compute_in(of_part, param)
    modules = [dict(part.named_modules()) for part in parts]
    blocks = [of_part[name] for of_part in modules for name in matching(table.block, of_part)]
    if config.recompute.mode == "selective":
        recompute(blocks, config.recompute, noise)
        compile_blocks(blocks, config.compile)
    else:
        compile_blocks(blocks, config.compile)
        recompute(blocks, config.recompute, noise)
    if config.offload.activations:
        offload_activations([[of_part[name] for name in matching(table.block, of_part)] for of_part in modules], device)
    if mesh.fsdp is not None:
        policy = (mesh.fsdp, param, reduce, _reshard(config, mesh.fsdp.size()), config.offload.states)
        return Sharded([shard(of_part, *policy) for of_part in units], reduce)
    if mesh.degree("dp_replicate") > 1:
        parameters = lambda: [p for part in parts for p in part.parameters()]  # noqa: E731
        return Replicated(parameters, mesh.group("dp_replicate"), reduce)
    return GradientSync()


def _units(part: nn.Module, table: Sharding) -> list[nn.Module]:
    """What gathers its weights together, in the order it runs, the whole last. A tied weight is used again at the end."""
    modules = dict(part.named_modules())
    before = [modules[name] for name in table.before if name in modules and name != table.tied]
    return [*before, *(modules[name] for name in matching(table.block, modules)), part]


def _reshard(config: Config, ranks: int) -> bool | int:
    asked = config.parallel.reshard_after_forward
    if asked == "auto":
        return config.parallel.pp == 1
    return int(asked) if asked.isdecimal() and ranks > 1 else asked != "never"


def _replace_cores(part: nn.Module, table: Sharding, mesh: Mesh, config: Config, device: torch.device) -> None:
    compiled = config.compile.enable and config.compile.backend == "inductor" and config.recompute.mode != "selective"
    in_blocks = compiled and fused_is_slow(device, getattr(torch, config.precision.param))
    modules = dict(part.named_modules())
    for name in matching(table.core, modules):
        if mesh.degree("cp") > 1:
            replace_module(part, name, ContextAttention(mesh.group("cp"), config.parallel.cp_method))
        elif config.data.document_mask:
            replace_module(part, name, TiledAttention())
        elif in_blocks:
            replace_module(part, name, BlockAttention(modules[name]))
