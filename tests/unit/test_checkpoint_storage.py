"""What is saved under one sharding comes back to the bit under any other, or with an error that names the culprit."""

from __future__ import annotations

import builtins
import hashlib
import json
import multiprocessing
import pickle
import random
import traceback
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan.checkpoint.index import tensor_names
from titan.checkpoint.manifest import CheckpointError
from titan.checkpoint.storage import (
    DTYPES,
    INDEX,
    Chunk,
    load_tensors,
    read_index,
    save_tensors,
    write_safetensors,
)

WORKER_SECONDS = 60
SHAPES = [(), (1,), (2,), (3,), (7,), (0,), (1, 1), (2, 3), (3, 2), (5, 4), (4, 5), (1, 7), (7, 1), (0, 3), (3, 0)]
SHAPES += [(2, 3, 4), (9, 1, 2)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits: every value that the dtype can have, NaNs with their payloads too."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def random_state(seed: int) -> dict[str, Tensor]:
    """Every shape in float32, and each other dtype in some shape."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    kinds = [(shape, torch.float32) for shape in SHAPES] + [(rng.choice(SHAPES), dtype) for dtype in DTYPES.values()]
    kinds += [((), torch.int64), ((6, 3), torch.bfloat16), ((5, 3), torch.bool)]
    return {f"layers.{i}.{rng.choice('abc')}": random_tensor(*kind, generator) for i, kind in enumerate(kinds)}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    tensor = tensor.detach()
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert bits(found[name]) == bits(expected[name]), name


def flipped(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor
    return (~tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).reshape(tensor.shape)


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like these, with every bit another."""
    return {name: flipped(tensor) for name, tensor in state.items()}


# One process


@pytest.mark.parametrize("seed", range(3))
def test_round_trip(tmp_path: Path, seed: int) -> None:
    state = random_state(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_tensors(state, tmp_path)
        loaded = other(state)
        load_tensors(loaded, tmp_path)
    assert_equal(loaded, state)
    assert tensor_names(tmp_path) == set(state)
    index = read_index(tmp_path)
    for name, tensor in state.items():
        assert (index.tensors[name].dtype, index.tensors[name].shape) == (tensor.dtype, tuple(tensor.shape))


def test_views_parameters_and_a_subset(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {"t": base.t(), "part": base[1:4, 2:5], "step": base[0, 0], "p": torch.nn.Parameter(torch.randn(3, 3))}
    save_tensors(state, tmp_path)
    big = torch.zeros(8, 4)
    parameter = torch.nn.Parameter(torch.zeros(3, 3))
    asked = {"part": big[::2, 1:], "p": parameter}
    with pytest.raises(CheckpointError, match="'part'"):
        load_tensors(asked, tmp_path)
    asked["part"] = big[::3, 1:]
    load_tensors(asked, tmp_path)
    assert torch.equal(big[::3, 1:], state["part"])
    assert big[:, 0].eq(0).all()
    assert big[1::3].eq(0).all()
    assert asked["p"] is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter, state["p"])


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    """The library is the witness for the hand-written layout."""
    state = random_state(11)
    save_tensors(state, tmp_path)
    with safe_open(tmp_path / "shard-00000.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert_equal(found, {f"{name}@{','.join('0' * tensor.dim())}": tensor for name, tensor in state.items()})
    raw = (tmp_path / "shard-00000.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for entry in json.loads(raw[8 : 8 + length]).values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0, "not aligned"


def test_only_json_and_safetensors_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(12)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read or written")

    for module, names in {pickle: ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"), torch: ("load", "save")}.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, refuse)
    save_tensors(state, tmp_path)
    loaded = other(state)
    load_tensors(loaded, tmp_path)
    monkeypatch.undo()
    assert_equal(loaded, state)
    assert {path.name for path in tmp_path.iterdir()} == {"shard-00000.safetensors", INDEX}
    json.loads((tmp_path / INDEX).read_text())


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    state = random_state(13)
    for name, items in {"a": state.items(), "b": reversed(state.items())}.items():
        (tmp_path / name).mkdir()
        save_tensors(dict(items), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    last: list[weakref.ref[Any]] = []

    def tensor(key: str) -> Tensor:
        assert all(array() is None for array in last)
        array = numpy.full(4, int(key))
        last.append(weakref.ref(array))
        return torch.from_numpy(array)

    entries = {str(i): (torch.int64, (4,)) for i in range(20)}
    written = write_safetensors(tmp_path / "x.safetensors", entries, tensor)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert all(file.get_tensor(key).eq(int(key)).all() for key in entries)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"w": torch.zeros(4, 3, dtype=torch.bfloat16)},
            r"'w' is \(torch.float32, \(4, 3\)\) there, \(torch.bfloat16, \(4, 3\)\)",
        ),
        ({"w": torch.zeros(3, 4)}, r"'w' is \(torch.float32, \(4, 3\)\) there, \(torch.float32, \(3, 4\)\) here"),
        ({"w": torch.zeros(12)}, r"'w' .*\(12,\)"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, r"'step' .*\(torch.int64, \(\)\) there, \(torch.int64, \(1,\)\)"),
        ({"more": torch.zeros(2)}, r"'more' is not there"),
        ({"w": 3}, r"'w' .* int"),
        ({"w": {"nested": torch.zeros(4, 3)}}, r"'w' .* dict"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_changes(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    save_tensors({"a": torch.ones(3), "w": torch.randn(4, 3), "step": torch.tensor(7)}, tmp_path)
    asked = {"a": torch.zeros(3), **wrong}
    with pytest.raises(CheckpointError, match=said) as caught:
        load_tensors(asked, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert asked["a"].eq(0).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x": 1}, "'x' is not a tensor"),
        ({"x": None}, "'x' is not a tensor"),
        ({"x": {"y": torch.zeros(1)}}, "'x' is not a tensor"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "'x' is torch.complex64"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        save_tensors({"a": torch.ones(3), **wrong}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_written_twice_nor_made(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors"):
        save_tensors({"a": torch.zeros(3)}, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        save_tensors({"a": torch.zeros(3)}, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"rank 0: \S*nowhere/index\.json"):
        load_tensors({"a": torch.zeros(3)}, tmp_path / "nowhere")
    loaded = {"a": torch.zeros(3)}
    load_tensors(loaded, tmp_path)
    assert loaded["a"].eq(1).all()


def damaged(data: bytes, how: str, rng: random.Random) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "truncated":
        return data[: rng.randrange(len(data))]
    if how == "grown":
        return data + b"\0"
    at = rng.randrange(8) if how == "length" else rng.randrange(8, header)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


@pytest.mark.parametrize("how", ["truncated", "grown", "length", "header", "gone"])
def test_a_damaged_shard_is_refused_by_name_or_reads_right(tmp_path: Path, how: str) -> None:
    """A flipped bit in the header may be harmless (a space); it never gives other values, nor another error."""
    state = {"w": torch.arange(15.0).reshape(5, 3), "b": torch.arange(3), "s": torch.tensor(2.5)}
    save_tensors(state, tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    whole, errors = path.read_bytes(), []
    for seed in range(1 if how in ("gone", "grown") else 40):
        path.unlink(missing_ok=True)
        if how != "gone":
            path.write_bytes(damaged(whole, how, random.Random(seed)))
        loaded = other(state)
        try:
            load_tensors(loaded, tmp_path)
        except CheckpointError as error:
            errors.append(str(error))
        else:
            assert how == "header", seed
            assert_equal(loaded, state)
    assert all("shard-00000.safetensors" in error for error in errors), errors
    if how in ("truncated", "grown"):
        assert all(f"bytes, index.json says {len(whole)}" in error for error in errors), errors
    assert len(errors) >= (20 if how in ("truncated", "length", "header") else 1)


def index_changes() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What a hostile or broken index may say, and the words the refusal must have."""

    def chunk(index: dict[str, Any]) -> dict[str, Any]:
        return index["tensors"]["w"]["chunks"][0]

    def put_file(name: str, index: dict[str, Any]) -> None:
        index["files"][name] = {"bytes": 1}
        chunk(index)["file"] = name

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "version": lambda i: i.update(version=2),
        "format": lambda i: i.update(format="other"),
        "dtype": lambda i: i["tensors"]["w"].update(dtype="PICKLE"),
        "no tensors": lambda i: i.pop("tensors"),
        "files are a list": lambda i: i.update(files=[]),
        "tensor is a list": lambda i: i["tensors"].update(w=[]),
        "shape is negative": lambda i: i["tensors"]["w"].update(shape=[-4, -3]),
        "shape is a float": lambda i: i["tensors"]["w"].update(shape=[4.0, 3]),
        "a chunk is missing": lambda i: i["tensors"]["w"].update(chunks=[]),
        "a chunk is outside": lambda i: chunk(i).update(offsets=[1, 0]),
        "a chunk has more dimensions": lambda i: chunk(i).update(offsets=[0, 0, 0], shape=[4, 3, 1]),
        "a chunk is in a file not listed": lambda i: chunk(i).update(file="shard-00001.safetensors"),
        "a key is a number": lambda i: chunk(i).update(key=3),
        "a size is a text": lambda i: i["files"].update({"shard-00000.safetensors": {"bytes": "1"}}),
    }
    for name in ("../x.safetensors", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "a\0b", ""):
        changes[f"file {name!r}"] = partial(put_file, name)
    return changes


@pytest.mark.parametrize("what", index_changes())
def test_a_wrong_index_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    save_tensors({"w": torch.randn(4, 3), "b": torch.zeros(2)}, folder)
    (tmp_path / "x.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())  # a prize outside
    index = json.loads((folder / INDEX).read_text())
    index_changes()[what](index)
    (folder / INDEX).write_text(json.dumps(index))
    loaded = {"b": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"step/index\.json"):
        load_tensors(loaded, folder)
    assert loaded["b"].eq(1).all()


def test_an_index_that_disagrees_with_the_file_is_refused(tmp_path: Path) -> None:
    save_tensors({"w": torch.randn(4, 3), "v": torch.randn(3, 4)}, tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    for change in ({"key": "v@0,0"}, {"key": "nothing"}):
        index["tensors"]["w"]["chunks"][0].update(change)
        (tmp_path / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors"):
            load_tensors({"w": torch.zeros(4, 3)}, tmp_path)


# Four processes


def shard(full: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """The DTensor of a full tensor that every rank has; plain where there is no such dimension."""
    if any(isinstance(placement, Shard) and placement.dim >= full.dim() for placement in placements):
        return full.clone()
    shape, offset = compute_local_shape_and_global_offset(full.shape, mesh, placements)
    local = full[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def local(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def check_load(folder: Path, state: dict[str, Tensor], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
    expected = {name: shard(tensor, mesh, placements) for name, tensor in state.items()}
    found = {name: shard(tensor, mesh, placements) for name, tensor in other(state).items()}
    load_tensors(found, folder)
    assert_equal(local(found), local(expected))


def cases(rank: int, folder: Path, state: dict[str, Tensor]) -> None:
    line, grid = DeviceMesh("cpu", torch.arange(4)), DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
    two, pair = DeviceMesh("cpu", [0, 1]), dist.new_group([0, 1])

    # Save under each of these layouts, on two ranks, and on one; load each as plain tensors and under two layouts.
    layouts: dict[str, tuple[DeviceMesh, tuple[Placement, ...]]] = {
        "fsdp": (line, (Shard(0),)),
        "columns": (line, (Shard(1),)),
        "replicate": (line, (Replicate(),)),
        "hsdp": (grid, (Replicate(), Shard(0))),
        "grid": (grid, (Shard(0), Shard(1))),
        "nested": (grid, (Shard(0), Shard(0))),
    }
    for name, (mesh, placements) in layouts.items():
        save_tensors({key: shard(tensor, mesh, placements) for key, tensor in state.items()}, folder / name)
    if rank < 2:
        save_tensors({key: shard(tensor, two, (Shard(0),)) for key, tensor in state.items()}, folder / "two", pair)
    dist.barrier()
    rotated = random.Random(len(state)).sample(sorted(layouts), len(layouts))
    for name in ("alone", "two", *layouts):
        for layout in rotated[:2]:
            check_load(folder / name, state, *layouts[layout])
        rotated = rotated[1:] + rotated[:1]
        plain = other(state)
        load_tensors(plain, folder / name)
        assert_equal(plain, state)

    # As under a pipeline: every rank has names of its own, saves only those, and may ask for any.
    names = sorted(state)
    save_tensors({name: state[name] for name in names[rank::4]}, folder / "pipeline")
    asked = {name: other(state)[name] for name in names[(rank + 1) % 4 :: 4]}
    load_tensors(asked, folder / "pipeline")
    assert_equal(asked, {name: state[name] for name in asked})

    # Plain tensors of the same name are written once, and the work is spread.
    save_tensors({f"w{i}": torch.full((1000,), float(i)) for i in range(40)}, folder / "plain")

    # One rank's mistake is every rank's error, with its rank, and the group goes on.
    mistakes: list[Any] = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), shard(torch.zeros(2), line, (Replicate(),)), 1]
    for wrong in mistakes:
        refused(partial(save_tensors, {"w": wrong if rank == 2 else torch.zeros(2)}, folder / "wrong"), "'w'", "rank 2")
    refused(lambda: load_tensors({"w0": torch.zeros(9 if rank == 3 else 1000)}, folder / "plain"), "rank 3: ", "'w0'", "(9,)")
    refused(lambda: load_tensors({"w0": torch.zeros(1000)}, folder / "nowhere"), "rank 0, 1, 2, 3: ", "nowhere/index.json")


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def worker(rank: int, store: str, folder: Path, seed: int, errors: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=timedelta(seconds=30))
        warnings.simplefilter("error")
        cases(rank, folder, random_state(seed))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"seed {seed}, rank {rank}: {traceback.format_exc()}")
        raise


def test_any_sharding_to_any_other(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    state = random_state(seed)
    folder = tmp_path / "saved"
    for name in ("fsdp", "columns", "replicate", "hsdp", "grid", "nested", "two", "pipeline", "plain", "wrong", "alone"):
        (folder / name).mkdir(parents=True)
    save_tensors(state, folder / "alone")

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titan.checkpoint.storage", "torch.distributed.tensor", "pytest"])
    errors = context.Queue()
    arguments = (f"file://{tmp_path}/store", folder, seed, errors)
    workers = [context.Process(target=worker, args=(rank, *arguments), daemon=True) for rank in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(WORKER_SECONDS)
        if process.exitcode is None:
            process.kill()
    said = [] if errors.empty() else [errors.get(timeout=5)]
    assert [process.exitcode for process in workers] == [0] * 4, "\n".join([f"seed {seed}", *said])

    for name in ("fsdp", "columns", "replicate", "hsdp", "grid", "nested", "two", "pipeline"):
        loaded = other(state)
        load_tensors(loaded, folder / name)
        assert_equal(loaded, state)
        written_once(folder / name, state)
        assert {path.suffix for path in (folder / name).iterdir()} == {".json", ".safetensors"}
    sizes = [path.stat().st_size for path in (folder / "plain").glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) < 1.2 * min(sizes)
    assert list((folder / "wrong").iterdir()) == []


def written_once(folder: Path, state: dict[str, Tensor]) -> None:
    """Each element lies in the files exactly once."""
    held: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = key.rpartition("@")[0]
                held[name] = held.get(name, 0) + file.get_tensor(key).numel()
    assert held == {name: tensor.numel() for name, tensor in state.items()}
    for name, entry in read_index(folder).tensors.items():
        assert state[name].numel() == 0 or all(0 not in chunk.shape for chunk in entry.chunks.values()), name


def test_the_chunks_of_an_index(tmp_path: Path) -> None:
    save_tensors({"w": torch.zeros(4, 3)}, tmp_path)
    index = read_index(tmp_path)
    assert index.tensors["w"].chunks == {(0, 0): Chunk((0, 0), (4, 3), "shard-00000.safetensors", "w@0,0")}
    assert index.files == {"shard-00000.safetensors": (tmp_path / "shard-00000.safetensors").stat().st_size}
