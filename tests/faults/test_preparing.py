"""Preparing that is killed, runs out of disk, loses a worker, is done twice at once, or whose text changes meanwhile."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import ROOT, contents, silent, texts_in, write_rows

from titan.config import Data, Source
from titan.data import crew, pieces, preparation
from titan.data.prepare import prepare
from titan.data.tokenizer import BytesTokenizer
from titan.lock import HeldError, hold
from titan.status import Failed

PREPARE = """
import sys
from titan.config import Data, Source
from titan.data import pieces
from titan.data.inspect import sample, summary
from titan.data.prepare import prepare
if __name__ == "__main__":
    pieces.SMALLEST = 10_000
    prepare(Source(path=sys.argv[1]), Data(cache=sys.argv[2], validation_share=0.1), lambda line: print(line, flush=True), 2)
"""


def kills(tmp_path: Path, count: int, seed: int) -> None:
    """Kill a preparation at random instants, `count` times, then let it end: the same bytes as undisturbed."""
    draw = random.Random(seed)
    write_rows(tmp_path / "rows", seed, rows=3000)
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(cache: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / "rows"), str(tmp_path / cache)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    begun = time.monotonic()
    undisturbed = start("undisturbed")
    undisturbed.communicate(timeout=120)
    whole = time.monotonic() - begun
    assert undisturbed.returncode == 0
    (wanted,) = (tmp_path / "undisturbed").iterdir()
    killed = went_on = 0
    while killed < count:
        process = start("killed")
        try:
            process.wait(draw.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        went_on += "are there from an earlier start" in process.communicate(timeout=60)[0]
        for made in (tmp_path / "killed").glob("rows-????????????????"):  # it was done before it was killed
            assert contents(made) == contents(wanted)
            made.rename(tmp_path / f"made{killed}-{time.monotonic()}")
    last = start("killed")
    went_on += "are there from an earlier start" in last.communicate(timeout=120)[0]
    assert last.returncode == 0
    (made,) = (tmp_path / "killed").iterdir()
    assert contents(made) == contents(wanted)
    print(f"{killed} kills, {went_on} starts went on with pieces that were there")


def test_kill_9_leaves_what_the_next_start_goes_on_from(tmp_path: Path) -> None:
    kills(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_kill_9_ten_times(tmp_path: Path) -> None:
    kills(tmp_path, 10, seed=1)


def test_a_finished_piece_is_not_made_again(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows", 2)
    source, encode, calls = Source(path=str(tmp_path / "rows")), BytesTokenizer.encode, 0
    data = Data(cache=str(tmp_path / "cache"), validation_share=0.1)
    whole = contents(prepare(source, Data(cache=str(tmp_path / "whole"), validation_share=0.1), silent, 1))

    def limited(self: BytesTokenizer, text: str) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 700:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(BytesTokenizer, "encode", limited)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, data, silent, 1)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    done = len(list(unfinished.glob("piece-*.json")))
    assert 0 < done < len(whole) // 2
    with pytest.raises(ValueError, match="was not finished; give the text again"):
        prepare(Source(path=str(unfinished)), data, silent)
    lines: list[str] = []
    folder = prepare(source, data, lines.append, 1)
    assert any(f"{done} of " in line and "earlier start" in line for line in lines)
    assert calls < 1400, "of 1,200 texts, what was done is not done again"
    assert contents(folder) == whole
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_kill_at_the_very_end_costs_nothing(tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows", 3)
    source, data = Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache"))
    whole = contents(prepare(source, Data(cache=str(tmp_path / "whole")), silent, 1))
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "publish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, data, silent, 1)
    monkeypatch.setattr(BytesTokenizer, "encode", lambda *_: pytest.fail("made again"))
    assert contents(prepare(source, data, silent, 1)) == whole


def test_a_worker_that_dies_is_named_and_what_is_done_stays(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows", 6, files=4, rows=1500)
    monkeypatch.setattr(crew.ProcessPoolExecutor, "submit", die_at_the_third(crew.ProcessPoolExecutor.submit))
    with pytest.raises(Failed, match=r"rows: a process that made tokens died .* near .*\.jsonl.*start again"):
        prepare(Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache")), silent, 2)
    monkeypatch.undo()
    monkeypatch.setattr(pieces, "SMALLEST", 10_000)
    lines: list[str] = []
    prepare(Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache")), lines.append, 2)
    assert any("earlier start" in line for line in lines)


def die_at_the_third(submit: Any) -> Any:
    def submitted(self: Any, function: Any, task: Any) -> Any:
        return submit(self, os._exit, 9) if task.number == 8 else submit(self, function, task)

    return submitted


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small disk needs root and mount")
    try:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(4000)))
        with pytest.raises(Failed, match=r"disk/cache: No space left on device; what is done is kept: make room"):
            prepare(Source(path=str(tmp_path / "a.jsonl")), Data(cache=str(disk / "cache")), silent)
        assert not list((disk / "cache").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_text_that_changes_meanwhile_is_refused(tmp_path: Path, small_pieces: None) -> None:
    write_rows(tmp_path / "rows", 11)
    data = Data(cache=str(tmp_path / "cache"))

    def change(line: str) -> None:
        if "making tokens" in line:
            (tmp_path / "rows" / "2.jsonl").write_text('{"text": "other"}\n')

    with pytest.raises(ValueError, match=r"^data\.path: .*rows was changed while it was made into tokens; start again"):
        prepare(Source(path=str(tmp_path / "rows")), data, change, 1)
    assert not list((tmp_path / "cache").iterdir())
    folder = prepare(Source(path=str(tmp_path / "rows")), data, silent, 1)
    assert "other" in texts_in(folder, "train") + texts_in(folder, "validation")


def test_whoever_waited_for_a_lock_keeps_it(tmp_path: Path) -> None:
    code = "import sys, pathlib, titan.lock as l; f = l.hold(pathlib.Path(sys.argv[1]), 0); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]

    def another() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = another()
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    said = ""
    try:
        hold(tmp_path / "lock", 0)
    except HeldError as error:
        said = str(error)
        first.communicate("", timeout=20)
        mine = hold(tmp_path / "lock", 10)
    assert f"pid {first.pid}" in said
    assert "HeldError" in another().communicate("", timeout=20)[1], "though that error and its file are gone by now"
    assert mine is not None
    mine.close()
    assert another().communicate("", timeout=20)[0] == "held\n"


def test_several_that_finish_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 13)
    code = PREPARE.replace(", 2)", ", 1, PieceShare(int(sys.argv[3]), 3))").replace(
        "import prepare", "import PieceShare, prepare"
    )
    (tmp_path / "share.py").write_text(code)
    for _ in range(3):
        command = [sys.executable, str(tmp_path / "share.py"), str(tmp_path / "rows"), str(tmp_path / "cache")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        tasks = [
            subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(3)
        ]
        for task in tasks:
            _, said = task.communicate(timeout=60)
            assert task.returncode == 0, said
        (folder,) = (tmp_path / "cache").iterdir()
        shutil.rmtree(folder)


def test_what_killed_processes_left_goes_at_the_next_start(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 14)
    source, data = Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache"))
    folder = prepare(source, data, silent)
    unfinished = folder.rename(folder.with_name(folder.name + ".unfinished"))
    for file in unfinished.iterdir():
        file.unlink()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, own = (unfinished / f".train-00000.tokens.{platform.node()}.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    left.touch()
    own.touch()
    seen: list[bool] = []
    prepare(source, data, lambda line: seen.append(left.exists()) or seen.append(own.exists()) if "making" in line else None)  # type: ignore[func-returns-value]
    assert seen == [False, True]
