"""Whole runs through real launches: one node, two nodes, torchrun; killed, stopped and resumed to the last digit."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest
from runs import TITAN, command, figures, finish, start, status, wait_for_step

from titan.metrics.profile import read, shares


@pytest.fixture(scope="module")
def undisturbed(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    said = finish(start([*TITAN, *command(topics, folder / "run")], folder), 0)
    assert "entropy of its unigrams" in said
    return folder / "run"


def test_a_run_leaves_what_it_promises(undisturbed: Path, topics: Path) -> None:
    assert status(undisturbed)["state"] == "finished"
    assert sorted(figures(undisturbed)) == list(range(1, 21))
    assert figures(undisturbed)[20][0] < 0.8 * figures(undisturbed)[1][0]
    names = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000020"]
    assert "step 20/20" in (undisturbed / "logs" / "rank-0.log").read_text()
    assert (undisturbed / "logs" / "rank-1.log").exists()
    again = finish(start([*TITAN, *command(topics, undisturbed)], undisturbed.parent), 0)
    assert "nothing left to do" in again


def test_stop_on_request_and_go_on(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    """By job.max_seconds, job.stop_after, a signal to the launcher, then to the end: the curve is the undisturbed one."""
    arguments = [*TITAN, *command(topics, tmp_path / "run")]
    finish(start([*arguments, "--job.max_seconds=0.001"], tmp_path), 75)
    assert status(tmp_path / "run")["step"] == 0
    finish(start([*arguments, "--job.stop_after=3"], tmp_path), 75)
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("stopped", 3)
    second = start(arguments, tmp_path)
    wait_for_step(tmp_path / "run", 5, second)
    second.send_signal(signal.SIGTERM)
    finish(second, 75)
    assert status(tmp_path / "run")["step"] >= 5
    finish(start(arguments, tmp_path), 0)
    got = figures(tmp_path / "run")
    assert got == figures(undisturbed)


def test_two_nodes_and_torchrun_give_the_same_numbers(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command(topics, tmp_path / "nodes")
    nodes = [start([*TITAN, *words], tmp_path, NPROC="1", NNODES="2", RDZV_ENDPOINT=f"127.0.0.1:{port}") for _ in range(2)]
    for node in nodes:
        finish(node, 0)
    assert figures(tmp_path / "nodes") == figures(undisturbed)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "titan.train"]
    looked = ("--profiling.start=2", "--profiling.steps=2", "--profiling.ranks=[1]")
    finish(start([*torchrun, *command(topics, tmp_path / "torchrun")[1:], "--job.stop_after=4", *looked], tmp_path), 1)
    (trace,) = (tmp_path / "torchrun" / "profile").iterdir()
    assert trace.name == "step-00000002-rank-1.json.gz"
    where = shares(read(trace))
    assert (where.steps, min(where.kinds["matmul"], where.kinds["loss"], where.kinds["optimizer"]) > 0) == (2, True)
    assert (status(tmp_path / "torchrun")["state"], status(tmp_path / "torchrun")["exit_code"]) == ("stopped", 75)
    assert figures(tmp_path / "torchrun") == {step: found for step, found in figures(undisturbed).items() if step <= 4}


def test_other_plans_go_on_with_the_same_curve(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    """Tensor and pipeline parallelism, then context parallelism, on as many ranks as the plan needs: the losses of FSDP."""
    words = command(topics, tmp_path / "run", "--parallel.dp_shard=1")
    plans = (["--parallel.tp=2", "--parallel.pp=2", "--job.stop_after=3"], ["--parallel.cp=2", "--job.stop_after=5"])
    for plan in plans:
        finish(start([*TITAN, *words, *plan], tmp_path, NPROC=""), 75)
    expected = figures(undisturbed)
    for step, found in figures(tmp_path / "run").items():
        assert found[0] == pytest.approx(expected[step][0], rel=1e-5)
    assert len(figures(tmp_path / "run")) == 5


def test_weights_from_another_run(undisturbed: Path, topics: Path, tmp_path: Path) -> None:
    """checkpoint.load starts at step 0 with the other run's weights; another shape of model is refused by name."""
    load = f"--checkpoint.load={undisturbed / 'checkpoints' / 'step-00000020'}"
    finish(start([*TITAN, *command(topics, tmp_path / "run", load, "--job.stop_after=1")], tmp_path), 75)
    before, after = figures(undisturbed), figures(tmp_path / "run")
    assert after[1][0] < before[10][0], "the loss does not start where the other run ended"
    said = finish(start([*TITAN, *command(topics, tmp_path / "other", load, "--model.n_layers=3")], tmp_path), 2)
    assert "n_layers is 2 there and 3 here; set --model.n_layers=2" in said


def test_a_resume_refuses_another_run(undisturbed: Path, topics: Path) -> None:
    words = command(topics, undisturbed, "--training.seed=2", "--training.steps=30")
    said = finish(start([*TITAN, *words], undisturbed.parent), 2)
    assert "job.output" in said
    assert "training.seed is 1 there, 2 here" in said
    assert "Traceback" not in said
    assert status(undisturbed)["state"] == "failed"


def test_a_mistake_that_only_the_ranks_can_see_is_an_exit_2(topics: Path, tmp_path: Path) -> None:
    """Under torchrun too the reason is in status.json: here a batch that three ranks do not divide, and too little data."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "titan.train"]
    finish(start([*torchrun, *command(topics, tmp_path / "a")[1:]], tmp_path), 1)
    assert (status(tmp_path / "a")["state"], status(tmp_path / "a")["exit_code"]) == ("failed", 2)
    assert "training.global_batch_size" in status(tmp_path / "a")["error"]
    said = finish(start([*TITAN, *command(topics, tmp_path / "b", "--training.seq_len=20000")], tmp_path), 2)
    assert "fewer than one sample" in said
