"""Checkpoints that are damaged, hostile, interrupted, or find no room: what is loaded, what is said, and what is left."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from plans import small

from titan import ranks as between
from titan.build import build
from titan.checkpoint import manager as managing
from titan.checkpoint.commit import REASON, committed_steps, damaged_folders, step_folder, temp_folder
from titan.checkpoint.manager import Manager, Progress
from titan.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    Written,
    digest,
    read_manifest,
    verify,
    write_manifest,
)
from titan.checkpoint.saving import Saver
from titan.config import Config, degrees
from titan.data.tokenizer import BytesTokenizer
from titan.layout import local
from titan.parallel.mesh import make_mesh
from titan.pool import Pool, WorkerFailed

Run = Callable[..., list[Any]]


class Job:
    """On a worker: what of a training run has to do with checkpoints. Step n's parameters are all n."""

    def __init__(self, rank: int, config: Config) -> None:
        self.config = config
        self.ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
        self.parts = build(config, self.ranks.device, make_mesh("cpu", degrees(config.parallel, self.ranks.world), 30))
        self.manager = Manager(Path(config.job.output), self.ranks, self.parts, {"training.seed": 1}, config, BytesTokenizer())
        self.said: list[str] = []
        self.saver = Saver(config.checkpoint, self.ranks, 0, self.said.append)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.parts.model.parameters():
                parameter.fill_(value)

    def values(self) -> set[float]:
        return {value for p in self.parts.model.parameters() for value in local(p.detach()).unique().tolist()}

    def step(self, number: int, *, save: bool = True, last: bool = False, loss: float | None = None) -> None:
        """A step of the training loop: look at the save under way, change the weights, perhaps save."""
        _, failed, busy = between.agree(self.ranks, 0, self.saver.failed, self.saver.busy)
        self.saver.look(bool(failed))
        self.fill(float(number))
        if save:
            copy = self.config.checkpoint.async_save
            prepare = partial(self.manager.prepare, Progress(number, 10 * number, 100 * number), loss, [], copy)
            self.saver.save(number, prepare, busy=bool(busy), last=last)


def save(rank: int, config: Config, steps: list[int]) -> str:
    """On a worker: save these steps; the error, if there was one, which costs no new workers."""
    job = Job(rank, config)
    try:
        for step in steps:
            job.step(step, last=step == steps[-1])
    except CheckpointError as error:
        return str(error)
    return ""


def resume(rank: int, config: Config) -> tuple[Progress, set[float]] | str:
    """On a worker: where a new start goes on, and what its weights are then; or the error."""
    job = Job(rank, config)
    job.fill(-1)
    try:
        return job.manager.resume(config.checkpoint.load), job.values()
    except (CheckpointError, between.PeerFailedError) as error:
        return str(error)


def refused(said: list[Any], words: str) -> None:
    """Every rank has an error that matches."""
    for text in said:
        assert isinstance(text, str), text
        assert re.search(words, text), text


@pytest.fixture
def config(short_documents: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(*words: str) -> Config:
        return small(short_documents, "dp_shard=2", "llama3", f"--job.output={tmp_path / 'run'}", *words)

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in a shard": lambda folder: flip(folder / "shard-00001.safetensors", random.Random(1).randrange(1 << 20)),
    "a shard cut short": lambda folder: os.truncate(folder / "shard-00000.safetensors", 1000),
    "a shard gone": lambda folder: (folder / "shard-00001.safetensors").unlink(),
    "a flipped bit in the state": lambda folder: flip(folder / "state.json", 40),
    "a flipped bit in the index": lambda folder: flip(folder / "index.json", 2000),
    "a manifest cut short": lambda folder: os.truncate(folder / MANIFEST, 100),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest of another step": lambda folder: shutil.copy(step_folder(folder.parent, 1) / MANIFEST, folder),
    "a pickle for a shard": lambda folder: (folder / "shard-00000.safetensors").write_bytes(pickle.dumps(Payload(folder))),
    "a link for a shard": lambda folder: link(folder / "shard-00000.safetensors"),
}


