"""One model's whole way: trained with a tokenizer of its own, sampled, exported, imported, trained on; and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from titan.cli import main

Titan = Callable[..., str]
ROOT = Path(__file__).parents[2]
TINY = (
    "--model.n_layers=2",
    "--model.dim=64",
    "--training.seq_len=64",
    "--schedule.warmup_steps=2",
    "--data.tokenizer=train:500",
    "--validation.batches=0",
    "--metrics.trackers=[]",
    "--sample.tokens=12",
    '--sample.prompts=["The with", "x = "]',
)


def launch(folder: Path, *words: str, code: int = 0) -> str:
    """Run a command that starts ranks, all of its processes ended with it; what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "titan.cli", *words],
        cwd=folder,
        env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, said
    return said


@pytest.fixture
def titan(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Titan:
    """Run a command in this process, in the run's folder; what it said."""
    monkeypatch.chdir(trained[0])

    def run(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


def train(folder: Path, output: str, *words: str, code: int = 0) -> str:
    config = str(ROOT / "train_configs" / "debug.toml")
    return launch(folder, "train", config, f"--job.output={output}", *TINY, *words, code=code)


def records(folder: Path, output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("story")
    return folder, train(folder, "first", "--training.steps=6", "--validation.interval=3", "--sample.interval=1")


STEP = "first/checkpoints/step-00000006"


def test_samples_come_with_validations_and_at_the_end(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert said.count("The with") >= 2 * 1
    log = (folder / "first" / "logs" / "rank-0.log").read_text()
    assert log.count("samples after step 3") == log.count("samples after step 6") == 1, log
    assert {record["step"] for record in records(folder, "first") if "validation_loss" in record} == {3, 6}


def test_generate_goes_on_as_the_run_did(trained: tuple[Path, str], titan: Titan) -> None:
    _, said = trained
    words = ("--tokens", "12", "--seed", "1", "--temperature", "0.8", "--top-p", "0.95")
    alone = titan("generate", STEP, "The with", *words)
    assert titan("generate", "first", "The with", *words) == alone, "a run's folder stands for its newest step"
    ends = said[said.index("samples after step 6") :]
    shown = "".join(ends.split())
    assert "".join(alone.split()) in shown, "one process gives the sample of two ranks"
    assert titan("generate", STEP, "The with", *words[:2], "--seed", "2") != alone


def test_out_to_hugging_face_and_back_is_the_same_model(trained: tuple[Path, str], titan: Titan) -> None:
    folder, _ = trained
    titan("export", "hf", STEP, "exported")
    titan("import", "hf", "exported", "imported")
    greedy = ("x = ", "--tokens", "10", "--temperature", "0")
    assert titan("generate", "exported", *greedy) == titan("generate", STEP, *greedy)
    assert titan("generate", "imported", *greedy) == titan("generate", STEP, *greedy)
    # Training goes on from the import, with the tokenizer as it came back: at a learning rate of 0 the loss is the one
    # that the first run ended with.
    asked = ("--checkpoint.load=imported", "--data.tokenizer=imported", "--optimizer.lr=0", "--training.steps=2")
    train(folder, "second", *asked, "--validation.interval=2")
    wanted = records(folder, "first")[-1]["validation_loss"]
    assert records(folder, "second")[-1]["validation_loss"] == pytest.approx(wanted, rel=1e-6)


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused_before_any_rank_starts(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    words = ("--model.rope_theta=100", "--model.tied_embeddings=true")
    said = train(folder, "third", f"--checkpoint.load={STEP}", *words, "--training.steps=2", code=2)
    assert "set --model.tied_embeddings=false --model.rope_theta=500000.0" in said
    said = train(folder, "third", f"--checkpoint.load={STEP}", "--data.tokenizer=bytes", "--training.steps=2", code=2)
    assert "checkpoint.load" in said
    assert f'set data.tokenizer = "{STEP}/tokenizer.model"' in said
    assert not (folder / "third").exists()
