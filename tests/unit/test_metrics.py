"""FLOPs, peaks, the console's lines, the summary: what a run says of itself is right and fits the screen."""

from __future__ import annotations

import io
import json
import math
import random
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan.checkpoint.manager import Progress
from titan.config import Checkpoint, Config, Job, Metrics, Sample, Schedule, Training
from titan.config import Model as ModelTable
from titan.data.mixture import Mixture, Stage
from titan.logs import Tee
from titan.metrics.console import Console, bar, count, duration, line, rate, si, step_figures
from titan.metrics.flops import Flops, flops_per_token
from titan.metrics.history import number, numbers, read_history
from titan.metrics.log import MetricsLog, forget_after
from titan.metrics.peaks import PEAKS, Peak, data_sheet, find_peak, measured_flops
from titan.models.llama3.config import SIZES
from titan.models.llama3.config import Config as Llama
from titan.models.llama3.model import Transformer
from titan.ranks import Ranks
from titan.report import conclude, introduce, next_commands, results, wrapped
from titan.schedule import lr_share
from titan.status import Exit
from titan.terminal import beside, columns, labelled, lines, plain, showable

ALONE = Ranks(0, 1, torch.device("cpu"))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def a_record(dice: random.Random, steps: int) -> dict[str, Any]:
    """A step's figures, from tiny to huge."""
    return {
        "step": dice.randint(1, steps),
        "loss": dice.choice([dice.uniform(0, 20), math.nan, math.inf]),
        "grad_norm": 10 ** dice.uniform(-4, 5),
        "lr": 10 ** dice.uniform(-12, 0),
        "tokens_per_second": 10 ** dice.uniform(0, 10),
        "step_seconds": 10 ** dice.uniform(-3, 3),
        "data_seconds": 10 ** dice.uniform(-6, 1),
        "mfu": dice.uniform(0, 1.2),
        "memory_gib": 10 ** dice.uniform(-2, 3),
    }


def test_flops_count_matrices_and_half_the_attention() -> None:
    with torch.device("meta"):
        model = Transformer(SIZES["8b"])
        tied, untied = (Transformer(Llama(tied_embeddings=tied)) for tied in (True, False))
    block = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    assert flops_per_token(model, 8192) == Flops(6 * (32 * block + 128256 * 4096), 6 * 32 * 4096 * 8192)
    assert flops_per_token(tied, 64) == flops_per_token(untied, 64)


@pytest.mark.parametrize("seed", range(3))
def test_flops_are_what_torch_counts(seed: int) -> None:
    """Matrices exactly; attention as computed without a causal kernel is twice the causal half."""
    dice = random.Random(seed)
    heads = dice.choice([2, 4])
    config = Llama(
        dim=heads * dice.choice([8, 16]),
        n_layers=dice.randint(1, 3),
        n_heads=heads,
        n_kv_heads=2,
        ffn_dim=dice.randint(9, 50),
        vocab_size=dice.randint(20, 90),
        tied_embeddings=dice.random() < 0.5,
    )
    batch, length = dice.randint(1, 3), dice.randint(4, 20)
    model = Transformer(config)
    model.init_weights()
    tokens = torch.randint(config.vocab_size, (batch, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    expected = flops_per_token(model, length)
    assert counted.pop("aten.mm") == expected.matrices * batch * length, (seed, config)
    assert sum(counted.values()) == 2 * expected.attention * batch * length, (seed, config, counted)
    assert expected.total == expected.matrices + expected.attention


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI250X/MI250", 191.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("Quadro RTX 6000", None),
    ],
)
def test_a_gpu_is_known_by_the_driver_s_name_for_it(name: str, teraflops: float | None) -> None:
    found = data_sheet(name)
    assert (found and found[0] / 1e12) == teraflops


