"""Which steps stay, which chunks make a tensor, what has changed in a config, who may work in a folder, and until when."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from titan.checkpoint.commit import (
    REASON,
    begin,
    commit,
    committed_steps,
    damaged_folders,
    remove,
    set_aside,
    step_folder,
    sweep,
)
from titan.checkpoint.index import INDEX, read_index
from titan.checkpoint.manifest import CheckpointError, write_json
from titan.checkpoint.retention import STATE, best_step, surplus, validation_loss
from titan.lock import InUseError, lock
from titan.stop import STOP_FILE, Stop, seconds_left
from titan.toml_diff import changes


@pytest.mark.parametrize("seed", range(50))
def test_what_stays(seed: int) -> None:
    draw = random.Random(seed)
    steps = draw.sample(range(1, 200), draw.randint(1, 30))
    last, every = draw.randint(0, 5), draw.choice((0, 1, 7, 50))
    others = set(draw.sample(steps, min(2, len(steps))))
    gone = surplus(steps, last, every, others)
    newer = {step: sum(other > step for other in steps) for step in steps}
    for step in steps:
        stays = last == 0 or newer[step] < last or step in others or bool(every and step % every == 0)
        assert (step not in gone) == stays
    assert max(steps) not in gone


def committed(root: Path, step: int, **state: object) -> Path:
    temp = begin(root, step, 0, lambda: None)
    write_json(temp / STATE, state)
    return commit(temp)


def test_the_best_step(tmp_path: Path) -> None:
    assert best_step(tmp_path, []) is None
    for step, loss in ((1, None), (2, 3.5), (3, 2), (4, 2.0), (5, 7.0), (6, True), (7, "1")):
        committed(tmp_path, step, validation_loss=loss)
    assert [validation_loss(step_folder(tmp_path, step)) for step in range(1, 8)] == [None, 3.5, 2.0, 2.0, 7.0, None, None]
    assert best_step(tmp_path, range(1, 8)) == 4
    assert best_step(tmp_path, [1, 6, 7]) is None


def test_a_crash_while_a_step_is_removed_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, 1)
    folder = committed(tmp_path, 2)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path, 2)
    assert committed_steps(tmp_path) == [1]
    assert not folder.exists()
    assert len(sweep(tmp_path)) == 1
    committed(tmp_path, 2)
    remove(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_is_set_aside_is_in_nobodys_way(tmp_path: Path) -> None:
    for number in range(3):
        folder = committed(tmp_path, 4)
        aside = set_aside(folder, f"reason {number}")
        assert (aside / REASON).read_text() == f"reason {number}\n"
    (tmp_path / "step-00000005").write_text("not even a folder")
    set_aside(tmp_path / "step-00000005", "no folder")
    assert committed_steps(tmp_path) == []
    assert [path.name for path in damaged_folders(tmp_path)] == [
        "step-00000004.damaged",
        "step-00000004.damaged-1",
        "step-00000004.damaged-2",
    ]


@pytest.mark.parametrize("seed", range(30))
def test_chunks_have_to_cover_a_tensor_once(tmp_path: Path, seed: int) -> None:
    """Random grids of blocks are taken; with a block moved onto another's elements they are not, though the count is right."""
    draw = random.Random(seed)
    cuts = []
    for _ in range(draw.randint(1, 3)):
        size = draw.randint(2, 9)
        cuts.append([0, *sorted(draw.sample(range(1, size), draw.randint(0, min(3, size - 1)))), size])
    shape = [ends[-1] for ends in cuts]
    blocks: list[dict[str, Any]] = [
        {"offsets": [a for a, _ in spans], "shape": [b - a for a, b in spans], "file": "a.safetensors", "key": str(i)}
        for i, spans in enumerate(product(*(list(pairwise(ends)) for ends in cuts)))
    ]
    draw.shuffle(blocks)

    def read() -> None:
        entry = {"dtype": "F32", "shape": shape, "chunks": blocks}
        index = {"format": "titan-tensors", "version": 1, "files": {"a.safetensors": {"bytes": 1}}, "tensors": {"w": entry}}
        (tmp_path / INDEX).write_text(json.dumps(index))
        read_index(tmp_path)

    read()
    moves = [
        (block, dim, step)
        for block in blocks
        for dim in range(len(shape))
        for step in (-1, 1)
        if 0 <= block["offsets"][dim] + step <= shape[dim] - block["shape"][dim]
    ]
    for block, dim, step in draw.sample(moves, min(5, len(moves))):
        block["offsets"][dim] += step
        with pytest.raises(CheckpointError, match=r"overlap|chunks hold"):
            read()
        block["offsets"][dim] -= step


def test_what_changed_in_a_config() -> None:
    before = '[job]\noutput = "a"\n[optimizer]\nlr = 0.1\n[parallel]\ntp = 1\n[parallel.sharding]\nhead = "seq"\n'
    now = '[job]\noutput = "b"\n[optimizer]\nlr = 0.2\n[parallel]\ntp = 1\npp = 2\n'
    assert changes(before, now) == [
        "optimizer.lr: 0.1 -> 0.2",
        "parallel.sharding.head: 'seq' -> (none)",
        "parallel.pp: (none) -> 2",
    ]
    assert changes(now, now) == []


HOLD = """if True:
    import os, sys, time
    from pathlib import Path
    from titan.lock import lock
    held = lock(Path(sys.argv[1]))
    print(1, flush=True)
    """


def holder(folder: Path, then: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD + then, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def test_one_job_in_a_folder(tmp_path: Path) -> None:
    first = holder(tmp_path, "time.sleep(60)")
    try:
        said = rf"job\.output: {tmp_path} is in use by another job \(node .*, pid {first.pid}, since"
        with pytest.raises(InUseError, match=said):
            lock(tmp_path, wait_seconds=0.2)
    finally:
        first.kill()
        first.wait(10)
    held = lock(tmp_path, wait_seconds=0.2)  # a dead job leaves no lock behind, though it leaves the file
    assert held is not None
    held.close()


def test_a_lock_is_waited_for_and_not_inherited(tmp_path: Path) -> None:
    """The holder ends while we wait; its forked child, such as a data loader's worker, lives on without the lock."""
    first = holder(tmp_path, "child = os.fork(); time.sleep(0.5 if child else 20)")
    begun = time.monotonic()
    held = lock(tmp_path, wait_seconds=10)
    assert held is not None
    assert 0.1 < time.monotonic() - begun < 5
    held.close()
    first.wait(10)


def test_until_when() -> None:
    now = int(time.time())
    slurm = {"SLURM_JOB_START_TIME": str(now - 1000), "SLURM_JOB_END_TIME": str(now + 9000)}
    assert seconds_left(None, 300, {}) is None
    assert seconds_left(5, 300, {}) == 5
    assert seconds_left(None, 300, slurm) == pytest.approx(8700, abs=2)
    assert seconds_left(100, 300, slurm) == 100
    assert seconds_left(None, 5000, slurm) == pytest.approx(8000, abs=2)  # at most a tenth of the time is kept for saving
    assert seconds_left(None, 300, {"SLURM_JOB_END_TIME": "Unknown"}) is None


def test_a_file_asks_for_a_stop_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan.stop.SIGNALS", ())
    monkeypatch.setattr("titan.stop.FILE_SECONDS", 0.01)
    stop = Stop()
    stop.file = tmp_path / STOP_FILE
    assert not stop.wanted()
    stop.file.touch()
    time.sleep(0.02)
    assert stop.wanted()
    stop.done()
    time.sleep(0.02)
    assert not os.path.lexists(stop.file)
    assert not stop.wanted()
