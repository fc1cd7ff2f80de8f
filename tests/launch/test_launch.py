"""The launcher, with small scripts as ranks: exit codes, who is shown as the first to fail, and how long stopping takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan.launch import Node, local_world, visible_gpus
from titan.status import read_status

ROOT = Path(__file__).parents[2]
SLURM_BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0", "NPROC": "4"}
SRUN = SLURM_BATCH | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "1"}

LAUNCHER = """
import os, sys
from pathlib import Path
from titan.launch import local_world, run_ranks
script, output, seconds = sys.argv[1:]
command = [sys.executable, "-u", script, output]
sys.exit(run_ranks(command, node=local_world(), output=Path(output), shutdown_seconds=float(seconds)))
"""

RANK = """
import os, signal, sys, time
from pathlib import Path
rank, output = int(os.environ["RANK"]), Path(sys.argv[1])
def ready():
    (output / f"ready-{rank}").touch()
"""


def start(
    tmp_path: Path,
    body: str,
    *,
    shutdown_seconds: float = 20,
    environ: dict[str, str] | None = None,
    output: Path | None = None,
) -> subprocess.Popen[str]:
    """A launcher of two ranks (or NPROC) that run `body`."""
    script = tmp_path / "rank.py"
    script.write_text(RANK + body)
    command = [sys.executable, "-c", LAUNCHER, str(script), str(output or tmp_path), str(shutdown_seconds)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_", "TITAN_"))}
    env = clean | {"PYTHONPATH": str(ROOT), "NPROC": "2", "OMP_NUM_THREADS": "1"} | (environ or {})
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launcher: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a launcher that takes longer is killed and the test fails."""
    try:
        out, err = launcher.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        launcher.send_signal(signal.SIGQUIT)
        raise
    return launcher.returncode, out, err


