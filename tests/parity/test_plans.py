"""Every plan computes what one process computes: weights to the bit, gradients to 3e-6, losses to 1e-5, in float32.

Single features once for three steps, models and seeds taking turns; with --slow all plans, five steps, both models, and three
seeds each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import KERNELS, PLANS, WITHOUT_SLOW, small

from titan.pool import Pool
from titan.verify import Verifier

MODELS = ("llama3", "gpt2")
CASES = [(plan, model, seed) for plan in PLANS for model in MODELS for seed in (1, 2, 3)]
TURNS = {(plan, MODELS[i % 2], 1 + i % 3) for i, plan in enumerate(PLANS) if plan in WITHOUT_SLOW}


CHATS = (
    "training.micro_batch_size=1",
    "dp_shard=4",
    "dp_replicate=2,data.document_mask=true",
    "tp=2,pp=2",
    "cp=2,pp=2,data.document_mask=true,data.packing=best_fit",
    "cp=4,cp_method=ulysses",
)


@pytest.fixture(scope="module")
def verifier(pool: Pool, pytestconfig: pytest.Config) -> Verifier:
    return Verifier(pool, steps=5 if pytestconfig.getoption("--slow") else 3)


@pytest.mark.parametrize(
    ("plan", "model", "seed"),
    [
        pytest.param(plan, model, seed, id=f"{plan}-{model}-{seed}".replace(KERNELS, "kernels"), marks=marks)
        for plan, model, seed in CASES
        for marks in [() if (plan, model, seed) in TURNS else pytest.mark.slow]
    ],
)
def test_a_plan_computes_what_one_process_computes(
    verifier: Verifier, short_documents: Path, plan: str, model: str, seed: int
) -> None:
    words = ["--model.dropout=0.1"] if model == "gpt2" else []
    words += ["--model.tied_embeddings=true"] if seed == 2 else ["--model.tied_embeddings=false"] if seed == 3 else []
    found = verifier.compare(small(short_documents, plan, model, f"--training.seed={seed}", *words))
    figures = f"loss {found.loss:.1e}, norm {found.norm:.1e}, gradient {found.gradient:.1e} ({found.worst})"
    print(f"\n{plan:70} {model} {seed}: {figures}")
    assert found.holds, figures


@pytest.mark.parametrize(("plan", "model", "seed"), [(plan, MODELS[i % 2], 1 + i % 3) for i, plan in enumerate(CHATS)])
def test_what_does_not_count_in_the_loss_counts_under_no_plan(
    verifier: Verifier, conversations: Path, plan: str, model: str, seed: int
) -> None:
    found = verifier.compare(small(conversations, plan, model, f"--training.seed={seed}"))
    assert found.holds, f"loss {found.loss:.1e}, norm {found.norm:.1e}, gradient {found.gradient:.1e} ({found.worst})"
