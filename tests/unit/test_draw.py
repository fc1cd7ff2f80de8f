"""`titan draw`: pictures that say what is, for any plan, without starting a rank."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from titan.cli import main
from titan.config import Degrees
from titan.drawing.mesh import places
from titan.drawing.shards import owners, ranges
from titan.drawing.svg import WIDTH

CONFIG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path) -> tuple[ElementTree.Element, list[tuple[str, dict[str, float]]]]:
    """The page, and its shapes that say something, with what they say and where they are."""
    page = ElementTree.parse(path).getroot()
    found = []
    for shape in (*page.iter(f"{SVG}rect"), *page.iter(f"{SVG}polygon")):
        for hint in shape.iter(f"{SVG}title"):
            found.append((hint.text or "", {k: float(shape.get(k, 0)) for k in ("x", "y", "width", "height")}))
    for shape in page.iter(f"{SVG}rect"):
        assert 0 <= float(shape.get("x", 0)) <= WIDTH + 0.1 - float(shape.get("width", 0)), "inside the page"
        assert float(shape.get("y", 0)) + float(shape.get("height", 0)) <= float(page.get("height", 0)) + 0.1
    return page, found


@pytest.mark.parametrize("plan", ["dp_shard=2,tp=2,pp=2", "dp_replicate=2,dp_shard=4,cp=2", "tp=8", "pp=4,tp=2", "dp_shard=16"])
def test_the_mesh_has_every_rank_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: str) -> None:
    out = tmp_path / "mesh.svg"
    assert main(["draw", "mesh", CONFIG, "--plan", f"{plan},training.micro_batch_size=1", "--out", str(out)]) == 0
    world = prod(int(word.split("=")[1]) for word in plan.split(","))
    _, shapes = drawn(out)
    assert [int(re.findall(r"rank (\d+)", said)[0]) for said, _ in shapes] == list(range(world))
    at = [(shape["x"], shape["y"]) for _, shape in shapes]
    assert len(set(at)) == world, "no two on one place"
    assert all(before < after for before, after in pairwise([(y, x) for x, y in at])), "in order, rows from top to bottom"
    lines = capsys.readouterr().out
    assert len(re.findall(r"^rank \d+", lines, re.M)) == world
    seen = re.findall(r"sequences?\s+(\d+)-?(\d*)\s+of\s+a\s+batch's\s+16", lines)
    assert len(seen) == world
    all_seen = {i for first, last in seen for i in range(int(first), int(last or first) + 1)}
    assert all_seen == set(range(16)), "all of the batch is seen"


def test_a_large_mesh_is_drawn_from_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mesh.svg"
    words = [str(Path(CONFIG).with_name("llama3_8b.toml")), "--world-size", "64", "--parallel.tp=8"]
    assert main(["draw", "mesh", *words, "--out", str(out)]) == 0
    assert "layers 0-31" in capsys.readouterr().out
    assert len(drawn(out)[1]) == 64


def test_places_are_those_of_the_mesh() -> None:
    found = places(Degrees(dp_replicate=2, dp_shard=3, tp=2, cp=2, pp=2))
    assert [at.rank for at in found] == list(range(48))
    at = found[1 * 24 + 1 * 12 + 2 * 4 + 1 * 2 + 1]
    assert (at.pp, at.replicate, at.shard, at.cp, at.tp) == (1, 1, 2, 1, 1)


@pytest.mark.parametrize(("plan", "model"), [("dp_shard=2,tp=2", "llama3"), ("tp=4,pp=2", "gpt2"), ("dp_shard=3", "llama3")])
def test_parts_of_a_parameter_make_up_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: str, model: str
) -> None:
    out = tmp_path / "weights.svg"
    words = [f"--plan={plan}", f"--model.name={model}", "--training.global_batch_size=12", "--training.micro_batch_size=1"]
    assert main(["draw", "weights", CONFIG, *words, "--out", str(out)]) == 0
    drawn(out)
    blocks = re.split(r"\n(?=\S)", capsys.readouterr().out.split("\n\n", 1)[1])
    assert len([block for block in blocks if ".weight" in block]) > 4
    for block in blocks:
        if ".weight" not in block:
            continue
        shape = [int(n.replace(",", "")) for n in block.split("\n")[0].split(", ", 1)[1].split(" x ")]
        parts = [
            [(int(a.replace(",", "")), int(b.replace(",", "")) + 1) for a, b in re.findall(r"([\d,]+) to ([\d,]+)", line)]
            for line in block.split("\n")[1:]
            if " to " in line
        ]
        cells = [prod(end - begin for begin, end in part) for part in parts]
        assert sum(cells) == prod(shape), block
        for i, one in enumerate(parts):
            for other in parts[:i]:
                assert not all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)), "no two overlap"


def test_one_parameter_and_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["draw", "weights", CONFIG, "--plan", "tp=2"]
    assert main([*words, "--parameter", "layers.3.ffn.down.weight"]) == 0
    assert "rows 0 to 127, columns 176 to 351" in capsys.readouterr().out
    assert main([*words, "--parameter", "layers.3.ffn.dow.weight"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_tokens_below_the_diagonal_are_all_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    out = tmp_path / "tokens.svg"
    assert main(["draw", "tokens", CONFIG, "--plan", f"cp=4,cp_method={method}", "--out", str(out)]) == 0
    page, shapes = drawn(out)
    assert len(shapes) == 8 * 9 // 2
    ranks = [int(re.findall(r"rank (\d)'s queries", said)[0]) for said, _ in shapes]
    assert {rank: ranks.count(rank) for rank in range(4)} == dict.fromkeys(range(4), 9), "each rank as many chunks as another"
    words = capsys.readouterr().out
    assert "rank 1: tokens 32 to 63 and 192 to 223" in words
    assert ("meets keys of ranks 1, 0, 3, 2 in turn" in words) == (method == "ring")
    assert any("pairs" in (text.text or "") for text in page.iter(f"{SVG}text"))


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["tokens", CONFIG, "--plan", "tp=2"], "no context parallelism"),
        (["mesh", CONFIG, "--rank", "1"], "--rank is for memory"),
        (["mesh", CONFIG, "--parameter", "x"], "is for weights"),
        (["memory", CONFIG, "--plan", "dp_shard=2", "--rank", "2"], "the plan has ranks 0 to 1"),
        (["meshes", CONFIG], "invalid choice"),
        (["mesh", CONFIG, "--out", str(tmp_path / "x.jpg")], "name it"),
    ):
        assert main(["draw", *words]) == 2
        assert said in capsys.readouterr().err


def test_ranks_are_named_briefly() -> None:
    assert ranges([0, 2, 3, 4, 8]) == "0, 2-4, 8"
    assert owners([((0, 0), (2, 4)), None, ((0, 0), (2, 4)), ((2, 0), (0, 4))]) == {((0, 0), (2, 4)): [0, 2]}