def test_every_peak_has_its_source() -> None:
    assert all(flops > 50 and ("data sheet" in source or "whitepaper" in source) for flops, source in PEAKS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_s_peak_is_measured_in_what_the_model_computes_in(dtype: torch.dtype) -> None:
    peak = find_peak(ALONE, dtype)
    assert "measured" in peak.source
    assert str(dtype).removeprefix("torch.") in peak.source
    again = max(measured_flops(ALONE.device, dtype) for _ in range(3))
    assert 0.1 < peak.flops / again < 10  # others use the machine


@pytest.mark.parametrize("seed", range(200))
def test_a_line_fits_its_terminal_and_keeps_what_matters(seed: int) -> None:
    dice = random.Random(seed)
    steps = 10 ** dice.randint(1, 6)
    record, width = a_record(dice, steps), dice.randint(40, 160)
    figures = step_figures(record, steps)
    said = line(figures, width, colours=False)
    assert len(said) <= width, (seed, said)
    assert said.startswith("step ")
    assert f"loss {record['loss']:.4f}" in said, (seed, said)
    assert "\x1b" not in said
    assert plain(line(figures, width, colours=True)) == said, seed
    ordinary = {**record, "grad_norm": 1.5, "loss": 2.5, "lr": 3e-4, "step_seconds": 1.5, "memory_gib": 79.1}
    at_80 = line(step_figures(ordinary, steps), 80, colours=False)
    assert all(word in at_80 for word in ("loss", "grad", "tok/s", "left")), (seed, at_80)
    if steps <= 100_000:
        at_120 = line(step_figures(ordinary, steps), 120, colours=False)
        assert all(word in at_120 for word in ("lr", " s ", "data", "GiB", "mfu", "left")), (seed, at_120)


def test_the_bar_fits_and_grows() -> None:
    dice = random.Random(1)
    for _ in range(300):
        steps, width = 10 ** dice.randint(1, 6), dice.randint(10, 160)
        drawn = bar(dice.randint(1, steps), steps, dice.choice([math.nan, 0.2, 1e5]), width)
        assert len(drawn) < width
    assert bar(50, 100, 2.0, 80).count("#") == 2 * bar(25, 100, 2.0, 80).count("#") > 0
    assert "1m40s left" in bar(50, 100, 2.0, 80)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (12.4, "12s"), (59.7, "1m00s"), (250, "4m10s"), (3599.8, "1h00m"), (4980, "1h23m"), (273600, "3d04h")],
)
def test_times_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
    assert duration(math.nan) == duration(math.inf) == "?"


def test_numbers_keep_to_their_room() -> None:
    dice = random.Random(2)
    for _ in range(500):
        value = 10 ** dice.uniform(0, 17)
        assert len(count(value)) <= 6, value
        shown, prefix = si(value).split(" ")
        assert float(shown) * 10 ** {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}[prefix] == pytest.approx(value, rel=6e-3)
    assert (count(12_345), count(1_234_567), si(989e12)) == ("12,345", "1.23M", "989 T")


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured", "moving"),
    [
        (True, {"TERM": "xterm"}, True, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True, True),
        (True, {"TERM": "dumb"}, False, False),
        (False, {"TERM": "xterm"}, False, False),
    ],
)
def test_escape_codes_only_where_a_terminal_wants_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, variables: dict[str, str], coloured: bool, moving: bool
) -> None:
    for key in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {**variables, "COLUMNS": "60"}.items():
        monkeypatch.setenv(key, value)
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "__stderr__", err)
    console = Console(100)
    console.progress(9)
    console.clear()
    console.step({**a_record(random.Random(0), 100), "step": 10})
    console.validation({"step": 10, "validation_loss": 1.0, "validation_bits_per_byte": 2.0})
    assert ("\x1b" in out.getvalue()) == coloured
    assert bool(err.getvalue()) == moving
    lengths = [len(plain(row)) for row in out.getvalue().splitlines()]
    assert len(lengths) == 2
    assert max(lengths) <= (60 if terminal else 120)
    assert (max(lengths) > 60) != terminal


def test_the_size_is_the_terminal_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "17")
    assert (lines(Terminal()), lines(io.StringIO())) == (17, None)
    monkeypatch.setenv("LINES", "0")
    assert lines(Terminal()) == 24  # a terminal that does not tell
    monkeypatch.setenv("COLUMNS", "47")
    assert columns(Terminal(), 120) == 47
    assert columns(io.StringIO(), 120) == 120
    monkeypatch.delenv("COLUMNS")
    assert columns(Terminal(), 120) == 80  # a terminal that does not tell


def test_the_log_s_copy_has_no_escape_codes() -> None:
    console, log = Terminal(), io.StringIO()
    Tee(console, log).write("\x1b[2mloss \x1b[0m\x1b[1m1.5\x1b[0m\n")
    assert "\x1b" in console.getvalue()
    assert log.getvalue() == "loss 1.5\n"


def test_text_of_a_model_cannot_drive_the_terminal() -> None:
    assert showable("a\x1b[2Jb\tc\nd\x00\x9b1m", Terminal()) == "a\ufffd[2Jb\tc\nd\ufffd\ufffd1m"
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert showable("é→\x07", narrow) == "???"


def test_labelled_text_wraps_beside_its_label() -> None:
    rows = labelled("model", "some words that go on " * 5, 40).split("\n")
    assert len(rows) > 2
    assert all(len(row) <= 40 for row in rows)
    assert rows[0].startswith("model    some")
    assert all(row.startswith(" " * 9 + "") and row[9] != " " for row in rows[1:])


def make_log(output: Path, trackers: list[str], step: int = 0) -> MetricsLog:
    config = Config(model=ModelTable(config=Llama()), training=Training(steps=100), metrics=Metrics(trackers=trackers))
    return MetricsLog(output, ALONE, config, step=step, tokens=0, flops=Flops(90, 10), peak=Peak(1e6, ""))


