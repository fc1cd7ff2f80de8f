"""A step appears whole or not at all, whatever happens in between, and nothing that was committed is lost."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from titan.checkpoint.commit import begin, commit, committed_steps, newest, step_folder, sweep, temp_folder
from titan.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedError,
    Manifest,
    Written,
    read_json,
    read_manifest,
    verify,
    write_json,
)


class Crash(BaseException):
    """The process dies here: no handler of the code under test may see it."""


def nothing() -> None:
    pass


def save(root: Path, step: int, files: int = 3) -> Path:
    temp = begin(root, step, rank=0, barrier=nothing)
    for i in range(files):
        (temp / f"shard-{i:05d}.safetensors").write_bytes(os.urandom(10 + i + step % 7))
    return commit(temp)


def written(content: bytes) -> Written:
    return Written(len(content), hashlib.sha256(content).hexdigest())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names() -> None:
    assert step_folder(Path("x"), 10) == Path("x/step-00000010")
    assert temp_folder(Path("x"), 10) == Path("x/.step-00000010.tmp")
    assert step_folder(Path("x"), 123456789).name == "step-123456789"


def test_a_committed_step_is_there_with_everything_in_it(tmp_path: Path) -> None:
    root = tmp_path / "new" / "checkpoints"
    assert committed_steps(root) == []
    assert newest(root) is None
    temp = begin(root, 7, rank=0, barrier=nothing)
    (temp / "shard-00000.safetensors").write_bytes(b"0123")
    (temp / "empty.json").write_bytes(b"")
    assert newest(root) is None
    assert commit(temp) == newest(root) == step_folder(root, 7)
    assert not temp.exists()
    files = {"shard-00000.safetensors": written(b"0123"), "empty.json": written(b"")}
    assert verify(step_folder(root, 7)) == Manifest(7, files)
    assert set(contents(step_folder(root, 7))) == {*files, MANIFEST}


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (300000000, 20, 9, 100000000, 99999999):
        save(tmp_path, step)
    assert committed_steps(tmp_path) == [9, 20, 99999999, 100000000, 300000000]
    assert newest(tmp_path) == step_folder(tmp_path, 300000000)


def test_what_is_not_a_committed_step_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 5)
    whole = contents(step_folder(tmp_path, 5))
    for name in (
        "step-6",
        "step-000000006",
        "step-00000006x",
        "xstep-00000006",
        "step-0000006a",
        "step-00000006.tmp",
        "step--0000006",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_bytes(whole[MANIFEST].replace(b'"step": 5', b'"step": 6'))
    (tmp_path / "step-00000008").write_text("a file")
    (tmp_path / "step-00000009").mkdir()
    manifest = json.loads(whole[MANIFEST])
    wrong: list[dict[str, Any]] = [
        {"version": 1},
        {"version": 3},
        {"format": "other"},
        {"step": 4},
        {"step": True},
        {"step": "20"},
        {"files": []},
    ]
    good = {"bytes": 1, "sha256": "0" * 64}
    wrong += [{"files": {name: good}} for name in ("../x", "a/b", "..", "", ".hidden", "a\\b", "a\0", "/etc/passwd")]
    wrong += [{"files": {"a": good | {"bytes": size}}} for size in (-1, 1.0, True, "1")]
    wrong += [{"files": {"a": good | {"sha256": digest}}} for digest in ("0" * 63, "g" * 64, "", None, 0)]
    wrong += [{"files": {"a": entry}} for entry in ({}, {"bytes": 1}, 3, None)]
    for step, change in enumerate(wrong, 20):
        step_folder(tmp_path, step).mkdir()
        text = json.dumps({**manifest, "step": step, **change})
        (step_folder(tmp_path, step) / MANIFEST).write_text(text)
    for step, data in enumerate((b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000, whole[MANIFEST][:-5], b'{"step": NaN}'), 50):
        step_folder(tmp_path, step).mkdir()
        (step_folder(tmp_path, step) / MANIFEST).write_bytes(data)
    assert committed_steps(tmp_path) == [5]
    assert newest(tmp_path) == step_folder(tmp_path, 5)
    assert sweep(tmp_path) == []


@pytest.mark.parametrize("change", ["gone", "short", "long", "link", "flipped"])
def test_verify_names_the_file_that_is_not_as_listed(tmp_path: Path, change: str) -> None:
    path = save(tmp_path, 1) / "shard-00001.safetensors"
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        path.write_bytes({"short": data[:-1], "long": data + b"x", "flipped": flipped}[change])
    with pytest.raises(DamagedError, match=r"shard-00001\.safetensors"):
        verify(path.parent)


def test_no_step_is_written_twice(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = contents(folder)
    with pytest.raises(CheckpointError, match="committed already"):
        begin(tmp_path, 3, rank=0, barrier=nothing)
    temp_folder(tmp_path, 3).mkdir()
    with pytest.raises(CheckpointError, match="never written twice"):
        commit(temp_folder(tmp_path, 3))
    with pytest.raises(CheckpointError, match="not a folder made by begin"):
        commit(folder)
    step_folder(tmp_path, 4).mkdir()  # an empty folder, over which a rename would succeed
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        begin(tmp_path, 4, rank=0, barrier=nothing)
    assert contents(folder) == before
    assert committed_steps(tmp_path) == [3]


def test_commit_refuses_what_is_not_a_plain_file(tmp_path: Path) -> None:
    for step, make in enumerate((Path.mkdir, lambda path: path.symlink_to("/etc/passwd"), os.mkfifo)):
        temp = begin(tmp_path, step, rank=0, barrier=nothing)
        make(temp / "odd")
        with pytest.raises(CheckpointError, match="odd"):
            commit(temp)
    temp = begin(tmp_path, 9, rank=0, barrier=nothing)
    (temp / ".x.json.tmp").write_text("half")
    with pytest.raises(CheckpointError, match=r"\.x\.json\.tmp"):
        commit(temp)
    assert committed_steps(tmp_path) == []
    assert len(sweep(tmp_path)) == 4


def test_a_failed_commit_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp = begin(tmp_path, 2, rank=0, barrier=nothing)
    (temp / "a").write_bytes(b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(CheckpointError, match=r"committed \(no\)"):
            commit(temp)
    assert newest(tmp_path) is None
    assert verify(commit(temp)).files == {"a": written(b"abc")}


def test_a_crash_at_any_point_leaves_the_previous_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before, and after, each call that changes the disk for good; then start again."""
    save(tmp_path, 1)
    before = contents(step_folder(tmp_path, 1))
    calls = ["fsync", "replace", "rename", "mkdir"]

    def die_at(point: int, after: bool) -> list[str]:
        done: list[str] = []
        with monkeypatch.context() as patch:
            for name in calls:
                real = getattr(os, name)

                def call(*args: object, _real: Any = real, _name: str = name, **kwargs: object) -> object:
                    if len(done) == point and not after:
                        raise Crash
                    result = _real(*args, **kwargs)
                    done.append(_name)
                    if len(done) == point + 1 and after:
                        raise Crash
                    return result

                patch.setattr(os, name, call)
            try:
                save(tmp_path, 2)
            except Crash:
                done.append("crash")
        return done

    outcomes = set()
    for after in (False, True):
        for point in range(100):
            done = die_at(point, after)
            renamed = "rename" in done
            outcomes.add(renamed)
            assert committed_steps(tmp_path) == ([1, 2] if renamed else [1]), (point, after, done)
            assert contents(step_folder(tmp_path, 1)) == before
            if renamed:
                assert len(verify(step_folder(tmp_path, 2)).files) == 3, (point, after, done)
                assert sweep(tmp_path) == []
                os.rename(step_folder(tmp_path, 2), tmp_path / f"away-{after}-{point}")
            elif point % 2:
                assert set(sweep(tmp_path)) <= {temp_folder(tmp_path, 2)}
                assert not temp_folder(tmp_path, 2).exists()
            if "crash" not in done:
                break
        else:
            pytest.fail("never came to the end of a save")
    assert outcomes == {True, False}
    assert committed_steps(tmp_path) == [1]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and the folder are fsynced before the name appears, and the root after it."""
    temp = begin(tmp_path, 1, rank=0, barrier=nothing)
    for name in ("a", "b"):
        (temp / name).write_text(name)
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_fsync(handle)

    def rename(old: Path, new: Path) -> None:
        events.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    commit(temp)
    at = events.index("rename")
    base = os.path.realpath(tmp_path)
    inside = f"{base}/.step-00000001.tmp"
    assert {f"{inside}/a", f"{inside}/b", inside} <= set(events[:at])
    assert any(event.startswith(f"{inside}/.{MANIFEST}.") for event in events[:at])
    assert events[at - 1] == inside
    assert events[at + 1 :] == [base]


def test_begin_removes_what_a_crash_left(tmp_path: Path) -> None:
    temp = begin(tmp_path, 4, rank=0, barrier=nothing)
    (temp / "shard-00007.safetensors").write_text("of a larger world")
    assert begin(tmp_path, 4, rank=0, barrier=nothing) == temp
    assert contents(temp) == {}


def test_other_ranks_wait_for_rank_0(tmp_path: Path) -> None:
    """Four ranks as threads: none returns before the folder is there, and the stale one is gone."""
    temp_folder(tmp_path, 1).mkdir()
    (temp_folder(tmp_path, 1) / "stale").touch()
    barrier, seen = threading.Barrier(4), []

    def rank(i: int) -> None:
        folder = begin(tmp_path, 1, i, lambda: barrier.wait(10))
        seen.append(sorted(os.listdir(folder)))

    threads = [threading.Thread(target=rank, args=(i,), daemon=True) for i in (3, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [[]] * 4


def test_all_ranks_hear_of_a_refusal(tmp_path: Path) -> None:
    save(tmp_path, 1)
    barrier, errors = threading.Barrier(2), {}

    def rank(i: int) -> None:
        try:
            begin(tmp_path, 1, i, lambda: barrier.wait(10))
        except CheckpointError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=rank, args=(i,), daemon=True) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert "committed already" in errors[0]
    assert "rank 1" in errors[1]


def test_sweep_takes_only_leftovers(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nowhere") == []
    save(tmp_path, 1)
    (tmp_path / ".step-2.tmp").mkdir()
    (tmp_path / ".other.tmp").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    temp_folder(tmp_path, 5).symlink_to(elsewhere)
    (begin(tmp_path, 3, 0, nothing) / "half").touch()
    assert sweep(tmp_path) == [temp_folder(tmp_path, 3), temp_folder(tmp_path, 5)]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".step-2.tmp", ".other.tmp", "elsewhere"}
    assert (elsewhere / "kept").exists()


def test_json_round_trip_is_deterministic(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "ü\n"], "a": {"z": 1e-300, "y": -(2**80)}}
    write_json(tmp_path / "x.json", value)
    first = (tmp_path / "x.json").read_bytes()
    assert read_json(tmp_path / "x.json") == value
    write_json(tmp_path / "x.json", {"a": {"y": -(2**80), "z": 1e-300}, "b": [1, 2.5, None, "ü\n"]})
    assert contents(tmp_path) == {"x.json": first}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_the_old_file_kept(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", {"new": value})
    assert read_json(tmp_path / "x.json") == {"old": 1}


def test_a_crash_while_json_is_written_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"old": 1})

    def die(*_: object) -> None:
        raise Crash

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, die)
            with pytest.raises(Crash):
                write_json(tmp_path / "x.json", {"new": 1})
        assert read_json(tmp_path / "x.json") == {"old": 1}
    write_json(tmp_path / "x.json", {"new": 1})
    assert read_json(tmp_path / "x.json") == {"new": 1}


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.json: no such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match=r"no/x\.json: cannot be written"):
        write_json(tmp_path / "no" / "x.json", {})
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(tmp_path)
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(CheckpointError, match=r"dir\.json: cannot be read"):
        read_json(tmp_path / "dir.json")