def wait_for(*paths: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{[str(p) for p in paths if not p.exists()]} did not come in {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize(("rank_1", "expected"), [(0, 0), (75, 75), (2, 2)])
def test_the_ranks_exit_code_comes_out(tmp_path: Path, rank_1: int, expected: int) -> None:
    # Rank 1 leaves at once; where it has stopped on request, rank 0 is waited for and not ended.
    body = f"""
if rank == 1:
    sys.exit({rank_1})
time.sleep(1 if {rank_1} in (0, 75) else 100)
(output / "waited").touch()
sys.exit({rank_1})
"""
    code, out, err = finish(start(tmp_path, body))
    assert (code, out) == (expected, ""), err
    assert (tmp_path / "waited").exists() == (rank_1 in (0, 75))


def test_first_failure_is_shown_and_ends_the_others(tmp_path: Path) -> None:
    # Rank 0 fails too, because of rank 1, and leaves no later than it.
    body = """
import torch.distributed.elastic.multiprocessing.errors
from titan.logs import open_logs, record_failure
open_logs(output, rank)
print("noise on the console")
try:
    if rank == 1:
        raise ValueError("the cause, costs $5")
    while not (output / "status.json").exists():
        time.sleep(0.01)
    raise RuntimeError("connection closed by peer")
except Exception as error:
    record_failure(error, rank, output)
    ready()
    while not (output / "ready-0").exists():
        time.sleep(0.01)
    sys.exit(1)
"""
    code, out, err = finish(start(tmp_path, body))
    assert code == 1
    assert out == "noise on the console\n", "rank 0 alone keeps the console"
    assert "titan: rank 1 (node " in err
    assert "failed: ValueError: the cause, costs $5\nTraceback" in err
    assert err.count("Traceback") == 1, err
    assert "connection closed" not in err
    assert err.rstrip().endswith(str(tmp_path / "logs" / "rank-1.log"))
    assert "connection closed by peer" in (tmp_path / "logs" / "rank-0.log").read_text()
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["rank"], status["exit_code"]) == ("failed", 1, 1)
    assert "the cause" in status["error"]


def test_killed_rank_is_named_and_the_others_are_ended_quickly(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
while rank == 1 and not (output / "ready-0").exists():
    time.sleep(0.01)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    began = time.monotonic()
    code, _, err = finish(start(tmp_path, body, shutdown_seconds=90))
    assert code == 1
    assert "rank 1 (node " in err
    assert "was killed by signal SIGKILL (out of memory?)" in err
    assert time.monotonic() - began < 30, "a few seconds after the death, not shutdown_seconds"
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["rank"]) == ("failed", 1)


SAVING = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
ready()
while not asked:
    time.sleep(0.01)
time.sleep(seconds)
(output / f"saved-{rank}-{len(asked)}").touch()
sys.exit(75)
"""


def test_ranks_get_time_to_save(tmp_path: Path) -> None:
    # Rank 0 is done long before rank 1. A second signal, as SLURM sends it, changes nothing.
    launcher = start(tmp_path, "seconds = 6 * rank\n" + SAVING)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher)
    assert code == 75, err
    assert (tmp_path / "saved-0-1").exists()
    assert (tmp_path / "saved-1-1").exists(), "rank 1 was asked once, and had time"


def insist(launcher: subprocess.Popen[str]) -> None:
    """Ctrl-C until it is over, as a person would: a busy machine may take two that are 1.5 s apart for one."""
    deadline = time.monotonic() + 30
    while launcher.poll() is None and time.monotonic() < deadline:
        launcher.send_signal(signal.SIGINT)
        time.sleep(1.5)


def test_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    launcher = start(tmp_path, "seconds = 50\n" + SAVING, shutdown_seconds=60)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    insist(launcher)
    code, _, err = finish(launcher, 30)
    assert code == 1
    assert "stopped at once" in err


def test_second_ctrl_c_when_all_is_saved_loses_nothing(tmp_path: Path) -> None:
    body = """
from titan.status import write_status
ready()
while not (output / "asked").exists():
    time.sleep(0.01)
if rank == 0:
    write_status(output, "stopped", step=3, exit_code=75)
(output / f"saved-{rank}").touch()
time.sleep(100)
"""
    launcher = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + body)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.5)
    (tmp_path / "asked").touch()
    wait_for(tmp_path / "saved-0", tmp_path / "saved-1")
    insist(launcher)
    code, _, err = finish(launcher, 30)
    assert code == 75, err
    assert "everything had been saved" in err
    assert "lost" not in err
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["step"]) == ("stopped", 3)


@pytest.mark.parametrize(("state", "expected"), [("finished", 0), ("stopped", 75)])
def test_a_signal_that_meets_ranks_on_their_way_out(tmp_path: Path, state: str, expected: int) -> None:
    body = f"""
from titan.status import write_status
if rank == 0:
    write_status(output, "{state}", step=3, exit_code={expected})
ready()
time.sleep(100)
"""
    launcher = start(tmp_path, body)  # an interpreter that ends heeds no handler any more
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher, 30)
    assert code == expected, err
    assert "everything had been saved" in err
    assert "before there was anything to save" not in err


def test_an_output_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    launcher = start(tmp_path, "sys.exit(3)\n", output=tmp_path / "file" / "run")
    code, _, err = finish(launcher)
    assert code == 1
    assert "ended with exit code 3" in err
    assert "status.json cannot be written" in err
    assert "its log" not in err
    assert "Traceback" not in err


def test_rank_that_does_not_stop_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(100)\n"
    launcher = start(tmp_path, body, shutdown_seconds=2)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    began = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher, 30)
    assert code == 1
    assert 2 <= time.monotonic() - began < 10
    assert "ranks 0, 1: not done 2 s after the signal" in err
    status = read_status(tmp_path)
    assert status is not None
    assert status["state"] == "failed"


def test_signal_while_the_ranks_start_is_a_stop(tmp_path: Path) -> None:
    launcher = start(tmp_path, "ready()\ntime.sleep(100)\n")  # no handler yet: the signal ends the rank
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher, 30)
    assert code == 75, err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


TWO_NODES = {"NNODES": "2", "NPROC": "1"}


def test_two_launchers_form_one_world(tmp_path: Path) -> None:
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(1 + rank))
dist.all_reduce(total)
(output / f"rank-{rank}").write_text(f"{dist.get_world_size()} {total.item()} {os.environ['LOCAL_RANK']}")
dist.destroy_process_group()
"""
    environ = TWO_NODES | {"NPROC": "2", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
    for code, _, err in [finish(node) for node in [start(tmp_path, body, environ=environ) for _ in range(2)]]:
        assert code == 0, err
    assert sorted((tmp_path / f"rank-{rank}").read_text() for rank in range(4)) == ["4 10.0 0"] * 2 + ["4 10.0 1"] * 2


def test_failure_on_one_node_ends_the_other(tmp_path: Path) -> None:
    body = "time.sleep(1)\nif rank == 1:\n    sys.exit(3)\ntime.sleep(100)\n"
    environ = TWO_NODES | {"RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
    ends = [finish(node) for node in [start(tmp_path, body, environ=environ) for _ in range(2)]]
    assert [code for code, _, _ in ends] == [1, 1]
    assert all("rank 1 (node " in err and "ended with exit code 3" in err for _, _, err in ends), ends
    assert sum("titan: on node " in err for _, _, err in ends) == 1, "the other node says where it came from"


def test_local_world_defaults() -> None:
    here = local_world({})
    assert here.nproc == (visible_gpus({}) or 2)
    assert (here.nnodes, here.endpoint, here.world_size) == (1, "localhost:0", here.nproc)
    assert here.run_id != local_world({}).run_id, "two runs on one machine do not meet"


@pytest.mark.parametrize(
    ("listed", "expected"), [("0,1,5", 3), ("GPU-a", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,-1,1", 1)]
)
def test_visible_gpus(listed: str, expected: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == expected
    assert local_world({"CUDA_VISIBLE_DEVICES": listed}).nproc == (expected or 2)


def test_nodes_from_the_environment() -> None:
    environ = {"NPROC": "4", "NNODES": "2", "RDZV_ENDPOINT": "a:29400"}
    assert local_world(environ) == Node(4, 2, "a:29400", "titan")
    assert local_world(environ).world_size == 8
    assert local_world(SLURM_BATCH | {"NNODES": "1"}).world_size == 4
    assert local_world(SRUN | {"RDZV_ENDPOINT": "a:29400"}) == Node(4, 2, "a:29400", "77.3.0")


def test_nodes_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "127.0.0.1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    second, first = local_world(SRUN), local_world(SRUN | {"SLURM_NODEID": "0"})
    assert (second.nproc, second.nnodes, second.run_id, second.holds_store) == (4, 2, "77.3.0", False)
    assert first.holds_store
    assert first.endpoint == second.endpoint
    host, port = second.endpoint.split(":")
    assert host == "127.0.0.1"
    assert 10_000 <= int(port) < 30_000


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NPROC": "abc"}, "NPROC=abc: expected a whole number"),
        ({"NPROC": "0"}, "NPROC=0: expected a whole number, 1 or more"),
        ({"NNODES": "-1"}, "NNODES=-1"),
        ({"NNODES": "2"}, "needs RDZV_ENDPOINT=host:port"),
        ({"RDZV_ENDPOINT": "host"}, "expected host:port"),
        ({"RDZV_ENDPOINT": "host:70000"}, "expected host:port"),
        (SLURM_BATCH, "srun --ntasks-per-node=1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, "8 tasks on 2 node"),
    ],
)
def test_wrong_environment_is_a_sentence(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        local_world(environ)
