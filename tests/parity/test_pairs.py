"""The whole grid: every feature together with every other one is at parity, or refused with a sentence; none hangs.

In CI a few plans with many features each, chosen so that every pair is in one of them (a covering array); with --slow every
pair by itself, which is how to find out which two do not get on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from plans import KERNELS, small

from titan.config import Config, accumulation, degrees
from titan.parallel.schedule_file import as_csv
from titan.parallel.schedules import table
from titan.pool import Pool
from titan.toml import ConfigError
from titan.verify import Verifier

FACTORS: dict[str, tuple[str, ...]] = {
    "dp_replicate": ("dp_replicate=2",),
    "dp_shard": ("dp_shard=2",),
    "reshard": ("reshard_after_forward=never", "reshard_after_forward=always"),
    "tp": ("tp=2", "tp=2,async_tp=true", 'tp=2,sharding={"layers.*.ffn"="seq","layers.*.ffn.*"="seq"}'),
    "cp": ("cp=2", "cp=2,cp_method=allgather", "cp=2,cp_method=ulysses"),
    "pp": (
        "pp=2",
        "pp=2,pp_schedule=GPipe",
        "pp=2,pp_schedule=Interleaved1F1B",
        "pp=2,pp_schedule=InterleavedZeroBubble",
        "pp=2,pp_schedule=ZBVZeroBubble",
        "pp=2,pp_schedule=DualPipeV",
        "pp=2,pp_schedule=CSV",
    ),
    "recompute": ("recompute.mode=full", "recompute.mode=block", "recompute.mode=selective"),
    "compile": ("compile.enable=true,compile.backend=aot_eager",),
    "offload": ("offload.states=true", "offload.activations=true"),
    "float8": ("precision.float8=tensorwise", "precision.float8=rowwise,kernels.float8_cast=triton"),
    "loss": ("loss.chunk=700,loss.z_loss=0.01",),
    "kernels": (KERNELS,),
    "documents": ("data.document_mask=true", "data.document_mask=true,data.packing=best_fit"),
    "accumulation": ("training.micro_batch_size=1",),
    "model": ("model.tied_embeddings=true", "model.name=gpt2,model.dropout=0.1"),
}
FEATURES = [(factor, feature) for factor, features in FACTORS.items() for feature in features]
PAIRS = [(a[1], b[1]) for a, b in combinations(FEATURES, 2) if a[0] != b[0]]
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", "CSV")


def refused(features: Iterable[str]) -> bool:
    """What is refused, and nothing else: weight gradients cannot be put off inside a compiled block, what selective recompute
    keeps is not autograd's to give away, weights that travel as Float8 lie on the device, and 8 tokens of a rank's part of a
    sequence are too few for Float8."""
    plan = ",".join(features)
    selective = "recompute.mode=selective" in plan and "offload.activations" in plan
    away = "tensorwise" in plan and "offload.states" in plan
    few = all(word in plan for word in ("float8", "cp=2", '"seq"')) and ("micro_batch_size=1" in plan or "DualPipeV" in plan)
    return selective or away or few or ("compile.enable" in plan and any(name in plan for name in SPLIT_BACKWARD))


def world(features: Iterable[str]) -> int:
    return 2 ** sum(feature.startswith(("dp_", "tp=", "cp=", "pp=")) for feature in features)


@pytest.fixture(scope="module")
def verifier(pool: Pool) -> Verifier:
    return Verifier(pool, steps=2)


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Schedule files, by their number of micro batches."""
    folder = tmp_path_factory.mktemp("schedules")
    for count in range(1, 17):
        (folder / f"{count}.csv").write_text(as_csv(table("InterleavedZeroBubble", 2, 2, count).orders))
    return folder


def together(features: Iterable[str], data: Path, schedules: Path) -> Config:
    """A config with all these features, and as many micro batches as its schedule needs."""
    plan = ",".join(features)
    model = "gpt2" if "model.name=gpt2" in plan else "llama3"
    plan = plan.replace("model.name=gpt2,", "").replace("CSV", "GPipe" if refused(features) else "CSV")
    words = ["--model.n_layers=4"]
    if "DualPipeV" in plan:
        plan += ",training.micro_batch_size=1,training.global_batch_size=16"
    if "CSV" not in plan:
        return small(data, plan, model, *words)
    probe = small(data, plan.replace("CSV", "GPipe"), model, *words)
    count = accumulation(probe.training, degrees(probe.parallel, 1).data_parallel)
    return small(data, plan.replace("CSV", str(schedules / f"{count}.csv")), model, *words)


def hold(verifier: Verifier, features: Iterable[str], data: Path, schedules: Path) -> None:
    found = verifier.compare(together(features, data, schedules))
    figures = f"loss {found.loss:.1e}, norm {found.norm:.1e}, gradient {found.gradient:.1e} ({found.worst})"
    print(f"\n{' + '.join(features)}: {figures}")
    assert found.holds, figures


def most(features: Iterable[str]) -> int:
    """Ranks on which to put them: compiling is slow, and each rank does it."""
    return 4 if any("compile.enable" in feature for feature in features) else 8


def covering(seed: int) -> list[list[str]]:
    """Sets of features, on few ranks, in which every pair that is not refused stands together."""
    draw = random.Random(seed)
    missing = {frozenset(pair) for pair in PAIRS if not refused(pair)}
    found = []
    while missing:
        best: list[str] = []
        gain = 0
        for _ in range(20):
            chosen: list[str] = list(draw.choice(sorted(map(sorted, missing))))
            factors = list(FACTORS)
            draw.shuffle(factors)
            for factor in factors:
                feature = draw.choice(FACTORS[factor])
                wanted = [*chosen, feature]
                if not set(FACTORS[factor]) & set(chosen) and world(wanted) <= most(wanted) and not refused(wanted):
                    chosen = wanted
            covered = sum(pair <= set(chosen) for pair in missing)
            if covered > gain:
                best, gain = chosen, covered
        # What adds no pair is left out: compiling is slow, and would be in half of the plans.
        best = [feature for feature in best if any(feature in pair and pair <= set(best) for pair in missing)]
        found.append(sorted(best))
        missing -= {pair for pair in missing if pair <= set(best)}
    return found


COVERING = covering(56)


@pytest.mark.parametrize("features", COVERING, ids=" + ".join)
def test_features_get_on_together(verifier: Verifier, short_documents: Path, schedules: Path, features: list[str]) -> None:
    hold(verifier, features, short_documents, schedules)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not refused(pair)], ids=" + ".join)
def test_each_pair_by_itself(verifier: Verifier, short_documents: Path, schedules: Path, pair: tuple[str, str]) -> None:
    hold(verifier, pair, short_documents, schedules)


def test_what_is_refused_says_what_to_use_instead(short_documents: Path, schedules: Path) -> None:
    count = 0
    for pair in PAIRS:
        if refused(pair) and "CSV" not in ",".join(pair):
            with pytest.raises(ConfigError, match=r'compile.*1F1B|selective.*"full"|device.*"rowwise"'):
                together(pair, short_documents, schedules)
            count += 1
        elif not refused(pair):
            together(pair, short_documents, schedules)
    assert count == 5
