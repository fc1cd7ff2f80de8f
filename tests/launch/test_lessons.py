"""The lessons cannot go stale: their commands run, and print what the pages say that they print; their pictures are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "docs" / "lessons"
PAGES = sorted(path.stem for path in LESSONS.glob("*.md") if path.stem != "README")
PARTS = ("**The idea.**", "**The maths.**", "**What it costs.**", "## See it", "**A question.**", "<details", "## Break it")


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """A page's commands, and the lines that stand below as what they print."""
    found: list[tuple[str, list[str]]] = []
    for kind, body in re.findall(r"^```(bash|text)\n(.*?)^```$", (LESSONS / f"{page}.md").read_text(), re.M | re.S):
        if kind == "bash":
            found.append((body, []))
        else:
            found[-1][1].extend(line for line in body.splitlines() if line.strip())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the repository's folder is to a reader, but for what runs leave."""
    folder = tmp_path_factory.mktemp("lessons")
    (folder / "train_configs").symlink_to(ROOT / "train_configs")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_print_what_the_page_says(folder: Path, page: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    path = os.pathsep.join((str(Path(sys.executable).parent), clean["PATH"]))
    environment = clean | {"PATH": path, "PYTHONPATH": str(ROOT), "NPROC": "2"}
    assert len(blocks(page)) >= 2
    for commands, said in blocks(page):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        assert said, "each command prints something to look at"
        printed = " ".join(done.stdout.split())
        for line in said:
            wanted = r".*?".join(re.escape(" ".join(part.split())) for part in line.split("..."))
            assert re.search(wanted, printed), f"{line!r} is not in\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_all_its_parts(page: str) -> None:
    text = (LESSONS / f"{page}.md").read_text()
    places = [text.find(part) for part in PARTS]
    assert -1 not in places, PARTS[places.index(-1)]
    assert places == sorted(places)
    pictures = re.findall(r"^!\[(.+?)\]\((\S+\.svg)\)$", text, re.M)
    assert pictures
    for words, name in pictures:
        assert len(words) > 15, "for those who do not see it"
        assert (LESSONS / name).is_file()
    for name in re.findall(r"`((?:titan|models)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file()
    assert f"({page}.md)" in (LESSONS / "README.md").read_text()
