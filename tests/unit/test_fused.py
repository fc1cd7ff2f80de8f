"""The keys of [kernels] reach the model: what it runs are the kernels' operations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titan import toml
from titan.build import build, cut
from titan.config import Config, Kernels
from titan.dryrun.world import pretended
from titan.fused import refuse_without_triton
from titan.parallel.mesh import Mesh

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
LAYERS = 8
NORMS = 2 * LAYERS + 1
EXPECTED = {
    "rms_norm": {"rms_norm": NORMS, "rms_norm_backward": NORMS},
    "rope": {"rope": 4 * LAYERS},
    "swiglu": {"swiglu": LAYERS, "swiglu_backward": LAYERS},
    "linear_cross_entropy": {"cross_entropy_add_block": 1, "cross_entropy_gradient": 1},
    "float8_cast": {"float8_cast": 7 * LAYERS * 5},  # input, weight; gradient, both ways; weight and input, turned
}


class Operations(TorchDispatchMode):
    """Counts those of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "titan":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ran(config: Config) -> dict[str, int]:
    """Kernels' operations of one step in one process."""
    parts = build(config, torch.device("cpu"), Mesh())
    tokens = torch.randint(512, (1, 33))
    with Operations() as seen:
        parts.step.forward_backward({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, 32, 1)
    return {name: count for name, count in seen.counts.items() if name != "float8_d_input"}


def read(*words: str) -> Config:
    small = ["--training.seq_len=32", "--training.global_batch_size=1", "--training.micro_batch_size=1"]
    return toml.load(DEBUG, [*small, *words])


@pytest.mark.parametrize("key", EXPECTED)
def test_a_key_puts_its_kernel_in(key: str) -> None:
    words = ["--precision.float8=rowwise"] if key == "float8_cast" else []
    assert ran(read(*words)) == {}
    assert ran(read(*words, f"--kernels.{key}=triton")) == EXPECTED[key]


@pytest.mark.parametrize("rank", [0, 1])
def test_so_it_does_in_a_part_of_the_layers(rank: int) -> None:
    config = read("--parallel.pp=2", "--kernels.rms_norm=triton", "--kernels.rope=triton", "--training.global_batch_size=2")
    with pretended(config, rank, 2) as mesh:
        modules = dict(cut(config, torch.device("cpu"), mesh)[1].model.named_modules())
    for name, module in modules.items():
        assert ("forward" in vars(module)) == name.endswith(("norm", "rope")), name
    assert sum(name.endswith("norm") for name in modules) == LAYERS + rank


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan.fused.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'^kernels\.rope = "triton": Triton is not installed; .*, or write "torch"'):
        refuse_without_triton(Kernels(rope="triton"), torch.device("cuda"))
    refuse_without_triton(Kernels(), torch.device("cuda"))
    refuse_without_triton(Kernels(rope="triton"), torch.device("cpu"))
