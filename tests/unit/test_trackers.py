"""Trackers, each for real and without a network: what was told can be read back, also after a resume; errors are warnings."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan.config import Config, Metrics, Model, Training
from titan.metrics.flops import Flops
from titan.metrics.history import read_history
from titan.metrics.log import NAMES, MetricsLog
from titan.metrics.peaks import Peak
from titan.metrics.trackers import InBackground, missing_packages, open_trackers, run_id
from titan.models.llama3.config import SIZES
from titan.ranks import Ranks


def train(output: Path, trackers: list[str], steps: range) -> None:
    """A run's calls: each step's loss is its number, and the odd ones have norms."""
    output.mkdir(exist_ok=True)
    metrics = Metrics(trackers=trackers, project="a test")
    config = Config(model=Model(config=SIZES["debug"]), training=Training(steps=10), metrics=metrics)
    ranks = Ranks(0, 1, torch.device("cpu"))
    log = MetricsLog(output, ranks, config, step=steps[0] - 1, tokens=0, flops=Flops(1, 1), peak=Peak(1.0, ""))
    for step in steps:
        log.add(10, 0.0)
        if step % 2:
            log.gradient_norms(step, {"layers.0": torch.tensor(step / 4), "head": torch.tensor(float("nan"))})
        record = log.measure(step, torch.tensor(float(step)), torch.tensor(1.0), 0.5)
        log.write(record | {"validation_loss": 2.0 * step, "validation_bits_per_byte": 1.0})
    log.samples(steps[-1], [("def", " f():\n    pass"), ("class", " C: ...")])
    log.close()


def events(output: Path) -> EventAccumulator:
    found = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_holds_the_run_and_a_resumed_one_takes_its_place(tmp_path: Path) -> None:
    train(tmp_path, ["tensorboard"], range(1, 5))
    train(tmp_path, ["tensorboard"], range(3, 7))  # killed after 4, resumed after 2
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("loss/train")] == [(s, float(s)) for s in range(1, 7)]
    assert [(e.step, e.value) for e in found.Scalars("loss/validation")] == [(s, 2.0 * s) for s in range(1, 7)]
    assert [e.value for e in found.Scalars("optimizer/lr")] == [0.5] * 6
    assert [(e.step, e.value) for e in found.Scalars("per_layer_grad_norm/layers.0")] == [(1, 0.25), (3, 0.75), (5, 1.25)]
    assert "per_layer_grad_norm/head" not in found.Tags()["scalars"], "NaN is no number"
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]}
    assert texts["sample/1/text_summary"] == ["    def f():\n        pass\n"] * 2, "each prompt by itself"
    assert texts["sample/2/text_summary"] == ["    class C: ...\n"] * 2
    assert "    [training]\n    steps = 10\n" in texts["config/text_summary"][0]
    assert not (tmp_path / "trackers.json").exists(), "TensorBoard needs no id"


def test_names_at_trackers_group_and_the_loss_comes_first(tmp_path: Path) -> None:
    train(tmp_path, ["tensorboard"], range(1, 2))
    names = sorted(events(tmp_path).Tags()["scalars"])
    assert names[0] == "loss/train"
    assert {name.split("/")[0] for name in names} == {"loss", "optimizer", "per_layer_grad_norm", "progress", "speed"}
    (record,) = read_history(tmp_path / "metrics.jsonl")
    assert set(NAMES) == set(record) - {"step", "time"}, "every figure has its name"


def test_wandb_offline_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(1, 3), range(2, 4)):
        train(tmp_path, ["wandb"], steps)
    run = run_id(tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run}.wandb"] * 2
    kept = files[1].read_bytes()
    for told in (b"a test", tmp_path.name.encode(), b"loss/validation", b"per_layer_grad_norm/layers.0", b"training"):
        assert told in kept, told
    pages = [page.read_text() for page in files[1].parent.rglob("*.html")]
    assert any("def f():\n    pass" in page for page in pages)
    assert any("class C: ..." in page for page in pages)


def test_without_credentials_wandb_stays_offline_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    train(tmp_path / "run", ["wandb"], range(1, 2))
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert "wandb sync" in capsys.readouterr().err


def test_mlflow_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for steps in (range(1, 4), range(3, 5)):
        train(tmp_path, ["mlflow"], steps)
    client = mlflow.MlflowClient(str(tmp_path / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("a test").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss/validation")}
    assert history == {1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0}
    assert run.data.metrics["per_layer_grad_norm/layers.0"] == 0.75
    samples = sorted(tmp_path.glob("mlruns/*/*/artifacts/sample/*/step-00000004.txt"))
    assert [sample.read_text() for sample in samples] == ["def f():\n    pass", "class C: ..."]
    assert list(tmp_path.glob("mlruns/*/*/artifacts/config/step-*.txt"))


def test_one_id_for_a_run(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "trackers.json").write_text("{")
    other = run_id(tmp_path)
    assert other != first
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"run": other}


class Recorder:
    """A tracker that fails, or dawdles, when it is told to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.told: list[Any] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        time.sleep(self.seconds)
        if "bad" in values:
            raise ConnectionError("the server is gone")
        self.told.append((step, values))

    def text(self, name: str, text: str, step: int) -> None:
        self.told.append((name, text, step))

    def close(self) -> None:
        self.told.append("closed")


def test_a_server_that_fails_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    tracker = InBackground("far", lambda: recorder)
    tracker.scalars(1, {"loss": 1.0})
    tracker.scalars(2, {"bad": 1.0})
    tracker.scalars(3, {"bad": 1.0})
    tracker.text("sample", "x", 3)
    tracker.close()
    assert recorder.told == [(1, {"loss": 1.0}), ("sample", "x", 3), "closed"]
    assert capsys.readouterr().err.count("the server is gone") == 1


def test_a_slow_server_is_waited_for_only_so_long(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = InBackground("far", lambda: Recorder(seconds=5), close_seconds=0.2)
    started = time.monotonic()
    tracker.scalars(1, {"loss": 1.0})
    assert time.monotonic() - started < 0.1
    tracker.close()
    assert time.monotonic() - started < 2
    assert "could be sent within" in capsys.readouterr().err


def test_a_tracker_that_cannot_be_opened_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Recorder:
        raise OSError("no such server")

    tracker = InBackground("far", refuse)
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    assert "no such server; the run goes on without it" in capsys.readouterr().err


def test_missing_packages_are_named_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "wandb").mkdir()  # what W&B leaves where it ran
    (tmp_path / "mlflow.py").write_text("raise SystemExit('imported')")
    assert missing_packages(["tensorboard", "wandb", "mlflow"]) == ["tensorboard", "wandb"]
    assert missing_packages([]) == []


def test_no_trackers_no_files(tmp_path: Path) -> None:
    assert open_trackers([], "titan", tmp_path, "", 0) == []
    assert list(tmp_path.iterdir()) == []
