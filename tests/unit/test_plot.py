"""`titan plot`: the picture holds what the metrics say, in a terminal of any width and as SVG."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from titan.commands import plot
from titan.commands.plot import run
from titan.metrics.plot import MOST_POINTS, Axis, X, Y, axis, curve, log_ticks, picture, round_ticks, shown_ticks, thinned
from titan.metrics.plot_svg import svg
from titan.metrics.plot_text import LEAST_ROWS, USUAL_ROWS, text
from titan.terminal import plain
from titan.toml import ConfigError

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder: Path, dice: random.Random, steps: int = 200) -> list[dict[str, float | None]]:
    """A run's metrics, with holes and a last line that is cut."""
    folder.mkdir(parents=True)
    records: list[dict[str, float | None]] = []
    for step in sorted({1, steps, *(dice.randint(1, steps) for _ in range(40))}):
        record: dict[str, float | None] = {
            "step": step,
            "loss": dice.choice([None, 2.0, 3.0, 4.0]) if dice.random() < 0.2 else 2 + 4 * math.exp(-step / 50),
            "grad_norm": dice.uniform(0.1, 3),
            "lr": 1e-3,
            "tokens": step * 100,
            "tokens_per_second": dice.uniform(10, 1e6),
            "step_seconds": dice.uniform(0.1, 2),
            "mfu": dice.random(),
        }
        if dice.random() < 0.2:
            record["validation_loss"] = dice.uniform(2, 6)
        records.append(record)
    records[-1]["loss"] = 2.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 9999, "lo')
    return records


@pytest.mark.parametrize("seed", range(5))
def test_points_lie_where_the_data_says(tmp_path: Path, seed: int) -> None:
    """Ticks give the scale: from their places and values each point's place follows."""
    dice = random.Random(seed)
    records = write_run(tmp_path / "a", dice)
    write_run(tmp_path / "b", dice)
    log = bool(seed % 2)
    files = {name: tmp_path / name / "metrics.jsonl" for name in ("a", "b")}
    page = ElementTree.fromstring(svg(picture(files, log=log)))
    ticks: dict[str, list[tuple[float, float]]] = {"middle": [], "end": []}
    for label in page.iter(f"{SVG}text"):
        if label.get("class") == "small" and re.fullmatch(r"[\d.]+", label.text or ""):
            at = float(label.get("x", "")) if label.get("text-anchor") == "middle" else float(label.get("y", "")) - 4
            ticks[label.get("text-anchor", "")].append((float(label.text or ""), at))

    def place(value: float, axis: str, scale: bool) -> float:
        (v1, p1), (v2, p2) = ticks[axis][0], ticks[axis][-1]
        v, v1, v2 = (math.log(x) if scale else x for x in (value, v1, v2))
        return p1 + (v - v1) / (v2 - v1) * (p2 - p1)

    line = next(p for p in page.iter(f"{SVG}polyline"))
    drawn = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    points = [(r["step"], r["loss"]) for r in records]
    wanted = [(place(x or 0, "middle", False), place(y, "end", log)) for x, y in points if y is not None]
    assert len(drawn) == len(wanted), seed
    for got, expected in zip(drawn, wanted, strict=True):
        assert got == pytest.approx(expected, abs=0.6), seed
    held = [c for c in page.iter(f"{SVG}circle") if c.get("class") == "held" and c.get("stroke") == line.get("stroke")]
    assert len(held) == sum("validation_loss" in r for r in records)
    width, height = float(page.get("width", 0)), float(page.get("height", 0))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn)


def test_names_are_escaped(tmp_path: Path) -> None:
    name = 'a<b>&"c\x07</svg>'
    write_run(tmp_path / "a", random.Random(0))
    page = svg(picture({name: tmp_path / "a" / "metrics.jsonl", "other": tmp_path / "a" / "metrics.jsonl"}))
    texts = [element.text or "" for element in ElementTree.fromstring(page).iter(f"{SVG}text")]
    assert 'a<b>&"c\ufffd</svg>' in texts


@pytest.mark.parametrize("seed", range(30))
def test_every_figure_fits_every_terminal(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    files = {}
    for i in range(dice.randint(1, 8)):
        write_run(tmp_path / f"run{i}", dice, dice.choice([2, 50, 10_000_000]))
        files["run" * dice.randint(1, 30) + str(i)] = tmp_path / f"run{i}" / "metrics.jsonl"
    drawn = picture(files, dice.choice(list(X)), dice.choice(list(Y)), dice.random() < 0.3)
    width = dice.randint(30, 160)
    colours, unicode = dice.random() < 0.5, dice.random() < 0.5
    height = dice.choice([None, dice.randint(1, 60)])
    shown = text(drawn, width, height, colours, unicode)
    assert all(len(plain(row)) <= width for row in shown.splitlines()), (seed, shown)
    assert ("\x1b" in shown) == colours
    assert shown.isascii() or unicode
    said = len(shown.splitlines())
    if height is None:
        assert said >= USUAL_ROWS + 4
    else:  # the least: a title of two lines, the axis, a line for each run
        assert said <= max(height, LEAST_ROWS + 4 + len(files) + 1), seed
    ElementTree.fromstring(svg(drawn))


def test_the_terminal_s_curve_falls_as_the_loss_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {100 - s}}}\n' for s in range(101)))
    rows = text(picture({"a": tmp_path / "a" / "metrics.jsonl"}), 60, None, False, False).splitlines()[1 : USUAL_ROWS + 1]
    firsts = [row.index("*") for row in rows if "*" in row]
    assert firsts == sorted(firsts)
    assert len(firsts) >= USUAL_ROWS - 2
    assert rows[-1].rstrip()[-1] == "*" or rows[-2].rstrip()[-1] == "*"


