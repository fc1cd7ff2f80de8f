"""`titan train`: this node's ranks, one process each, started through torch's elastic launcher.

One launcher a node. What is to run comes from the environment: NPROC ranks here (default: the GPUs, or on a CPU what the plan
needs, 2 at least), NNODES launchers that meet at RDZV_ENDPOINT; under `srun` both come from SLURM. Each rank runs
`python -u -m titan.train` and finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under torchrun. Unlike
torchrun the launcher keeps the ranks' exit codes (0 finished, 1 failed, 2 wrong config, 75 stopped and saved), lets them save
before it kills them, and shows the first failure instead of all of them. titan.elastic watches the ranks. torch is imported
only when they are started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan.checkpoint.about import refuse_another_model
from titan.checkpoint.commit import newest
from titan.config import Config, Data
from titan.cores import cores
from titan.logs import log_path
from titan.status import Exit, read_status, write_first_failure
from titan.stop import StoppedEarlyError, StopRequest

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

    from titan.data.prepare import PieceShare
    from titan.elastic import Agent

JOIN_SECONDS = 600


@dataclass(frozen=True)
class Node:
    """What one launcher starts: `nproc` ranks on this node, one of `nnodes`, which meet at `endpoint` ("host:port").

    `holds_store`: whether the meeting point is in this launcher; None lets torch compare the host's name with its own.
    """

    nproc: int
    nnodes: int = 1
    endpoint: str = "localhost:0"
    run_id: str = ""
    holds_store: bool | None = None

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes


def launch(config: Config, arguments: list[str], node: Node) -> int:
    """Run `titan.train` with `arguments` (CONFIG and its overrides) as this node's ranks; the exit code when all have ended."""
    command = [sys.executable, "-u", "-m", "titan.train", *arguments]
    return run_ranks(command, node=node, output=Path(config.job.output), shutdown_seconds=config.job.shutdown_seconds)


def prepare_data(config: Config, node: Node) -> None:
    """Make token shards of text before any rank starts and waits: it may take longer than a collective may.

    Of several nodes, the one that holds the meeting point does it, where that is known. Raises ValueError, FileNotFoundError or
    CheckpointError: also where there is too little text to train or validate on, and where checkpoint.load, if it counts, holds
    another model or was trained with another tokenizer.
    """
    from titan.data.splits import open_splits, prepared_tokenizer

    if node.holds_store is False:
        return
    load, data = config.checkpoint.load, make_shards(config)
    tokenizer = prepared_tokenizer(data)
    open_splits(data, tokenizer, config.training, config.validation.interval > 0)
    if load and newest(Path(config.job.output) / "checkpoints") is None:
        refuse_another_model(Path(load), config.model.name, config.model.config, tokenizer.fingerprint)


def make_shards(config: Config, workers: int | None = None, share: PieceShare | None = None) -> Data:
    """A config's data as token shards, made where they are not there yet. Raises ValueError, FileNotFoundError or Failed.

    workers, share: as in `titan.data.prepare.prepare`. That the model has a row for each token is checked first; for a
    tokenizer that is yet to be trained, titan.check did it.
    """
    from titan.data.prepare import ALL, TRAIN, require_rows
    from titan.data.splits import prepare_sources
    from titan.data.tokenizer import load_tokenizer

    if not config.data.tokenizer.startswith(TRAIN):
        require_rows(load_tokenizer(config.data.tokenizer), config.model.config)
    return prepare_sources(config.data, lambda line: print(line, flush=True), workers, share or ALL)


def visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a rank could use: the entries of CUDA_VISIBLE_DEVICES where it is set, else NVIDIA's device files."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sum(1 for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name))
    entries = [entry.strip() for entry in listed.split(",")]
    return next((i for i, entry in enumerate(entries) if entry in ("", "-1", "NoDevFiles")), len(entries))


