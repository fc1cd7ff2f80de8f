"""`titan trace --story`: what it says is what happened."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plans import CONFIG, small

from titan.cli import main
from titan.config import degrees
from titan.pool import Pool
from titan.story import listed, live, tell
from titan.traffic.shape import Flow
from titan.verify import one_process, run

PLANS = (
    "training.micro_batch_size=2",
    "dp_shard=2,offload.states=true",
    "dp_replicate=2,tp=2",
    "cp=2,pp=2,recompute.mode=full",
    "dp_shard=2,pp=2,pp_schedule=ZBVZeroBubble",
    "tp=4",
)


@pytest.mark.parametrize(("plan", "model"), [(plan, ("llama3", "gpt2")[i % 2]) for i, plan in enumerate(PLANS)])
def test_figures_are_those_of_the_step(pool: Pool, short_documents: Path, plan: str, model: str) -> None:
    config = small(short_documents, plan, model)
    world = degrees(config.parallel, 1).world
    alone = run(pool, one_process(config), 1, 3)
    everyone = pool.run(world, live, config, 3, pool.group_seconds)
    whole = sum(weight.size for weight in alone.initial.values())
    said = [dict(tell(config, world, facts)) for facts in everyone]
    for rank, (facts, story) in enumerate(zip(everyone, said, strict=True)):
        told = " ".join(story.values())
        assert f"mean loss {alone.losses[2]:.4f}" in told
        assert f"norm is {alone.norms[2]:.4g}" in told
        assert rank == facts.place.rank
        assert (world == 1) == ("No messages" in told)
        assert facts.messages == sum(flow.count for flow in facts.flows)
        assert facts.bytes == sum(flow.bytes for flow in facts.flows)
        told_of = [flow for flow in facts.flows if flow.phase not in ("count", "norm")]
        assert all(flow.what in told and f" over {flow.dimension}, " in told for flow in told_of), "every kind is told of"
        assert len(re.findall(r" over (?:dp|tp|cp|pp)", told)) == len(told_of)
        assert sum(facts.seconds.values()) > 0
    assert sum(facts.outcome.own for facts in everyone) == everyone[0].outcome.valid
    if "tp" not in plan and "replicate" not in plan and "cp" not in plan:
        tied = model == "gpt2" and "pp" in plan  # the last stage's copy
        padding = 2 * 32 * ("dp_shard" in plan)  # FSDP fills 259 rows up
        assert tied or whole <= sum(facts.own for facts in everyone) <= whole + padding


def test_samples_are_shared_out(pool: Pool, short_documents: Path) -> None:
    config = small(short_documents, "dp_replicate=2,dp_shard=2", "llama3")
    everyone = pool.run(4, live, config, 2, pool.group_seconds)
    batches = [dict(tell(config, 4, facts))["batch"] for facts in everyone]
    assert all("samples 8 to 15, 8 sequences of 32 tokens" in said for said in batches)
    assert [re.findall(r"2 of them, ([\d-]+)", said)[0] for said in batches] == ["8-9", "10-11", "12-13", "14-15"]


def test_the_command(short_documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [CONFIG, f"--data.path={short_documents}", "--data.tokenizer=bytes", "--model.n_layers=2", "--training.seq_len=32"]
    assert main(["trace", *words, "--plan", "pp=2", "--story", "--rank", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rank 1 of 2 (pp 1). It holds layers 1, norm, head" in out
    assert "Here the losses are made." in out
    assert "1F0 1B0 1F1 1B1" in out


def test_flows_are_told_in_the_plural() -> None:
    gather = Flow("forward", "tp", "all_gather", "float32", 1, 4, "a", "")
    sent = Flow("forward", "pp", "send", "float32", 2, 9, "b", "")
    assert listed([gather, sent]) == "1 all-gather over tp, 4 B: a; 2 messages sent over pp, 9 B: b."