def test_a_record_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(tmp_path, [])
    log.add(500, 0.01)
    log.add(700, 0.02)
    record = log.measure(2, torch.tensor(2.5), torch.tensor(math.nan), 1e-3)
    log.write(record | {"validation_loss": 2.0, "validation_bits_per_byte": 1.5})
    log.close()
    (kept,) = read_history(tmp_path / "metrics.jsonl")
    assert (kept["step"], kept["loss"], kept["grad_norm"], kept["tokens"]) == (2, 2.5, None, 1200)
    assert kept["mfu"] == pytest.approx(kept["tokens_per_second"] * 100 / 1e6)
    assert kept["data_seconds"] == pytest.approx(0.015)
    said = capsys.readouterr().out
    assert "loss 2.5000" in said
    assert "validation loss 2.0000" in said
    assert "\x1b" not in said
    log.write(record | {"validation_loss": 3.0})  # of data that do not say how much text they are
    said = capsys.readouterr().out
    assert "validation loss 3.0000" in said
    assert "bits per byte" not in said


def test_samples_are_printed_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_log(tmp_path, []).samples(7, [("def f(", "x):\n\n    return\x1b[2J x\n"), ("a", "b")])
    wanted = ["samples after step 7:", "  1 def f(x):", "", "        return\ufffd[2J x", "  2 ab", ""]
    assert capsys.readouterr().out.split("\n") == wanted


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_s_long_lines_keep_their_indent(seed: int) -> None:
    dice = random.Random(seed)
    words = ["x" * dice.randint(1, 60) for _ in range(30)]
    width, lead = dice.randint(20, 100), dice.choice(["  1 ", "    "])
    rows = beside(lead, "    if " + " ".join(words) + "\n\nend", width).split("\n")
    assert max(map(len, rows)) <= width, seed
    assert rows[0].startswith(f"{lead}    if")
    assert all(row.startswith("    ") for row in rows[1:] if row), seed
    assert rows[-2:] == ["", "    end"]
    assert "".join("".join(rows).split()) == "".join([lead.strip(), "if", *words, "end"]), seed


