"""Each mistake of titan/mistakes.py is caught, by the comparison that all parity tests rest on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from plans import CONFIG, small

from titan.cli import main
from titan.mistakes import MISTAKES, has_place, made
from titan.pool import Pool
from titan.verify import DisagreeError, Verifier

WHERE = {
    "weights-by-rank": ("dp_shard=2", "llama3"),
    "same-samples": ("dp_replicate=2", "llama3"),
    "mean-of-means": ("dp_shard=4,data.document_mask=true,data.packing=best_fit", "llama3"),
    "no-sum": ("dp_replicate=2", "gpt2"),
    "partial-norms": ("tp=2", "gpt2"),
    "divided-twice": ("pp=2,pp_schedule=ZBVZeroBubble", "llama3"),
    "positions-from-zero": ("cp=2", "llama3"),
    "new-masks": ("recompute.mode=full", "gpt2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(pool: Pool, short_documents: Path, mistake: str) -> None:
    plan, model = WHERE[mistake]
    words = ["--model.dropout=0.1"] if model == "gpt2" else []
    config = small(short_documents, plan, model, *words)
    with suppress(DisagreeError):
        assert not Verifier(pool, 2, mistake).compare(config).holds
    assert Verifier(pool, 2).compare(config).holds, "and nothing of it stays"


def test_no_mistake_changes_nothing_and_each_says_what_it_is() -> None:
    with made(""):
        pass
    assert set(MISTAKES) == set(WHERE)
    for function in MISTAKES.values():
        assert function.__doc__
        assert len(function.__doc__) < 130


def test_the_command_says_what_is_wrong(short_documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [CONFIG, f"--data.path={short_documents}", "--data.tokenizer=bytes", "--model.n_layers=2", "--training.seq_len=32"]
    assert main(["verify", *words, "--plan", "dp_replicate=2", "--steps", "1", "--mistake", "no-sum"]) == 1
    out = capsys.readouterr().out
    assert "Replicas do not add up their gradients" in out
    assert "FAILED: rank 1 disagrees about" in out
    assert main(["verify", *words, "--plan", "tp=2", "--mistake", "no-sums"]) == 2
    assert "did you mean 'no-sum'" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_without_a_place_is_refused(short_documents: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    plan, model = WHERE[mistake]
    config = small(short_documents, plan, model, *(["--model.dropout=0.1"] if model == "gpt2" else []))
    assert has_place(mistake, config) == ""
    words = [CONFIG, "--plan", "training.micro_batch_size=2", "--mistake", mistake]
    assert main(["verify", *words]) == 2
    assert f"--mistake {mistake} has no place in it: it needs " in capsys.readouterr().err
