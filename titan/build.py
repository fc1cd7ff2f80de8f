"""Config, mesh and device -> the parts of a job. Training and everything that pretends to train come through here.

The model is made on the meta device, where a tensor has a shape and no memory; cut for this rank; and only then given
memory for what the rank holds, and initial weights for just that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from titan import zoo
from titan.batch import Batches
from titan.config import Config, accumulation
from titan.init import init_weights
from titan.layout import Cuts
from titan.norms import GradientNorms
from titan.optim import make_optimizer
from titan.parallel.apply import Plan, parallelize
from titan.parallel.mesh import Mesh
from titan.parallel.pipeline import Pipeline
from titan.parallel.schedules import Table
from titan.parallel.schedules import table as schedule
from titan.parallel.stages import Stages
from titan.parallel.tensor import PartialGradients
from titan.precision.float8 import float8_shards
from titan.sharding import Sharding
from titan.step import Accumulation, Passes, Step


@dataclass
class Parts:
    """What a rank trains with."""

    model: nn.Module
    """This rank's part of the model. Its parameters have the names that they have in the whole."""
    whole: nn.Module
    """The whole model, on the meta device."""
    cuts: Cuts
    """Which part of a parameter tensor parallelism left on this rank."""
    step: Step
    optimizer: torch.optim.Optimizer
    norms: GradientNorms
    table: Sharding


def cut(config: Config, device: torch.device, mesh: Mesh) -> tuple[nn.Module, Plan, Table | None]:
    """The whole model, and the rank's plan for it, both still without memory; and the pipeline's schedule, if there is one."""
    with torch.device("meta"):
        whole = zoo.make(config.model.name, config.model.config)
    pipeline, parallel = None, config.parallel
    if mesh.degree("pp") > 1:
        micros = accumulation(config.training, mesh.data_degree)
        pipeline = schedule(parallel.pp_schedule, mesh.degree("pp"), parallel.pp_stages_per_rank, micros)
    table = zoo.sharding(config.model.name, config.model.config)
    return whole, parallelize(whole, table, mesh, pipeline, config, device), pipeline


def build(config: Config, device: torch.device, mesh: Mesh) -> Parts:
    """The rank's model, materialised and initialised, its step function and its optimizer."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    return assemble(config, device, mesh, *cut(config, device, mesh))


def assemble(
    config: Config,
    device: torch.device,
    mesh: Mesh,
    whole: nn.Module,
    plan: Plan,
    pipeline: Table | None,
    initialise: bool = True,
) -> Parts:
    """The second half of `build`, of what `cut` made. initialise: whether the weights get values."""
    table, batches = zoo.sharding(config.model.name, config.model.config), Batches(config.training, device, mesh)
    plan.model.to_empty(device="cpu" if config.offload.states else device)
    if initialise:
        init_weights(plan.model, whole.init_rule, config.training.seed, plan.cuts, device)  # type: ignore[arg-type]
    if plan.tensor is not None:
        plan.partial = PartialGradients(dict(plan.model.named_parameters()), plan.tensor)
    if mesh.fsdp is not None and config.precision.float8 == "tensorwise":
        plan.float8 = float8_shards(plan.model, mesh.fsdp.get_group(mesh.fsdp.ndim - 1))
    passes: Passes = Accumulation(plan)
    if isinstance(plan.model, Stages):
        assert pipeline is not None
        passes = Pipeline(plan.model, pipeline, mesh.group("pp"), table, getattr(torch, config.precision.param), plan)
    optimizer = make_optimizer(plan.model, config.optimizer)
    counts = plan.tensor.counts if plan.tensor is not None else lambda name: True
    norms = GradientNorms(plan.model, whole, table.block, mesh, counts)
    return Parts(plan.model, whole, plan.cuts, Step(plan, passes, batches), optimizer, norms, table)
