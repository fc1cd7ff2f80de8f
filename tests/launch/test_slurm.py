"""A real SLURM of two nodes on this machine: a job that is stopped, queued again, and goes on with one node.

Debian's slurm-wlm and munge serve for that, started here with files of their own; without them it is skipped.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, TITAN, command, figures, finish, start, status

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "setpriv")
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find the cluster."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"needs root and SLURM (Debian: slurm-wlm munge); not there: {', '.join(lacking) or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge's user has to reach its own folder in it
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    munge = pwd.getpwnam("munge")
    for name, owner in (("munge", munge.pw_uid), ("state", 0)):
        (folder / name).mkdir()
        os.chown(folder / name, owner, -1)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    os.chown(key, munge.pw_uid, munge.pw_gid)
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), ports=ports, folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    own = [f"--{what}={folder}/munge/{what}" for what in ("socket", "pid-file", "log-file", "seed-file")]
    user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
    daemons = [
        [*user, "munged", "--force", "--foreground", f"--key-file={key}", *own],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for daemon in daemons:
            process = subprocess.Popen(daemon, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 20)
            stack.callback(process.send_signal, signal.SIGKILL if "munged" in daemon else signal.SIGTERM)
            time.sleep(1)
        wait(lambda: said(environment, "sinfo", "-h", "-o", "%D %t") == "2 idle", 60, "two idle nodes", environment)
        stack.callback(subprocess.run, ["scancel", "--full", "--user=root"], env=environment, timeout=30, check=False)
        yield environment


def said(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def wait(holds: object, seconds: float, what: str, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():  # type: ignore[operator]
            return
        time.sleep(0.2)
    pytest.fail(f"no {what} within {seconds} s:\n{said(environment, 'scontrol', 'show', 'job')}")


def with_titan(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """The environment with a `titan` in the PATH."""
    titan = folder / "bin" / "titan"
    titan.parent.mkdir()
    titan.write_text(f'#!/bin/sh\nexec {sys.executable} -m titan.cli "$@"\n')
    titan.chmod(0o755)
    own = {"PATH": f"{titan.parent}:{environment['PATH']}", "PYTHONPATH": str(ROOT), "NPROC": "1", "OMP_NUM_THREADS": "1"}
    return environment | own


def test_tasks_of_a_job_share_a_preparation(slurm: dict[str, str], tmp_path: Path) -> None:
    environment = with_titan(slurm, tmp_path)
    row = '{"text": "' + "a line of some words\\n" * 40 + '"}\n'
    (tmp_path / "rows.jsonl").write_text(row * (16_000_000 // len(row)))
    words = [str(ROOT / "train_configs" / "debug.toml"), f"--data.path={tmp_path}/rows.jsonl", "--data.tokenizer=bytes"]
    words = ["data", "prepare", *words, "--data.validation_share=0", "--validation.interval=0"]
    for name, before in (("shared", ["srun", "--nodes=2", "--ntasks-per-node=1"]), ("alone", [])):
        command = [*before, "titan", *words, f"--data.cache={tmp_path}/{name}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        tasks = 2 if name == "shared" else 1
        assert done.stdout.count("data: making tokens of ") == tasks
        ready, share = done.stdout.count(": ready"), done.stdout.count("is done; the last task to finish puts the folder in")
        assert ready >= 1
        assert ready + share == tasks, done.stdout
    found = [{file.name: file.read_bytes() for file in tmp_path.glob(f"{name}/rows-*/*")} for name in ("shared", "alone")]
    assert found[0] == found[1]
    assert len(found[0]) > 3


@pytest.mark.timeout(600)
def test_a_job_that_is_queued_again_goes_on_with_the_nodes_it_gets(
    slurm: dict[str, str], topics: Path, tmp_path: Path
) -> None:
    steps = ("--training.steps=40", "--checkpoint.interval=20", "--validation.interval=0")
    undisturbed = start([*TITAN, *command(topics, tmp_path / "undisturbed", *steps)], tmp_path)
    environment = with_titan(slurm, tmp_path)
    finish(undisturbed, 0)

    words = command(topics, tmp_path / "run", *steps)[1:]
    batch = ["sbatch", "--parsable", "--nodes=2", "--time=30", f"--chdir={tmp_path}", str(ROOT / "slurm" / "train.sbatch")]
    number = said(environment, *batch, *words)
    log = tmp_path / f"titan-{number}.log"

    def written(text: str) -> bool:
        return log.exists() and text in log.read_text()

    wait(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(figures(tmp_path / "run")) > 3, 120, "steps", slurm)
    assert written("2 ranks on CPU")
    said(slurm, "scancel", "--batch", "--signal=USR1", number)
    wait(lambda: written(f"titan: job {number} is queued again"), 120, "requeue", slurm)
    stopped = status(tmp_path / "run")
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    assert 3 < stopped["step"] < 40
    wait(lambda: "JobState=PENDING" in said(slurm, "scontrol", "show", "job", number), 60, "pending job", slurm)
    for word in ("NumTasks=1", "NumNodes=1"):  # one node less, before it starts again (cred_expire is how long it waits)
        said(slurm, "scontrol", "update", f"JobId={number}", word)
    wait(lambda: status(tmp_path / "run")["state"] == "finished", 240, "end", slurm)
    text = log.read_text()
    assert f"resumed  after step {stopped['step']}" in text
    assert "1 rank on CPU" in text
    expected = figures(tmp_path / "undisturbed")
    got = figures(tmp_path / "run")
    assert sorted(got) == list(range(1, 41))
    for step, (loss, *_) in got.items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