def local_world(environ: Mapping[str, str] = os.environ, on_cpu: int = 2) -> Node:
    """What this launcher is to start, from NPROC, NNODES, RDZV_ENDPOINT, RDZV_ID or SLURM's variables.

    on_cpu: ranks where there is no GPU and NPROC says nothing. It imports no torch. Raises ValueError with a sentence that
    names the variable and what to do.
    """
    nproc = _count(environ, "NPROC") or visible_gpus(environ) or on_cpu
    under_srun = "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ
    nnodes = _count(environ, "NNODES") or _slurm_nodes(environ, under_srun)
    endpoint = environ.get("RDZV_ENDPOINT", "")
    if endpoint:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not (0 < int(port) < 65536):
            raise ValueError(f"RDZV_ENDPOINT={endpoint}: expected host:port, the first node's name and a free port on it")
    if nnodes == 1:
        return Node(nproc, 1, endpoint or "localhost:0", environ.get("RDZV_ID") or uuid.uuid4().hex)
    if not under_srun:
        if not endpoint:
            raise ValueError(f"NNODES={nnodes} needs RDZV_ENDPOINT=host:port: the first node's name and a free port on it")
        return Node(nproc, nnodes, endpoint, environ.get("RDZV_ID") or "titan")
    job, step = int(environ["SLURM_JOB_ID"]), environ["SLURM_STEP_ID"]
    run_id = environ.get("RDZV_ID") or f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    if endpoint:
        return Node(nproc, nnodes, endpoint, run_id)
    number = 10_000 + (31 * job + int(step)) % 20_000  # below the range that systems hand out to others
    return Node(nproc, nnodes, f"{_first_host(environ)}:{number}", run_id, environ.get("SLURM_NODEID") == "0")


def _count(environ: Mapping[str, str], name: str) -> int | None:
    """A whole number of 1 or more from the environment; None where it is not set."""
    text = environ.get(name, "")
    if text and not (text.isdigit() and int(text) >= 1):
        raise ValueError(f"{name}={text}: expected a whole number, 1 or more")
    return int(text) if text else None


def _slurm_nodes(environ: Mapping[str, str], under_srun: bool) -> int:
    """Nodes of the step that srun started, one launcher on each; 1 where there is no SLURM."""
    if not under_srun:
        allocated = _count(environ, "SLURM_JOB_NUM_NODES") or 1
        if allocated > 1 and "SLURM_PROCID" in environ:
            raise ValueError(
                f"the SLURM job has {allocated} nodes, but this is its batch script: start one launcher a node with"
                " `srun --ntasks-per-node=1 titan train ...`, or set NNODES=1 to use this node only"
            )
        return 1
    nodes = _count(environ, "SLURM_STEP_NUM_NODES") or _count(environ, "SLURM_NNODES") or 1
    tasks = _count(environ, "SLURM_STEP_NUM_TASKS") or nodes
    if tasks != nodes:
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} node(s), but titan starts the ranks itself: use `srun --ntasks-per-node=1`"
        )
    return nodes


def _first_host(environ: Mapping[str, str]) -> str:
    """The step's first node; the address that SLURM knows it by, where its name means nothing to this machine."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    host = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", host))
        host = found[1] if found else host
    return host


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"`scontrol {' '.join(arguments)}` failed ({error}): set RDZV_ENDPOINT=host:port instead") from error


def run_ranks(command: list[str], *, node: Node, output: Path, shutdown_seconds: float) -> int:
    """Run `command` as each rank of this node and wait for all of them; the exit code (0, 1, 2 or 75).

    `output` is where the logs lie and status.json tells of a failure that no rank could tell itself. After a signal the
    ranks get `shutdown_seconds` to save. Call it from the main thread, of a process that has nothing else to do: it
    handles signals, and sets OMP_NUM_THREADS and TITAN_LAUNCHER for the ranks in this process' environment.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // node.nproc)))
    os.environ["TITAN_LAUNCHER"] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are StopRequest's
    started = time.time()
    stop = StopRequest()
    try:
        with stop:
            agent = _run_agent(command, node, stop, shutdown_seconds)
    except StoppedEarlyError:
        _say(f"{stop.signal.name if stop.signal else 'signal'}: stopped before the ranks were started")
        return Exit.STOPPED
    except ConnectionError as error:
        _say(str(error))
        _note_failure(output, started, error=str(error), exit_code=Exit.FAILED, node=socket.gethostname())
        return Exit.FAILED
    by_signal = agent.ending is not None and (stop.at_once or agent.ending.code == Exit.STOPPED)
    if by_signal and (code := _saved_code(output, started)) is not None:  # it met ranks that were leaving
        _say("the ranks were ended at once; everything had been saved")
        return code
    if agent.ending is not None:
        _report(agent, output, started)
    return agent.code


