"""This process among the others: its rank and device, the process group, and what all ranks have to agree on.

Tensors on a GPU travel by NCCL; everything on a CPU, and small agreements between hosts always, by gloo. So counting the
tokens of a batch and asking whether anyone wants to stop never waits for a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titan import __version__


class PeerFailedError(RuntimeError):
    """Another rank failed in what all had to do; the message is that rank's."""


T = TypeVar("T")
SHARED_SECONDS = 10


@dataclass(frozen=True)
class Ranks:
    """Who this process is."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(timeout_seconds: float) -> Ranks:
    """Join the process group that torchrun's variables describe; without them, be a world of one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise RuntimeError(
                f"rank {rank} is number {local_rank} on {platform.node()}, which has {gpus} GPUs: start at most NPROC={gpus}"
            )
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # freed blocks of any size serve for others
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that PyTorch remembers, for whoever asks where it hangs
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore() if "RANK" not in os.environ else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_seconds))
    return Ranks(rank, world, device)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, for the next step to take again.

    By default it hands large blocks back to the kernel, and every step of a CPU run faults its activations in anew: with 12 M
    parameters in bfloat16, 9,000 to 42,000 page faults a step were counted, some percent of its time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: its largest value; above it, blocks are mapped one by one
        malloc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end before it is given back


def agree_on_setup(ranks: Ranks, config_text: str, output: Path) -> float:
    """Refuse to start on ranks that differ in config or versions, or that do not see one output folder.

    Returns the seconds that one small all-reduce takes on the device. Raises RuntimeError on every rank, naming the odd ones.
    """
    mine = {
        "config": hashlib.sha256(config_text.encode()).hexdigest()[:12],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "titan": __version__,
        "kind of device": ranks.device.type,
    }
    require_same(ranks, mine)
    _agree_on_folder(ranks, output)
    probe = torch.ones(1, device=ranks.device)
    for _ in range(3):  # the first one builds the communicator
        started = time.perf_counter()
        dist.all_reduce(probe)
        probe.item()
    return time.perf_counter() - started


def require_same(ranks: Ranks, facts: dict[str, str]) -> None:
    """Raise RuntimeError on every rank, naming the odd ones, unless all have the same facts."""
    everyone = gathered(ranks, facts)
    for key in facts:
        odd = [f"rank {r}: {said[key]}" for r, said in enumerate(everyone) if said[key] != everyone[0][key]]
        if odd:
            raise RuntimeError(f"the ranks differ in {key}: rank 0: {everyone[0][key]}; {'; '.join(odd[:4])}")


def agree(ranks: Ranks, count: int, *flags: bool) -> tuple[int, ...]:
    """Sum of a count over all ranks, and of each flag on how many it is raised: one small all-reduce between hosts."""
    if ranks.world == 1:
        return count, *map(int, flags)
    message = torch.tensor([count, *flags], dtype=torch.int64)
    dist.all_reduce(message)
    return tuple(message.tolist())


def gathered(ranks: Ranks, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value (picklable), in the order of the ranks."""
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def same_outcome(ranks: Ranks, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that may fail on some ranks only; leave it on all ranks in order, or with an error on all of them.

    group: of all ranks, where this goes on beside other things that they do together.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    said = gathered(ranks, None if problem is None else f"{type(problem).__name__}: {problem}", group)
    if problem is not None:
        raise problem
    for rank, words in enumerate(said):
        if words is not None:
            raise PeerFailedError(f"rank {rank}: {words}")


def on_first(ranks: Ranks, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Have rank 0 do something; everyone gets its result (picklable), or an error if it failed. group: as in `same_outcome`."""
    result: list[Any] = [None]
    with same_outcome(ranks, group):
        if ranks.first:
            result[0] = work()
    dist.broadcast_object_list(result, group=group)
    return result[0]  # type: ignore[no-any-return]


def say(ranks: Ranks, line: str) -> None:
    """Print a line, once for all ranks."""
    if ranks.first:
        print(line, flush=True)


def total(ranks: Ranks, *values: float) -> list[float]:
    """Sums over all ranks, in float64 between hosts."""
    message = torch.tensor(values, dtype=torch.float64)
    if ranks.world > 1:
        dist.all_reduce(message)
    return message.tolist()


def largest(ranks: Ranks, *values: float) -> list[float]:
    """Largest values over all ranks, in float64 between hosts."""
    message = torch.tensor(values, dtype=torch.float64)
    if ranks.world > 1:
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return message.tolist()


def _agree_on_folder(ranks: Ranks, output: Path) -> None:
    """Rank 0 leaves a file with a random name in the folder; everyone must see it, within a network file system's delay."""
    wanted = f"job.output = {output} must be a writable folder that all nodes share"

    def leave() -> str:
        name = f".seen-by-all-{os.urandom(8).hex()}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / name).touch()
        except OSError as error:
            raise RuntimeError(f"{wanted}: rank 0 cannot write there ({error.strerror})") from error
        return name

    probe = output / on_first(ranks, leave)
    deadline = time.monotonic() + SHARED_SECONDS
    try:
        with same_outcome(ranks):
            while not probe.exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{wanted}: rank {ranks.rank} on {platform.node()} does not see what rank 0 wrote there")
                time.sleep(0.1)
    finally:
        if ranks.first:
            probe.unlink(missing_ok=True)
