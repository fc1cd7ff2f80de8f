"""Float8 under plans. Scales are powers of two, so that what a rank rounds depends on its numbers alone.

Where a plan leaves the sums before a rounding as they are (it shares samples, weights or layers, computes again, or compiles),
gradients are those of one process to 3e-6, as without Float8. Tensor and context parallelism add up in another order: now and
then a number between two roundings goes the other way, in some runs none does. So there of several runs some have to be as
close, and all as close as Float8 is to float32."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plans import small
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titan.config import Config, Parallel, Precision, degrees
from titan.kernels.float8_cast import scale_for, scaled
from titan.pool import Pool
from titan.precision.float8 import E4M3
from titan.precision.float8_weight import Float8Weight
from titan.rehearsal import Rehearsal
from titan.verify import FLOAT32, Verifier, compare, one_process, run

EXACT = (
    "training.micro_batch_size=8",
    "dp_shard=2",
    "dp_replicate=2",
    "pp=2",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "recompute.mode=full",
    "recompute.mode=selective",
    "compile.enable=true,compile.backend=aot_eager",
    "dp_shard=2,compile.enable=true,compile.backend=aot_eager",
    "dp_shard=2,pp=2,pp_schedule=InterleavedZeroBubble",
    "dp_shard=2,offload.activations=true",
)
OTHER_SUMS = ("tp=2", "tp=2,async_tp=true", "cp=2", "dp_shard=2,tp=2")
RECIPES = ("tensorwise", "rowwise")


@pytest.fixture(scope="module")
def verifier(pool: Pool) -> Verifier:
    return Verifier(pool, steps=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("plan", "model"), [(plan, ("llama3", "gpt2")[i % 2]) for i, plan in enumerate(EXACT)])
def test_what_is_rounded_is_the_same(verifier: Verifier, short_documents: Path, plan: str, model: str, recipe: str) -> None:
    found = verifier.compare(small(short_documents, f"{plan},precision.float8={recipe}", model))
    assert found.holds
    assert found.gradient <= FLOAT32.gradient, f"{found.gradient:.1e} {found.worst}"
    assert found.loss <= FLOAT32.loss


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("plan", OTHER_SUMS)
def test_where_sums_differ_few_numbers_are_rounded_otherwise(
    verifier: Verifier, short_documents: Path, plan: str, recipe: str
) -> None:
    words = ["--model.n_layers=2", "--training.seq_len=16"]  # few numbers, so that most runs have none between two roundings
    plan = f"{plan},precision.float8={recipe}"
    asked = [small(short_documents, plan, "llama3", f"--training.seed={seed}", *words) for seed in range(1, 6)]
    found = [verifier.compare(config) for config in asked]
    errors = sorted(run.gradient for run in found)
    print("\n", plan, *(f"{error:.1e}" for error in errors))
    assert all(run.holds for run in found)
    assert errors[1] <= FLOAT32.gradient


def test_it_is_float8_that_is_compared(pool: Pool, short_documents: Path) -> None:
    """Against float32 each recipe is off by a few percent, and layers that are left out are not."""
    wide = one_process(small(short_documents, "precision.float8=rowwise", "llama3"))
    exact = run(pool, replace(wide, precision=Precision()), 1, 1)
    for recipe in RECIPES:
        found = compare(run(pool, replace(wide, precision=Precision(float8=recipe)), 1, 1), exact)  # type: ignore[arg-type]
        assert 5e-3 < statistics.median(found.gradients.values()) < 0.1
        assert 1e-6 < found.loss < 1e-3
    left = Precision(float8="rowwise", float8_skip=["layers.*.attention.*", "layers.*.ffn.gate", "layers.*.ffn.up"])
    one_layer = replace(left, float8_skip=[*left.float8_skip, "layers.0.*.*", "layers.1.*.*", "layers.2.*.*"])
    found = compare(run(pool, replace(wide, precision=one_layer), 1, 1), exact)
    assert found.gradients["layers.3.ffn.down.weight"] > 5e-3
    assert found.loss > 1e-7


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_weights_and_scales_are_those_of_one_process_to_the_bit(
    pool: Pool, short_documents: Path, ranks: int
) -> None:
    """After a few steps, so that weights are not as they were when the model was made; 3 ranks share no rows evenly."""
    words = [f"--training.global_batch_size={4 * ranks}"]
    plan = f"dp_shard={ranks},precision.float8=tensorwise,precision.param=bfloat16"
    config = small(short_documents, plan, "llama3", *words)
    for gathered in pool.run(ranks, gather, config, pool.group_seconds):
        assert len(gathered) == 4 * 7
        for name, (master, data, unscale, scale) in gathered.items():
            alone = scaled(torch.from_numpy(master), E4M3, False)
            assert torch.equal(torch.from_numpy(data), alone.data.view(torch.uint8)), name
            assert unscale == alone.unscale.item()
            assert scale == scale_for(torch.from_numpy(master).abs().max(), E4M3).item()


def gather(rank: int, config: Config, seconds: float) -> dict[str, tuple[np.ndarray, np.ndarray, float, float]]:
    """On a worker: whole masters of the Float8 layers, what FSDP gathers of them, and their scales."""
    job = Rehearsal(rank, config, seconds)
    for _ in range(2):
        job.step()
    plan = job.parts.step.plan
    plan.refresh()
    assert plan.float8 is not None
    masters: dict[str, np.ndarray] = {}
    numbers: dict[str, int] = {}
    for name, parameter in job.parts.model.named_parameters():
        if isinstance(parameter, DTensor) and hasattr(parameter._local_tensor, "fsdp_pre_all_gather"):
            numbers[name] = len(numbers)
            masters[name] = parameter.full_tensor().detach().numpy().copy()
    assert len(plan.float8.shards) == len(masters), (len(plan.float8.shards), len(masters))
    for module in job.parts.model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    found = {}
    for name, parameter in job.parts.model.named_parameters():
        if name in masters:
            assert isinstance(parameter, Float8Weight)
            data = parameter.data8.view(torch.uint8).numpy().copy()
            scale = plan.float8.scales[numbers[name]].item()
            found[name] = (masters[name], data, parameter.unscale.item(), scale)
    job.close()
    return found


def test_two_ranks_train_as_one_with_the_same_micro_batches(pool: Pool, short_documents: Path) -> None:
    """FSDP with Float8 on the wire, in float32 otherwise: losses within 1e-6 over five steps."""
    config = small(short_documents, "dp_shard=2,precision.float8=tensorwise", "llama3")
    assert degrees(config.parallel, 1).world == 2
    alone = replace(config, parallel=Parallel())
    found = compare(run(pool, config, 2, 5), run(pool, alone, 1, 5))
    assert found.gradient <= FLOAT32.gradient
    assert found.loss <= 1e-6


def test_ranks_without_a_row_of_any_float8_weight(pool: Pool, short_documents: Path) -> None:
    """Keys and values alone, 16 rows in 6 shards of 3: the last rank has none, and takes part all the same."""
    skip = 'precision.float8_skip=["layers.*.ffn.*","layers.*.attention.q","layers.*.attention.o"]'
    words = ["--model.n_kv_heads=1", "--training.global_batch_size=12"]
    config = small(short_documents, f"dp_shard=6,precision.float8=tensorwise,{skip}", "llama3", *words)
    assert compare(run(pool, config, 6, 2), run(pool, one_process(config), 1, 2)).gradient <= FLOAT32.gradient


def test_compiled_blocks_keep_no_copy_of_gathered_weights(pool: Pool, short_documents: Path) -> None:
    """What a block saves for its backward pass: of weights the bytes that FSDP frees and gathers again, in no other order."""
    # 128 tokens in a micro batch: no activation has as many elements as a weight.
    words = ["--compile.enable=true", "--compile.backend=aot_eager", "--training.micro_batch_size=4"]
    config = small(short_documents, "dp_shard=2,precision.float8=tensorwise", "llama3", *words)
    for saved, weights in pool.run(2, saved_in_float8, config, pool.group_seconds):
        assert weights
        assert saved <= weights


def saved_in_float8(rank: int, config: Config, seconds: float) -> tuple[set[int], set[int]]:
    """On a worker: where the Float8 tensors of weights' sizes lie that are saved in a step, and where weights do."""
    job = Rehearsal(rank, config, seconds)
    job.step()
    weights: set[int] = set()
    sizes: set[int] = set()
    for module in job.parts.model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for parameter in job.parts.model.parameters():
        if isinstance(parameter, Float8Weight):
            weights.add(parameter.data8.untyped_storage()._cdata)
            sizes.add(parameter.data8.numel())
    for module in job.parts.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        inner = tensor.data8 if isinstance(tensor, Float8Weight) else tensor
        if inner.dtype == E4M3 and inner.numel() in sizes:
            saved.add(inner.untyped_storage()._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        job.step()
    job.close()
    return saved, weights
