"""Where a run is followed besides its console: TensorBoard, Weights & Biases, MLflow, behind one small interface.

Each package is imported when its tracker is opened, on rank 0 alone. TensorBoard writes files beside the run. The other two
may talk to a server, so they are driven from a thread of their own: a server that is slow, or gone, costs a warning and not a
step. Both keep their own environment variables (WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI, ...). A resumed run goes on
in the same W&B and MLflow run, by an id of ours in <job.output>/trackers.json.
"""

from __future__ import annotations

import html
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from titan.files import write_atomically

CLOSE_SECONDS = 30.0


class Tracker(Protocol):
    """What a run tells of itself. Names are paths: "loss/validation"."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Finite numbers of a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """A text, such as the config or a sample, whose line breaks count."""

    def close(self) -> None:
        """Everything is told: write it out."""


def missing_packages(trackers: list[str]) -> list[str]:
    """Those of the trackers whose package is not installed. Nothing is imported.

    A folder of that name in the working directory, as W&B makes one, is not the package.
    """
    specs = {name: find_spec(name) for name in trackers}
    return [name for name, spec in specs.items() if spec is None or spec.origin is None]


def open_trackers(names: list[str], project: str, output: Path, config: str, step: int) -> list[Tracker]:
    """The trackers of a run that goes on after `step`, told of its config (TOML text). For rank 0."""
    run = run_id(output) if set(names) - {"tensorboard"} else ""
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(output, step),
        "wandb": lambda: InBackground("wandb", lambda: WandB(project, output, run, config)),
        "mlflow": lambda: InBackground("mlflow", lambda: MLflow(project, output, run)),
    }
    trackers = [openers[name]() for name in names]
    for tracker in trackers:
        tracker.text("config", config, step)
    return trackers


def run_id(output: Path) -> str:
    """What this run is called at the trackers: made once, kept in its folder."""
    file = output / "trackers.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        run = secrets.token_hex(8)
        write_atomically(file, json.dumps({"run": run}) + "\n")
        return run


class TensorBoard:
    """Event files in <job.output>/tensorboard."""

    def __init__(self, output: Path, step: int) -> None:
        """step: what an earlier start wrote of later ones is done again, and hidden."""
        from torch.utils.tensorboard import SummaryWriter  # 2 s of imports

        self.writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        # Shown as Markdown, where an indented block keeps its lines.
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), max(step, 1))

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run at Weights & Biases; without credentials or a connection it is kept in <job.output>/wandb for `wandb sync`."""

    def __init__(self, project: str, output: Path, run: str, config: str) -> None:
        import tomli
        import wandb

        options: dict[str, Any] = {
            "project": project,
            "name": output.name,
            "id": run,
            "resume": "allow",
            "dir": str(output),
            "config": tomli.loads(config),
            "settings": wandb.Settings(console="off", silent=True, init_timeout=60, finish_timeout=CLOSE_SECONDS - 5),
        }
        self.html = wandb.Html
        try:
            if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
                raise ConnectionError("no credentials (WANDB_API_KEY, or `wandb login`)")
            self.run: Any = wandb.init(**options)
        except Exception as error:
            warn(f"wandb: {error}; the run is kept on disk: `wandb sync {output}/wandb/offline-run-*` sends it")
            self.run = wandb.init(mode="offline", **options)
        # Its own step may only grow, and a resumed run goes back to its checkpoint's.
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        self.run.log({name: self.html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run at the server that MLFLOW_TRACKING_URI names; without one, in <job.output>/mlruns."""

    def __init__(self, project: str, output: Path, run: str) -> None:
        import mlflow
        from mlflow.entities import Metric

        uri = None
        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder, which needs no database and no server
            uri = str((output / "mlruns").absolute())
        self.metric = Metric
        self.client: Any = mlflow.MlflowClient(uri)
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(project)
        known = self.client.search_runs([number], f"tags.`titan.run` = '{run}'", max_results=1)
        if known:
            self.run: str = known[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
        else:
            self.run = self.client.create_run(number, run_name=output.name, tags={"titan.run": run}).info.run_id

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def text(self, name: str, text: str, step: int) -> None:
        self.client.log_text(self.run, text, f"{name}/step-{step:08d}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.run, "FINISHED")


class InBackground:
    """A tracker in a thread of its own: telling it something returns at once, and its errors are warnings."""

    def __init__(self, name: str, opener: Callable[[], Tracker], close_seconds: float = CLOSE_SECONDS) -> None:
        self.name = name
        self.close_seconds = close_seconds
        self.calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(opener,), name=name, daemon=True)
        self.thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.calls.put(lambda tracker: tracker.scalars(step, values))

    def text(self, name: str, text: str, step: int) -> None:
        self.calls.put(lambda tracker: tracker.text(name, text, step))

    def close(self) -> None:
        self.calls.put(lambda tracker: tracker.close())
        self.calls.put(None)
        self.thread.join(self.close_seconds)
        if self.thread.is_alive():
            warn(f"{self.name}: not everything could be sent within {self.close_seconds:.0f} s; metrics.jsonl has it all")

    def _work(self, opener: Callable[[], Tracker]) -> None:
        try:
            tracker = opener()
        except Exception as error:
            warn(f"{self.name}: {type(error).__name__}: {error}; the run goes on without it")
            return
        warned = False
        while (call := self.calls.get()) is not None:
            try:
                call(tracker)
            except Exception as error:
                if not warned:
                    warn(f"{self.name}: {type(error).__name__}: {error}; the run goes on, metrics.jsonl has it all")
                warned = True


def warn(text: str) -> None:
    print(f"titan: {text}", file=sys.stderr, flush=True)