def test_ticks_are_round_and_inside() -> None:
    dice = random.Random(3)
    for _ in range(500):
        low = dice.uniform(-1, 1) * 10 ** dice.uniform(-5, 5)
        high = low + 10 ** dice.uniform(-5, 6)
        most = dice.randint(3, 9)
        ticks = round_ticks(low, high, most)
        assert 1 <= len(ticks) <= most, (low, high, most)
        assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in ticks), (low, high, most)
        positive_low = 10 ** dice.uniform(-6, 4)
        ticks = log_ticks(positive_low, positive_low * 10 ** dice.uniform(0.1, 8), most)
        assert 1 <= len(ticks) <= most
        assert all(tick > 0 for tick in ticks)
    assert round_ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(0.9, 1100, 6) == [1, 10, 100, 1000]
    assert axis("", [5.0, 5.0], 6).low < 5 < axis("", [5.0, 5.0], 6).high


def test_time_leaves_pauses_out() -> None:
    records = [{"step": s, "loss": 1.0, "step_seconds": 2.0, "time": 1e9 + 1e6 * s} for s in (1, 10, 20)]
    assert [x for x, _ in curve("a", records, "time", "loss").points] == [2, 20, 40]


def test_many_points_are_thinned_to_their_extremes() -> None:
    dice = random.Random(4)
    points = [(float(i), dice.random()) for i in range(50_000)]
    points[12_345] = (12_345.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert {points[0], points[-1], points[12_345], min(points, key=lambda p: p[1])} <= set(kept)
    assert kept == sorted(kept)


def test_the_command_draws_compares_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    records = write_run(tmp_path / "a", random.Random(5))
    write_run(tmp_path / "b", random.Random(6), 300)
    assert run([str(tmp_path / "a"), str(tmp_path / "b") + "/", "--out", str(tmp_path / "x.svg")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    row = next(row for row in said.splitlines() if re.match(r"a\s+200 ", row)).split()
    best = min(held for r in records if (held := r.get("validation_loss")) is not None)
    assert row[:4] == ["a", "200", "20,000", "2.5"]
    assert float(row[4]) == pytest.approx(best, rel=1e-3)
    ElementTree.parse(tmp_path / "x.svg")
    monkeypatch.setenv("COLUMNS", "40")
    assert run([str(tmp_path / "a"), "--y", "mfu", "--x=time", "--log"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_without_unicode_it_is_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "é", random.Random(7))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run([str(tmp_path / "é")]) == 0
    stream.flush()
    assert "?" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [[], ["a", "--y", "perplexity"], ["a", "--out", "a.png"], ["nowhere"], ["empty"], [".", "a"]])
def test_a_mistake_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", random.Random(8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(ConfigError) as refused:
        run(words)
    assert "\n" not in str(refused.value)
    assert "did you mean 'a'" in str(refused.value) or words != [".", "a"]


def test_it_needs_no_torch() -> None:
    code = "import sys, titan.commands.plot; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("columns", "lines"), [(40, 12), (80, 24), (120, 40)])
def test_picture_and_table_fit_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, lines: int
) -> None:
    write_run(tmp_path / "stdlib", random.Random(9))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    assert run([str(tmp_path / "stdlib")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) < lines, rows  # the prompt has a line
    assert len(rows) >= min(lines, 30) - 2
    assert max(map(len, rows)) <= columns
    assert ("not shown: best validation, tokens/s" in rows) == (columns == 40)


def test_one_value_can_be_seen_and_steps_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in (1, 3, 12_345):
        file.write_text(f'{{"step": {step}, "loss": 6.9}}\n')
        drawn = picture({"a": file})
        assert chr(0x28FF) in "".join(text(drawn, 80, None, False, True).splitlines()[1:-1])
        assert all(tick == int(tick) for tick in drawn.x.ticks)
        assert drawn.x.low < step < drawn.x.high
    file.write_text('{"step": 1, "loss": 6.9}\n{"step": 2, "loss": 6.8}\n')
    assert picture({"a": file}).x.ticks == [1, 2]


@pytest.mark.parametrize(
    ("ticks", "log", "shown"),
    [
        ([0, 20_000, 80_000, 100_000], False, "0 20k 80k 100k"),
        ([0, 500_000, 1_000_000], False, "0 0.5M 1M"),
        ([5_000, 10_000], False, "5,000 10,000"),
        ([1_000_000, 1_000_010], False, "1M 1.00001M"),
        ([0, 5e-5, 1e-4], False, "0 0.5e-4 1e-4"),
        ([0.5, 1, 1.5], False, "0.5 1 1.5"),
        ([1e-5, 1e-2, 1, 1e3, 1e6], True, "1e-5 0.01 1 1k 1M"),
    ],
)
def test_one_axis_is_written_in_one_way(ticks: list[float], log: bool, shown: str) -> None:
    assert " ".join(shown_ticks(Axis("", ticks[0], ticks[-1], log, ticks))) == shown


def test_the_file_of_metrics_stands_for_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", random.Random(10))
    said = []
    for path in (tmp_path / "a", tmp_path / "a" / "metrics.jsonl"):
        assert run([str(path)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_picture_that_has_no_folder_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", random.Random(11))
    with pytest.raises(ConfigError, match=r"--out .*x\.svg: there is no folder .*new"):
        run([str(tmp_path / "a"), "--out", str(tmp_path / "new" / "x.svg")])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "new").exists()


def test_help_s_indented_lines_fit_80_columns() -> None:
    assert max(len(line) for line in (plot.__doc__ or "").splitlines() if line.startswith(" ")) <= 78
