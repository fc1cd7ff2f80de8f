"""`titan schedule`: the drawn grid is the timeline, to the column and to the pixel."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from titan.cli import main
from titan.commands.schedule import ideal
from titan.drawing.schedule import svg, text
from titan.drawing.svg import WIDTH
from titan.parallel.schedules import STAGES, table
from titan.terminal import plain

CONFIG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
SVG = "{http://www.w3.org/2000/svg}"


def test_one_forward_one_backward_as_every_course_draws_it() -> None:
    panel = ideal(table("1F1B", 3, 1, 3), (1, 1, 1))
    assert text(panel, 60, colours=False, unicode=False).splitlines() == [
        "rank 0  F0F1F2........B0--..B1--..B2--  holds 3",
        "rank 1  ..F0F1....B0--F2B1--..B2--....  holds 2",
        "rank 2  ....F0B0--F1B1--F2B2--........  holds 1",
    ]
    assert panel.bubble == pytest.approx(2 * 3 / (5 * 3))  # (P-1) (F+B) of (P-1 + M) (F+B)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("seed", range(3))
def test_the_terminal_shows_every_rank_idle_as_long_as_it_is(name: str, seed: int) -> None:
    dice = random.Random(f"{name}{seed}")
    ranks = dice.randint(2, 6)
    micros = dice.randint(2 * ranks, 4 * ranks)
    panel = ideal(table(name, ranks, 0, micros), (1, 1, 1))
    plain_bands = bands(text(panel, dice.choice((60, 100, 200)), False, True), ranks)
    for rank, line in enumerate(plain_bands):
        busy = sum(end - start for row_rank, row in enumerate(panel.rows()) if row_rank == rank for _, start, end in row)
        assert line.count("·") / len(line) == pytest.approx(1 - busy, abs=2 / len(line)), "idle columns"
        names = re.findall(r"[FBIWfbiw]\d+", line)
        assert len(names) == len(panel.rows()[rank]), "every pass is there, by name"
    painted, unpainted = plain(text(panel, 100, True, True)), text(panel, 100, False, True)
    rows = [row.replace("-", " ") for row in bands(unpainted, ranks)]
    assert bands(painted, ranks, r"rank.(\d+)  (.*?)(?:  holds.*)?$") == rows


def bands(drawn: str, ranks: int, line_of: str = r"rank.(\d+) +([^ ]*)") -> list[str]:
    """The ranks' lines, put together again."""
    lines = [""] * ranks
    for line in drawn.splitlines():
        if found := re.match(line_of, line):
            lines[int(found[1])] += found[2]
    return lines


@pytest.mark.parametrize("name", STAGES)
def test_the_picture_has_a_bar_for_every_pass_where_it_is(name: str) -> None:
    panel = ideal(table(name, 4, 0, 8), (1, 1.25, 0.5))
    page = ElementTree.fromstring(svg("a & b <c>", [panel, panel]))
    hints = [(hint.text or "", shape) for shape in page.iter(f"{SVG}rect") for hint in shape.iter(f"{SVG}title")]
    assert len(hints) == 2 * len(panel.times)
    bars = {hint: float(shape.get("width", 0)) for hint, shape in hints}
    longest, shortest = max(bars.values()), min(bars.values())
    lengths = [end - start for start, end in panel.times.values()]
    assert longest / shortest == pytest.approx(max(lengths) / min(lengths), rel=0.01)
    assert all(0 <= float(shape.get("x", 0)) <= WIDTH - float(shape.get("width", 0)) for shape in page.iter(f"{SVG}rect"))
    assert any(f"bubble {panel.bubble:.1%}" == shown.text for shown in page.iter(f"{SVG}text"))


def test_the_command_draws_any_size_without_starting_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.svg"
    words = ["schedule", CONFIG, "--ideal", "--world-size", "32", "--parallel.pp=8", "--training.global_batch_size=64"]
    assert main([*words, "--training.micro_batch_size=1", "--out", str(out)]) == 0
    assert "1F1B: 8 ranks, 1 stage each, 16 micro batches" in capsys.readouterr().out  # 4 data-parallel ranks share 64
    ElementTree.parse(out)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([CONFIG], "the plan has no pipeline"),
        ([CONFIG, "--plan", "pp=2", "--times", "1,0,1", "--ideal"], "expected three numbers above 0"),
        ([CONFIG, "--plan", "pp=2", "--times", "2,1,1"], "are for --ideal"),
        ([CONFIG, "--plan", "pp=8,dp_replicate=4"], "at most 16 are started here; --ideal starts none"),
        ([CONFIG, "--plan", "pp=2", "--out", str(tmp_path / "x.png")], "name it"),
        ([CONFIG, "--plan", "pp=2", "--out", str(tmp_path / "no" / "x.svg")], "there is no folder"),
        ([CONFIG, "--plan", "pp=2", "--steps", "0"], "1 or more"),
    ):
        assert main(["schedule", *words]) == 2
        assert said in capsys.readouterr().err
