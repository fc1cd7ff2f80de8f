"""Whole jobs that are killed, stopped, started twice or find their newest step damaged: what comes out, and what is said.

Five kills in CI; with --slow thirty. A failure prints its seed and what was killed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import TITAN, command, figures, finish, start, status, wait_for_step

from titan.checkpoint.commit import committed_steps, step_folder
from titan.checkpoint.manifest import verify

EVERY_STEP = ("--checkpoint.interval=1", "--checkpoint.keep_last=3", "--validation.interval=0", "--training.steps=30")


@pytest.fixture(scope="module")
def undisturbed(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start([*TITAN, *command(topics, folder / "run", *EVERY_STEP)], folder), 0)
    return folder / "run"


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of a job's ranks."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "titan.train" in line]


@pytest.mark.parametrize("seed", [pytest.param(i, marks=() if i == 0 else pytest.mark.slow) for i in range(6)])
def test_kill_9_at_any_instant_round_a_save(undisturbed: Path, topics: Path, tmp_path: Path, seed: int) -> None:
    """A rank, or the whole job, is killed at a random instant while every step is saved, and each time it is resumed; then the
    figures are those of an undisturbed run to the last digit, and so are the files of the last step."""
    draw, output = random.Random(seed), tmp_path / "run"
    for kill in range(5):
        beside = draw.choice(("true", "false"))
        process = start([*TITAN, *command(topics, output, *EVERY_STEP, f"--checkpoint.async_save={beside}")], tmp_path)
        done = (committed_steps(output / "checkpoints") or [0])[-1]
        wait_for_step(output, done + draw.randint(1, 4), process)
        time.sleep(draw.uniform(0, 0.3))
        ranks = ranks_of(process) if draw.random() < 0.5 else []
        if ranks:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            finish(process, 1, timeout=60)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
        saved = committed_steps(output / "checkpoints")
        print(f"seed {seed}, kill {kill}: {'a rank' if ranks else 'the job'}, async {beside}, steps {saved}")
        for step in saved:
            verify(step_folder(output / "checkpoints", step))
        assert (saved or [0])[-1] >= done, "a committed step was lost"
    finish(start([*TITAN, *command(topics, output, *EVERY_STEP)], tmp_path), 0)
    assert figures(output) == figures(undisturbed)
    assert committed_steps(output / "checkpoints") == [28, 29, 30]
    for file in ("shard-00000.safetensors", "shard-00001.safetensors"):
        last = Path("checkpoints") / "step-00000030" / file
        assert (output / last).read_bytes() == (undisturbed / last).read_bytes()


def test_a_damaged_step_costs_no_more_than_itself(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shard = tmp_path / "run" / "checkpoints" / "step-00000030" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    said = finish(start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP)], tmp_path), 0)
    assert "!!!!!!!!!!" in said
    assert "step-00000030 is damaged and is not used" in said
    assert "shard-00001.safetensors: not what was written" in said
    assert "after step 29" in said
    assert figures(tmp_path / "run") == figures(undisturbed)
    said = finish(start([*TITAN, "checkpoint", "list", str(tmp_path / "run")], tmp_path), 0)
    assert "newest" in said
    assert "step-00000030.damaged" in said
    finish(start([*TITAN, "checkpoint", "verify", str(tmp_path / "run")], tmp_path), 0)
    aside = str(tmp_path / "run" / "checkpoints" / "step-00000030.damaged")
    said = finish(start([*TITAN, "checkpoint", "verify", aside], tmp_path), 1)
    assert "shard-00001.safetensors: not what was written" in said


def test_two_jobs_in_one_folder_and_a_stop_file(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    """The second job is refused and disturbs nothing; a file named stop ends the first, saved; it is heeded once."""
    arguments = [*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, "--training.steps=2000")]
    first = start(arguments, tmp_path)
    wait_for_step(tmp_path / "run", 2, first)
    before = status(tmp_path / "run")
    said = finish(start(arguments, tmp_path), 2)
    assert "is in use by another job (node" in said
    assert f"pid {ranks_of(first)[0]}" in said or f"pid {ranks_of(first)[1]}" in said
    assert status(tmp_path / "run") == before
    (tmp_path / "run" / "stop").touch()
    reason = tmp_path / "reason"
    assert "all saved" in finish(first, 75)
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["reason"]) == ("stopped", "asked")
    assert not (tmp_path / "run" / "stop").exists()
    arguments = [word for word in arguments if "training.steps" not in word]
    finish(start([*arguments, "--training.steps=2000", "--job.max_seconds=2"], tmp_path, TITAN_REASON_FILE=str(reason)), 75)
    assert reason.read_text() == "out of time\n"
    assert status(tmp_path / "run")["reason"] == "out of time"


def test_a_changed_config_is_shown_and_another_run_is_refused_unless_named(
    undisturbed: Path, topics: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    changed = ("--training.steps=31", "--optimizer.lr=1e-4", "--training.seq_len=32")
    words = command(topics, tmp_path / "run", *EVERY_STEP, *changed)
    said = finish(start([*TITAN, *words], tmp_path), 2)
    assert "training.seq_len is 64 there, 32 here" in said
    assert """--checkpoint.accept_changes='["training.seq_len"]'""" in said
    said = finish(start([*TITAN, *words, '--checkpoint.accept_changes=["training.seq_len"]'], tmp_path), 0)
    assert "changed since step-00000030: optimizer.lr: " in said
    assert "changed since step-00000030: training.seq_len: 64 -> 32" in said
    assert sorted(figures(tmp_path / "run")) == list(range(1, 32))


def test_a_stop_in_the_middle_of_a_validation(topics: Path, tmp_path: Path) -> None:
    words = ("--validation.interval=1", "--validation.batches=0", "--training.steps=2000", "--training.seq_len=16")
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        process = start([*TITAN, *command(topics, run, *words)], tmp_path)
        wait_for_step(run, 1, process)  # written when the first validation is over
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        finish(process, 75)
        assert time.monotonic() - begun < 15
        stopped = status(run)
        assert stopped["state"] == "stopped"
        if len(figures(run)[stopped["step"]]) == 4:
            break  # without a validation; else the signal came in the moment after its end
    assert len(figures(run)[stopped["step"]]) == 4, "no signal met a validation"
    again = command(topics, run, *words, f"--job.stop_after={stopped['step']}")
    finish(start([*TITAN, *again], tmp_path), 75)
    assert len(figures(run)[stopped["step"]]) == 5, "the next start makes up for it"


@pytest.mark.parametrize("beside", ["true", "false"])
def test_ctrl_c_in_the_middle_of_a_save(undisturbed: Path, topics: Path, tmp_path: Path, beside: str) -> None:
    """In the warm-up, while every step is being saved: to all processes, as a terminal sends it, and again by the launcher."""
    words = command(topics, tmp_path / "run", *EVERY_STEP, f"--checkpoint.async_save={beside}")
    process = start([*TITAN, *words], tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert "all saved" in finish(process, 75)
    stopped = status(tmp_path / "run")
    last = committed_steps(tmp_path / "run" / "checkpoints")[-1]
    assert (stopped["state"], stopped["step"]) == ("stopped", last)
    verify(step_folder(tmp_path / "run" / "checkpoints", last))
    assert figures(tmp_path / "run") == {step: found for step, found in figures(undisturbed).items() if step <= last}


def test_a_nan_that_comes_once_leaves_no_trace(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    words = ("--job.fault=nan@5:1", "--job.stop_after=8")
    said = finish(start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, *words)], tmp_path), 75)
    assert "step 5: the gradient is no number, the losses are; no weight was changed, and the step is run again" in said
    assert "step 5: the second time it is a number: a fault of the machine, not of the data" in said
    assert figures(tmp_path / "run") == {step: found for step, found in figures(undisturbed).items() if step <= 8}


def test_a_nan_that_comes_again_is_left_out_or_ends_the_job(topics: Path, tmp_path: Path) -> None:
    words = [*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, "--training.steps=8", "--job.fault=nan-batch@5")]
    said = finish(start([*words, "--guard.nonfinite=stop"], tmp_path), 1)
    assert "BrokenError: step 5: the gradient is no number, the losses are, twice" in said
    assert status(tmp_path / "run")["state"] == "failed"
    assert committed_steps(tmp_path / "run" / "checkpoints") == [2, 3, 4]
    said = finish(start(words, tmp_path), 0)
    assert "step 5 is left out" in said
    assert sorted(figures(tmp_path / "run")) == list(range(1, 9))


def test_a_spike_is_left_out(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    words = ("--job.stop_after=12", "--guard.spike_sigmas=6", "--guard.spike_window=10", "--job.fault=spike@9")
    said = finish(start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, *words)], tmp_path), 75)
    assert re.search(r"step 9 is left out: its loss is [0-9.]+, far above what it was", said)
    assert said.count("left out") == 1
    before, after = figures(undisturbed), figures(tmp_path / "run")
    assert all(after[step][0] == before[step][0] for step in range(1, 9)), "before it nothing differs"
    assert after[10][0] != before[10][0], "the step was made"


def test_a_rank_that_hangs_is_found(topics: Path, tmp_path: Path) -> None:
    """The job ends by itself, says which rank is in no collective and where it is, and leaves all stacks in the logs."""
    words = ("--job.fault=hang@3:1", "--job.hang_seconds=5")
    said = finish(start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, *words)], tmp_path), 1, timeout=60)
    assert "no step for 5 s; where the ranks are:" in said
    first, second = (line for line in said.splitlines() if line.startswith(("  rank 0: step 3", "  rank 1: step 3")))
    assert "gloo:all_reduce" in first
    assert "fault.py" in second
    assert "before; no collective under way" in second
    for rank in (0, 1):
        assert "Thread 0x" in (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_rank_that_raises_is_what_the_user_sees(topics: Path, tmp_path: Path) -> None:
    process = start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, "--job.fault=raise@3:1")], tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    begun = time.monotonic()
    said = finish(process, 1)
    assert time.monotonic() - begun < 15
    assert "titan: rank 1 (node" in said
    assert "FaultError: job.fault: raised in step 3" in said.split("Traceback")[1]
    assert status(tmp_path / "run")["rank"] == 1


def test_a_save_that_fails_is_loud_and_the_next_one_is_tried(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    words = ("--job.fault=save@4:1", "--checkpoint.async_save=true", "--checkpoint.on_error=continue", "--job.stop_after=8")
    said = finish(start([*TITAN, *command(topics, tmp_path / "run", *EVERY_STEP, *words)], tmp_path), 75)
    assert "! titan: step 4 is not saved: " in said
    assert "job.fault: step 4 cannot be written" in said
    assert figures(tmp_path / "run") == {step: found for step, found in figures(undisturbed).items() if step <= 8}
    assert committed_steps(tmp_path / "run" / "checkpoints") == [6, 7, 8]
