"""`titan plan --search`: what it looks at, that it finds the best, what it prints and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from titan import toml
from titan.check import problems
from titan.cli import main
from titan.config import Config, degrees
from titan.dryrun.cluster import read_cluster
from titan.dryrun.estimate import Cut, estimate, measure, model_of
from titan.dryrun.plan import plan_job
from titan.dryrun.prices import Prices
from titan.dryrun.search import search
from titan.dryrun.space import KEYS, Choice, choices
from titan.toml_edit import with_keys

CONFIGS = Path(__file__).parents[2] / "train_configs"
DEBUG = str(CONFIGS / "debug.toml")
WIDE = ["--model.n_layers=4", "--model.dim=1024", "--model.ffn_dim=2816", "--training.seq_len=1024", "--model.vocab_size=1024"]
SHORT = ["--training.seq_len=32", "--training.global_batch_size=4"]
H100 = read_cluster("h100")


def test_choices_multiply_up_and_keep_the_batch() -> None:
    config = toml.load(DEBUG, ["--training.seq_len=8192", "--training.global_batch_size=32"])
    found = list(choices(config, 8, 4))
    assert len(found) == len(set(found))
    for choice in found:
        plan = degrees(choice.on(config).parallel, 8)
        assert plan.world == 8
        assert choice.tp <= 4
        assert 32 % (plan.data_parallel * choice.micro_batch_size) == 0
    assert {choice.cp for choice in found} == {1, 2}, "4,096 tokens a rank"
    assert {choice.mode for choice in found} == {"none", "selective", "full"}
    assert set(found[0].keys()) == set(KEYS)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(1, 4, 1, 1, "ring", 1, "1F1B", 0, "auto", "none", 2, "none"),
        Choice(1, 2, 2, 1, "ring", 1, "1F1B", 0, "never", "selective", 4, "none"),
        Choice(1, 2, 1, 1, "ring", 2, "1F1B", 0, "auto", "full", 2, "none"),
        Choice(1, 1, 1, 1, "ring", 2, "Interleaved1F1B", 2, "auto", "none", 2, "none"),
        Choice(2, 1, 2, 1, "ring", 1, "1F1B", 0, "auto", "none", 2, "none"),
        Choice(1, 4, 1, 1, "ring", 1, "1F1B", 0, "never", "selective", 2, "tensorwise"),
        Choice(1, 1, 2, 1, "ring", 2, "1F1B", 0, "auto", "none", 2, "tensorwise"),
        Choice(2, 1, 1, 1, "ring", 1, "1F1B", 0, "auto", "none", 2, "tensorwise"),
        Choice(1, 2, 1, 1, "ring", 2, "GPipe", 0, "auto", "none", 1, "none"),
        Choice(1, 2, 2, 1, "ring", 1, "1F1B", 0, "auto", "none", 2, "rowwise"),
    ],
    ids=str,
)
def test_an_estimate_is_near_the_dry_run(choice: Choice) -> None:
    """Within an eighth, of a model whose products are large enough to take time."""
    config = toml.load(DEBUG, [*WIDE, "--precision.param=bfloat16", "--training.global_batch_size=32"])
    own = choice.on(config)
    (fit,) = measure(choice.cut, config, [H100])
    world = degrees(own.parallel, 1).world
    guess = estimate(own, degrees(own.parallel, world), fit, model_of(config), Prices(H100, tf32=False))
    job = plan_job(own, world, H100)
    assert guess.seconds == pytest.approx(job.time.seconds, rel=0.125)
    assert guess.bytes == pytest.approx(job.fullest.device_bytes, rel=0.125)


@pytest.mark.parametrize("cut", [Cut(2, 1, "ring", "full", "tensorwise"), Cut(1, 2, "ulysses", "selective", "none")])
def test_what_is_besides_blocks_is_measured_once(cut: Cut) -> None:
    """For all cuts that share tp, cp and Float8."""
    config = toml.load(DEBUG, [*WIDE, "--precision.param=bfloat16"])
    first = measure(cut._replace(cp_method="ring", recompute="none"), config, [H100])
    (like,), (alone,) = measure(cut, config, [H100], first), measure(cut, config, [H100])
    for sequences in (1, 3):
        assert like.block(sequences)[:5] == pytest.approx(alone.block(sequences)[:5])
        assert like.rest(sequences)[:5] == pytest.approx(alone.rest(sequences)[:5])
        assert like.peaks(sequences) == alone.peaks(sequences)


def test_no_legal_plan_is_better() -> None:
    """By force: every plan of a small space takes its dry run."""
    config = toml.load(DEBUG, [*WIDE, "--precision.param=bfloat16"])
    pins: dict[str, Any] = {"precision.float8": "none", "recompute.mode": "none"}
    pins |= {"parallel.reshard_after_forward": "auto", "training.micro_batch_size": 2}
    found = search(config, 2, H100, pins, lambda what, count, items: items)
    every = list(choices(config, 2, 8, pins))
    legal = [choice for choice in every if not problems(choice.on(config), 2, elsewhere=True)]
    assert len(legal) >= 5
    times = {choice: plan_job(choice.on(config), 2, H100).time.seconds for choice in legal}
    assert found.entries[0].job.time.seconds == pytest.approx(min(times.values()))
    assert found.plans == len(every)
    assert found.error < 0.125


def test_a_search_in_words_and_its_winner_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.toml"
    parallel = '[parallel]\nreshard_after_forward = "never"\npp_schedule = "Interleaved1F1B"\npp_stages_per_rank = 2\n'
    own.write_text(f"{Path(DEBUG).read_text()}\n{parallel}")
    words = [str(own), "--world-size=4", "--search", "--pin=parallel.tp=2", "--pin=recompute.mode=none"]
    words += ["--pin=parallel.reshard_after_forward=auto", "--training.seq_len=128"]
    assert main(["plan", *words, f"--out={tmp_path / 'best.toml'}"]) == 0
    said = capsys.readouterr().out
    assert "plans for 4 GPUs (H100 SXM)" in said
    assert "waiting for messages" in said
    first = next(line for line in said.splitlines() if "--plan " in line).split("--plan ")[1]
    assert "tp=2" in first
    winner = toml.load(str(tmp_path / "best.toml"), [])
    assert winner.training.seq_len == 128
    assert winner.parallel.tp == 2
    assert "Every plan's playground" in (tmp_path / "best.toml").read_text(), "comments stay"
    assert winner.parallel.reshard_after_forward == "auto"
    assert main(["plan", str(own), "--training.seq_len=128", "--world-size=4", f"--plan={first}", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["plan", str(tmp_path / "best.toml"), "--world-size=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == planned, "the words and the file are one plan"
    assert main(["plan", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"][0]["step_seconds"] == pytest.approx(planned["step_seconds"])
    seconds = [entry["step_seconds"] for entry in found["found"]]
    assert seconds == sorted(seconds)
    assert all(entry["keys"]["parallel.tp"] == 2 for entry in found["found"])


def test_float8_is_turned_on_only_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pins = ("recompute.mode=none", "training.micro_batch_size=4", "parallel.reshard_after_forward=auto")
    words = [DEBUG, "--world-size=1", "--search", "--model.n_layers=1", *SHORT, *(f"--pin={pin}" for pin in pins)]
    for more, said in ((("--precision.float8=rowwise",), "as it is"), (("--pin=precision.float8=rowwise",), "rowwise")):
        assert main(["plan", *words, "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["plans"] == 1
        assert [entry["keys"].get("precision.float8", "as it is") for entry in found["found"]] == [said]
    assert main(["plan", *words, "--float8"]) == 0
    printed = capsys.readouterr().out
    assert "3 plans for" in printed
    assert "precision.float8=tensorwise" in printed
    assert "precision.float8=rowwise" in printed
    assert "computes other numbers than CONFIG does" in printed


def test_what_more_memory_would_change() -> None:
    """Where memory forces recomputation, half as much again does not, and that is what is said."""
    config = toml.load(DEBUG, [*WIDE, "--precision.param=bfloat16"])
    pins: dict[str, Any] = {"parallel.dp_shard": 2, "training.micro_batch_size": 8, "parallel.reshard_after_forward": "auto"}
    pins["precision.float8"] = "none"
    show = lambda what, count, items: items  # noqa: E731
    plain = {mode: plan_job(choice.on(config), 2, H100).fullest.device_bytes / 2**30 for mode, choice in of_modes(pins, config)}
    assert plain["full"] < plain["none"] / 1.2
    room = (plain["none"] - 0.02 * plain["none"]) / 0.95
    tight = replace(H100, gpu=replace(H100.gpu, memory_gib=room, reserved_gib=0.0))
    found = search(config, 2, tight, pins, show)
    assert found.too_large > 0
    assert all(entry.choice.mode != "none" for entry in found.entries)
    choice, gain = found.elsewhere["half as much memory again"]
    assert choice.mode == "none"
    assert gain > 0
    assert search(config, 2, H100, pins, show).elsewhere == {}, "with enough memory nothing changes the order"


def of_modes(pins: dict[str, object], config: Config) -> list[tuple[str, Choice]]:
    return [(choice.mode, choice) for choice in choices(config, 2, 8, pins) if choice.mode in ("none", "full")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--search", "--plan=tp=2"], "--search finds a plan"),
        (["--pin=parallel.tp=2"], "--pin is for --search"),
        (["--float8"], "--float8 is for --search"),
        (["--search", "--float8", "--pin=precision.float8=none"], "leave one out"),
        (["--search", "--float8", "--precision.float8=rowwise"], "write --pin precision.float8=rowwise"),
        (["--search", "--pin=parallel.tpp=2"], "did you mean 'parallel.tp'?"),
        (["--search", "--pin=model.dim=2"], "others are given as --table.key=value"),
        (["--search", "--out=x.svg"], "name it x.toml"),
        (["--search", "--pin=parallel.pp_schedule=own.csv"], "plan with it without --search"),
        (["--search", "--world-size=4", "--pin=parallel.tp=3"], "no plan for 4 GPUs has what is pinned"),
        (["--search", "--pin=parallel.tp=2", "--pin=parallel.tp=1"], "pinned twice"),
        (["--search", "--pin=parallel.dp_shard=-1"], "-1 is what is left"),
        (["--search", "--parallel.tp=2"], "write --pin parallel.tp=2"),
        (["--search", "--out=/nowhere/best.toml"], "there is no folder /nowhere"),
        (["--search", "--parallel.sharding={\"layers.5.ffn\" = \"seq\"}"], "names a single block"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEBUG, *words]) == 2
    assert said in capsys.readouterr().err


def test_keys_are_set_in_a_file_and_all_else_stays() -> None:
    text = '# a run\n[a]\n# one\nx = 1  # why\n\n[b]\ny = "q"\n'
    assert with_keys(text, {"a.x": 2}) == text.replace("x = 1", "x = 2")
    assert with_keys(text, {"a.z": True, "c.w": "v"}) == text.replace("# why\n", "# why\nz = true\n") + '\n[c]\nw = "v"\n'
    assert with_keys(text, {}) == text
    odd = '[a]\r\nx = "a # b"  # don\'t touch\r\n'
    assert with_keys(odd, {"a.x": 2}) == "[a]\r\nx = 2  # don't touch\r\n"
    for odd in ("a = {x = 1}\n", "a.x = 1\n", "x = ["):
        with pytest.raises(ValueError, match=r"cannot be edited|Invalid|Unclosed"):
            with_keys(odd, {"a.x": 2})