def _run_agent(command: list[str], node: Node, stop: StopRequest, shutdown_seconds: float) -> Agent:
    """Meet the other nodes, start the ranks, watch them to their end. Raises ConnectionError where the nodes do not meet."""
    import torch.distributed.elastic.rendezvous as rendezvous
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from titan.elastic import Agent

    if "TITAN_DEBUG" not in os.environ:
        torch_log = logging.getLogger("torch.distributed.elastic")
        torch_log.addHandler(logging.NullHandler())
        torch_log.propagate = False
    arguments = tuple(word.replace("$", "$$") for word in command[1:])  # torch expands ${local_rank} in them
    with tempfile.TemporaryDirectory(prefix="titan-") as folder:
        try:
            handler = _meeting_point(node)
            spec = WorkerSpec(
                "rank", node.nproc, handler, entrypoint=command[0], args=arguments, max_restarts=0, monitor_interval=0.1
            )
            agent = Agent(spec, DefaultLogsSpecs(folder), stop, shutdown_seconds)
            try:
                agent.run()
            finally:
                handler.shutdown()
        except rendezvous.RendezvousError as error:
            what = f"{node.nnodes} launcher(s) did not meet at {node.endpoint}, or lost each other"
            raise ConnectionError(f"{what}: {error} {error.__cause__ or ''}".rstrip()) from error
    return agent


def _meeting_point(node: Node) -> RendezvousHandler:
    """Connect to the store through which the launchers meet, or hold it. Waits for a node that starts later."""
    import torch.distributed.elastic.rendezvous as rendezvous
    import torch.distributed.elastic.rendezvous.registry as registry

    options: dict[str, Any] = {"join_timeout": JOIN_SECONDS, "read_timeout": 30}
    if node.holds_store is not None:
        options["is_host"] = node.holds_store
    loopback = node.endpoint.rpartition(":")[0] in ("localhost", "127.0.0.1")
    address = "127.0.0.1" if loopback else None
    parameters = rendezvous.RendezvousParameters(
        "c10d", node.endpoint, node.run_id, node.nnodes, node.nnodes, address, **options
    )
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return registry.get_rendezvous_handler(parameters)
        except rendezvous.RendezvousConnectionError:
            if node.holds_store or node.nnodes == 1 or time.monotonic() > deadline:
                raise


def _report(agent: Agent, output: Path, started: float) -> None:
    """Say on the console, and in status.json where no rank could, why the ranks were ended."""
    ending = agent.ending
    assert ending is not None
    _say(f"{'on node ' + agent.elsewhere + ': ' if agent.elsewhere else ''}{ending.reason}")
    if ending.traceback:
        print(ending.traceback.rstrip(), file=sys.stderr, flush=True)
    if ending.rank is not None and os.path.exists(log := log_path(output, ending.rank)):
        _say(f"its log: {log}")
    if ending.code == Exit.FAILED and not agent.elsewhere:
        facts = {"exit_code": ending.code, "rank": ending.rank, "traceback": ending.traceback}
        _note_failure(output, started, error=ending.reason, node=socket.gethostname(), **facts)


def _note_failure(output: Path, started: float, **facts: object) -> None:
    """Write a failure into status.json; where that cannot be, say so: the console has the reason."""
    try:
        write_first_failure(output, started, **facts)
    except OSError as error:
        _say(f"status.json cannot be written: {error}")


def _saved_code(output: Path, started: float) -> int | None:
    """The exit code of a run that this start brought to its end, everything saved, before its ranks were ended; else None."""
    with contextlib.suppress(OSError, ValueError):
        status = read_status(output)
        if status and status["state"] in ("stopped", "finished") and status.get("time", 0) >= started:
            return Exit.STOPPED if status["state"] == "stopped" else Exit.FINISHED
    return None


def _say(text: str) -> None:
    print(f"titan: {text}", file=sys.stderr, flush=True)