def test_metrics_of_steps_done_again_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "loss": 0.1}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    assert [record["step"] for record in read_history(file)] == [1, 2, 3, 4, 5]
    forget_after(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_history_takes_the_later_line_and_passes_over_rubbish(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = ['{"step": 2, "loss": 1}', "[]", '{"step": 1, "loss": null}', '{"step": 2, "loss": 3}', "7", '{"step": true}']
    file.write_bytes("\n".join(lines).encode() + b'\n\xff{"st')
    records = read_history(file)
    assert [record["step"] for record in records] == [1, 2]
    assert numbers(records, "loss") == [3.0]
    assert number({"loss": True}, "loss") is None


def test_the_summary_is_of_the_whole_run() -> None:
    records: list[dict[str, Any]] = [
        {"step": s, "loss": 5.0 - s / 10, "tokens_per_second": 1000.0 * s, "mfu": 0.1 * s, "memory_gib": s / 4}
        for s in (1, 2, 3)
    ]
    records[1]["validation_loss"] = 4.25
    records[2]["validation_loss"] = 4.5
    records.append({"step": 4, "loss": None})
    said = dict(results(records))
    assert said["loss"] == "4.9000 at step 1, 4.7000 at step 3; best validation loss 4.2500 at step 2"
    assert said["speed"] == "2,000 tokens a second, mfu 20% (medians); a rank's memory at most 0.75 GiB"
    assert results([]) == []
    assert dict(results(records[:1]))["loss"] == "4.9000 at step 1"


def introduced(capsys: pytest.CaptureFixture[str], config: Config, step: int) -> str:
    parts = SimpleNamespace(whole=torch.nn.Linear(2, 2))
    split = SimpleNamespace(tokens=1000, token_counts=lambda limit: np.ones(9))
    windows = SimpleNamespace(count=4, datasets=[split])
    data = SimpleNamespace(names=["data"], windows=[windows], datasets=[split], mixture=Mixture([Stage(0, (1.0,))]))
    introduce(config, ALONE, parts, data, Progress(step, step, step), 0.001, Flops(1, 1), Peak(1.0, ""))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_start_says_where_its_weights_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(a_config(), model=ModelTable(config=Llama()), checkpoint=Checkpoint(load="old/step"))
    assert "loaded   weights of old/step\n" in introduced(capsys, config, 0)
    said = introduced(capsys, config, 7)
    assert "resumed  after step 7" in said
    assert "note     checkpoint.load is not used: outputs/a goes on from its step 7\n" in said
    said = introduced(capsys, replace(config, checkpoint=Checkpoint()), 7)
    assert "note" not in said
    assert "loaded" not in said


def test_where_nothing_is_left_to_do_little_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(a_config(), model=ModelTable(config=Llama()))
    config = replace(config, job=Job(output=str(tmp_path / "a")))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_per_second": 7}\n')
    assert "at step 150, training.steps is 100" in " ".join(introduced(capsys, config, 150).split())
    parts = SimpleNamespace(whole=torch.nn.Linear(2, 2))
    for started_at, short in ((150, True), (149, False)):
        conclude(config, parts, Progress(150, 0, 9), started_at, Exit.FINISHED, "", 1.0, ["a.toml"])  # type: ignore[arg-type]
        said = capsys.readouterr().out
        assert [word in said for word in ("finished ", "model ", "loss ", "speed ")] == [not short] * 4
        assert "--training.steps=300" in said


def test_the_end_fits_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("titan.report.columns", lambda stream, otherwise: 40)
    config = replace(a_config(), model=ModelTable(config=Llama()), job=Job(output=str(tmp_path)))
    parts = SimpleNamespace(whole=torch.nn.Linear(2, 2))
    for code in (Exit.FINISHED, Exit.STOPPED):
        conclude(config, parts, Progress(100, 0, 123_456_789), 0, code, "asked", 4000.0, ["a.toml"])  # type: ignore[arg-type]
        rows = capsys.readouterr().out.split("\n")
        assert all(len(row) <= 40 for row in rows if str(tmp_path) not in row), rows
        assert rows[1].startswith(" " * 9)


def a_config(**job: Any) -> Config:
    return Config(
        source="my runs/a.toml",
        job=Job(output="outputs/a", **job),
        model=ModelTable(),
        training=Training(steps=100),
        metrics=Metrics(trackers=[]),
        sample=Sample(prompts=["it's"]),
    )


def asked(config: Config, step: int, stopped: bool, words: list[str], saved: Path | None) -> list[list[str]]:
    return [command for command, _ in next_commands(config, step, stopped, words, saved)]


def test_the_next_commands_go_on_from_here() -> None:
    words = ["my runs/a.toml", "--training.steps=100", "--job.stop_after=40", "--optimizer.lr=1e-3"]
    saved = Path("outputs/a/checkpoints/step-00000040")
    stopped = asked(a_config(stop_after=40), 40, True, words, saved)
    assert stopped[0] == ["titan", "train", "my runs/a.toml", "--training.steps=100", "--optimizer.lr=1e-3"]
    assert ["titan", "generate", str(saved), "it's"] in stopped
    # stop_after from the TOML; a signal before stop_after; the end.
    assert asked(a_config(stop_after=40), 40, True, words[:1], saved)[0][2:] == [words[0], "--job.stop_after=none"]
    assert asked(a_config(stop_after=40), 30, True, words, saved)[0][2:] == words
    finished = asked(a_config(), 100, False, words[:2], saved)
    assert finished[-1] == ["titan", "train", "my runs/a.toml", "--training.steps=200"]
    assert ["titan", "export", "hf", str(saved), "outputs/a-hf"] in finished
    assert not any("generate" in command for command in asked(a_config(), 0, True, words, None))


@pytest.mark.parametrize(
    ("schedule", "rises"),
    [
        (Schedule("cosine"), True),
        (Schedule("linear"), True),
        (Schedule("wsd"), True),
        (Schedule("constant"), False),
        (Schedule("cosine", min_lr_ratio=1.0), False),
    ],
)
def test_a_rate_that_a_longer_run_raises_again_is_announced(schedule: Schedule, rises: bool) -> None:
    config = replace(a_config(), schedule=schedule)
    command, note = next_commands(config, 100, False, ["a.toml"], None)[-1]
    assert command[-1] == "--training.steps=200"
    assert bool(note) == rises
    if rises:
        assert "on to step 200" in note
        assert f"{rate(config.optimizer.lr * lr_share(schedule, 101, 200))} again" in note
    assert next_commands(config, 50, True, ["a.toml"], None)[0][1] == ""


def test_each_tracker_s_run_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(a_config(), metrics=Metrics(trackers=["tensorboard", "mlflow"]))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    commands = asked(config, 100, False, ["a.toml"], None)
    assert ["tensorboard", "--logdir", "outputs"] in commands
    assert any("ui" in command and command[-1] == "outputs/a/mlruns" for command in commands)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert not any("ui" in command for command in asked(config, 100, False, ["a.toml"], None))


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_a_wrapped_command_is_the_same_command(width: int) -> None:
    command = ["titan", "train", "a b.toml", *(f"--model.field{i}={i * 1000}" for i in range(9)), "it's"]
    text = wrapped(command, width)
    assert shlex.split(text.replace("\\\n", "")) == command
    assert all(len(row) <= max(width, 32) for row in text.split("\n"))