class Payload:
    """What creates a file where someone unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder.parents[1] / "executed"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(
    pool: Pool, config: Callable[..., Config], root: Path, damage: str
) -> None:
    pool.run(2, save, config(), [1, 2])
    DAMAGE[damage](step_folder(root, 2))
    assert pool.run(2, resume, config()) == [(Progress(1, 10, 100), {1.0})] * 2
    assert committed_steps(root) == [1]
    (aside,) = damaged_folders(root)
    assert aside.name == "step-00000002.damaged"
    assert "step-00000002" in (aside / REASON).read_text()
    assert not (root.parent / "executed").exists()
    pool.run(2, save, config(), [2])  # the name is free again
    assert committed_steps(root) == [1, 2]


def test_without_a_whole_step_a_run_does_not_start_anew(pool: Pool, config: Callable[..., Config], root: Path) -> None:
    pool.run(2, save, config(), [1])
    flip(step_folder(root, 1) / "shard-00000.safetensors", 12345)
    for _ in range(2):
        refused(pool.run(2, resume, config()), r"no whole step is left .* step-00000001\.damaged")


def test_a_damaged_step_is_refused_as_a_start(pool: Pool, config: Callable[..., Config], root: Path, tmp_path: Path) -> None:
    pool.run(2, save, config(), [1])
    flip(step_folder(root, 1) / "shard-00000.safetensors", 999)
    other = config(f"--job.output={tmp_path / 'other'}", f"--checkpoint.load={step_folder(root, 1)}")
    refused(pool.run(2, resume, other), r"checkpoint\.load: .*shard-00000\.safetensors: not what was written")
    flip(step_folder(root, 1) / "shard-00000.safetensors", 999)
    step_folder(root, 1).rename(tmp_path / "of any name")  # as an import from elsewhere has
    other = config(f"--job.output={tmp_path / 'other'}", f"--checkpoint.load={tmp_path / 'of any name'}")
    assert pool.run(2, resume, other) == [(Progress(), {1.0})] * 2


# Files made to do harm: the manifest is right about them


def reseal(folder: Path) -> None:
    """A manifest that agrees with whatever is there, and an index with the right sizes."""
    step = read_manifest(folder).step
    index = json.loads((folder / "index.json").read_text())
    for name, entry in index["files"].items():
        if (folder / name).is_file():
            entry["bytes"] = (folder / name).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    files = {path.name: Written(path.stat().st_size, digest(path)) for path in folder.iterdir() if path.name != MANIFEST}
    write_manifest(folder, Manifest(step, files))


def rewrite_header(path: Path, change: Callable[[str], str]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length].decode().rstrip())
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])


def twice(header: str) -> str:
    """The first entry under its name a second time, at the second's place."""
    entries = json.loads(header)
    (first, one), (_, other) = list(entries.items())[:2]
    return header[:-1] + f",{json.dumps(first)}:{json.dumps(one | {'data_offsets': other['data_offsets']})}" + "}"


def rewrite_index(folder: Path, old: str, new: str) -> None:
    text = (folder / "index.json").read_text()
    assert old in text
    (folder / "index.json").write_text(text.replace(old, new))


