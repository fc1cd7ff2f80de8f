"""Real launches for tests: small runs of debug.toml in a session of their own, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TITAN = [sys.executable, "-m", "titan.cli"]
SMALL = (
    "--model.n_layers=2",
    "--training.seq_len=64",
    "--training.steps=20",
    "--schedule.warmup_steps=4",
    "--checkpoint.interval=10",
    "--validation.interval=10",
    "--metrics.interval=1",
    "--data.workers=1",
    "--metrics.trackers=[]",
)


def command(data: Path, output: Path, *words: str) -> list[str]:
    return [
        "train",
        str(ROOT / "train_configs" / "debug.toml"),
        f"--data.path={data}",
        "--data.tokenizer=bytes",
        f"--job.output={output}",
        *SMALL,
        *words,
    ]


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A launch in a session of its own, so that killing it leaves nothing."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    given = {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=clean | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int, timeout: float = 120) -> str:
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"not done within {timeout} s:\n{said}")
    assert process.returncode == code, said
    return said


def figures(output: Path) -> dict[int, tuple[Any, ...]]:
    """The figures of each step that must not depend on how the run came about."""
    keys = ("loss", "grad_norm", "lr", "tokens", "validation_loss")
    found: dict[int, tuple[Any, ...]] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["step"]] = (*found.get(record["step"], ()), *(record[k] for k in keys if k in record))
    return found


def status(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "status.json").read_text())
    return found


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (output / "metrics.jsonl").exists() and f'"step": {step},' in (output / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached within {timeout} s")
