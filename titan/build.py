"""Config, mesh and device -> the parts of a job. Training and everything that pretends to train come through here.

The model is made on the meta device, where a tensor has a shape and no memory; cut for this rank; and only then given
memory for what the rank holds, and initial weights for just that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan import zoo
from titan.config import Config
from titan.init import init_weights
from titan.optim import make_optimizer
from titan.parallel.apply import parallelize
from titan.sharding import Sharding
from titan.step import Step


@dataclass
class Parts:
    """What a rank trains with."""

    model: nn.Module
    step: Step
    optimizer: torch.optim.Optimizer
    table: Sharding


def build(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Parts:
    """The rank's model, materialised and initialised, its step function and its optimizer. mesh: None for one process."""
    with torch.device("meta"):
        model = zoo.make(config.model.name, config.model.config)
    table = zoo.sharding(config.model.name, config.model.config)
    sync = parallelize(model, table, mesh, config.precision)
    model.to_empty(device=device)
    init_weights(model, model.init_rule, config.training.seed)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, config.optimizer)
    return Parts(model, Step(model, sync, config.training.micro_batch_size, device), optimizer, table)