SHARD = "shard-00000.safetensors"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda folder: (folder / SHARD).write_bytes(pickle.dumps(Payload(folder))), SHARD),
    "a name twice": (lambda folder: rewrite_header(folder / SHARD, twice), "names something twice"),
    "a header beyond the file": (lambda folder: (folder / SHARD).write_bytes(b"\xff" * 8 + b"{}"), SHARD),
    "offsets beyond the file": (
        lambda folder: rewrite_header(folder / SHARD, lambda text: text.replace('"data_offsets": [0,', '"data_offsets": [9,')),
        SHARD,
    ),
    "another dtype": (lambda folder: rewrite_header(folder / SHARD, lambda text: text.replace('"F32"', '"I32"', 1)), SHARD),
    "a way out": (lambda folder: rewrite_index(folder, SHARD, f"../step-00000001/{SHARD}"), "index.json"),
    "an absolute path": (lambda folder: rewrite_index(folder, SHARD, f"/tmp/{SHARD}"), "index.json"),
    "a tensor with holes": (lambda folder: rewrite_index(folder, '"offsets": [0, 0]', '"offsets": [1, 0]'), "index.json"),
    "a pickled state": (lambda folder: (folder / "state.json").write_bytes(pickle.dumps(Payload(folder))), "state.json"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_step_is_refused_by_name(pool: Pool, config: Callable[..., Config], root: Path, attack: str) -> None:
    pool.run(2, save, config(), [1, 2])
    change, words = HOSTILE[attack]
    change(step_folder(root, 2))
    reseal(step_folder(root, 2))
    refused(pool.run(2, resume, config()), words)
    assert not (root.parent / "executed").exists()


# No room, no permission, no rank


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's folder on a disk that holds one step, and not two."""
    disk = tmp_path / "run"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a small disk: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_up(rank: int, config: Config) -> list[str]:
    """On a worker: save until there is no room, then make room and save again. What the errors said."""
    job, errors = Job(rank, config), []
    for step in (1, 2, 3):
        try:
            job.step(step)
            job.step(step, save=False)
            job.saver.finish()
        except CheckpointError as error:
            errors.append(str(error))
        assert job.saver.saved == (1 if step == 2 else step), "a save that failed counts as saved"
        dist.barrier()
        if step == 2 and rank == 0:
            shutil.rmtree(step_folder(Path(config.job.output) / "checkpoints", 1))
        dist.barrier()
    return errors


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_costs_that_step_alone(
    pool: Pool, config: Callable[..., Config], small_disk: Path, root: Path, on_error: str, async_save: str
) -> None:
    words = (f"--checkpoint.on_error={on_error}", f"--checkpoint.async_save={async_save}")
    said = pool.run(2, fill_up, config(*words))
    for errors in said:
        assert len(errors) == (on_error == "stop")
        assert all("step 2 is not saved" in error and "No space left on device" in error for error in errors)
    assert committed_steps(root) == [3]
    verify(step_folder(root, 3))
    assert not temp_folder(root, 2).exists()


def test_the_last_save_stops_the_job_whatever_is_configured(
    pool: Pool, config: Callable[..., Config], small_disk: Path, root: Path
) -> None:
    refused(pool.run(2, save, config("--checkpoint.on_error=continue"), [1, 2]), "No space left")
    assert committed_steps(root) == [1]


def test_a_folder_that_cannot_be_made_is_named(pool: Pool, config: Callable[..., Config], root: Path) -> None:
    root.parent.mkdir()
    root.write_text("a file")
    first, other = pool.run(2, save, config(), [1])
    refused([first], r"checkpoints/\.step-00000001\.tmp: cannot be made \(.*File exists")
    refused([other], r"step 1 is not saved: .*\.step-00000001\.tmp is not there: rank 0 could not make it")
    assert root.read_text() == "a file"


def die_while_saving(rank: int, config: Config) -> None:
    """On a worker: rank 1 dies in the middle of its file."""
    def half(tensors: Any, folder: Path, group: Any) -> None:
        (folder / "shard-00001.safetensors").write_bytes(b"half")
        os._exit(9)

    job = Job(rank, config)
    with patch.object(managing, "save_tensors", half) if rank == 1 else nullcontext():
        job.step(2, last=True)


def test_a_rank_that_dies_while_saving_leaves_the_step_before(pool: Pool, config: Callable[..., Config], root: Path) -> None:
    pool.run(2, save, config(), [1])
    with pytest.raises(WorkerFailed):
        pool.run(2, die_while_saving, config())
    assert committed_steps(root) == [1]
    assert pool.run(2, resume, config()) == [(Progress(1, 10, 100), {1.0})] * 2
    assert not temp_folder(root, 2).exists()


# Beside training


def save_beside(rank: int, config: Config) -> tuple[list[str], float]:
    """On a worker: save step 1 slowly, go on meanwhile, with step 3 due before it is done."""
    job, save_tensors = Job(rank, config), managing.save_tensors

    def slow(*given: Any) -> Any:
        time.sleep(0.5 + 0.3 * rank)
        return save_tensors(*given)

    with patch.object(managing, "save_tensors", slow):
        for step in range(1, 5):
            job.step(step, save=step in (1, 3), last=False)
            dist.all_reduce(torch.ones(1000))  # training's own collectives
        stalled = job.saver.stalled
        job.step(5, last=True)
    return job.said, stalled


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_save_beside_training_holds_what_was_there_when_it_began(
    pool: Pool, config: Callable[..., Config], root: Path, when_busy: str
) -> None:
    wanted = config("--checkpoint.async_save=true", f"--checkpoint.when_busy={when_busy}")
    for said, stalled in pool.run(2, save_beside, wanted):
        assert any("step 3 is not saved" in line for line in said) == (when_busy == "skip")
        assert stalled > 0.4 if when_busy == "wait" else stalled < 0.4
    steps = [1, 3, 5] if when_busy == "wait" else [1, 5]
    assert committed_steps(root) == steps
    for step in reversed(steps):
        assert pool.run(2, resume, wanted) == [(Progress(step, 10 * step, 100 * step), {float(step)})] * 2
        shutil.rmtree(step_folder(root, step))


def fail_beside(rank: int, config: Config) -> tuple[int, str]:
    """On a worker: a save that fails on rank 1 alone, and in which of the next steps it is heard of."""
    job, save_tensors = Job(rank, config), managing.save_tensors

    def broken(*given: Any) -> Any:
        if rank == 1:
            (given[1] / "shard-00001.safetensors").write_text("in the way")
        return save_tensors(*given)

    with patch.object(managing, "save_tensors", broken):
        job.step(1)
        while not job.saver.failed:
            time.sleep(0.01)
    dist.barrier()
    for number in range(2, 5):
        try:
            job.step(number, save=False)
        except CheckpointError as error:
            return number, str(error)
    return 0, ""


def test_a_failed_save_is_heard_of_before_the_next_step(pool: Pool, config: Callable[..., Config], root: Path) -> None:
    for number, said in pool.run(2, fail_beside, config("--checkpoint.async_save=true")):
        assert number == 2
        assert "rank 1" in said
        assert "shard-00001.safetensors: cannot be written" in said
    assert committed_steps(root) == []


def save_validated(rank: int, config: Config) -> None:
    """On a worker: ten steps, some with a validation loss, of which step 3's is the least."""
    job = Job(rank, config)
    for step in range(1, 11):
        job.step(step, last=step == 10, loss={2: 3.0, 3: 1.5, 7: 1.6}.get(step))


def test_committed_steps_are_copied_and_a_copy_that_fails_costs_nothing_else(
    pool: Pool, config: Callable[..., Config], root: Path, tmp_path: Path
) -> None:
    url = f"--checkpoint.copy_to=file://{tmp_path}/backup"
    assert pool.run(2, save, config(url, "--checkpoint.async_save=true", "--checkpoint.keep_last=1"), [1, 2]) == [""] * 2
    assert committed_steps(root) == [2]
    for step in (1, 2):
        assert verify(step_folder(tmp_path / "backup", step)).step == step
    (tmp_path / "backup" / "step-00000003").write_text("in the way")
    assert pool.run(2, save, config(url), [3]) == [""] * 2
    assert committed_steps(root) == [2, 3]
    assert committed_steps(tmp_path / "backup") == [1, 2]


def test_what_the_config_keeps_stays(pool: Pool, config: Callable[..., Config], root: Path) -> None:
    words = ("--checkpoint.keep_last=2", "--checkpoint.keep_every=4", "--checkpoint.keep_best=true")
    pool.run(2, save_validated, config(*words, "--checkpoint.async_save=true"))
    assert committed_steps(root) == [3, 4, 8, 9, 10]
    assert sorted(path.name for path in root.iterdir()) == [f"step-{step:08d}" for step in (3, 4, 8, 9, 10)]
