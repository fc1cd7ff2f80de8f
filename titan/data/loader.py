"""The loader: from windows to one rank's batches, read ahead by worker processes.

A sample is a window (`titan.data.windows`), the next one in the run's order (`titan.data.mixture`, `titan.data.sampler`). A
batch is the next G global samples, with G the global batch size, and a rank takes its contiguous part of them. All of that is
arithmetic on the next sample's number, so that number is the loader's whole state, and ranks, workers and batch size may
change from one start to the next. torchdata's StatefulDataLoader serves as the read-ahead; the state that it could save is not
used, because it holds only for an equal number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan.data.mixture import Samples
from titan.data.windows import IGNORED


class WorkerDiedError(RuntimeError):
    """A process that reads ahead is gone. The message says which and of what."""


class RankBatches(Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset whose item i is one rank's part of the i-th batch: tokens and labels, int64 [local batch, seq_len], and
    where documents are kept apart document_ids and positions, the same."""

    def __init__(self, samples: Samples, first: int, size: int, stride: int, end: int | None) -> None:
        """The rank takes `size` samples from number first + i * stride. From sample `end` on, if there is one, a batch is
        filled up with labels that no loss counts."""
        self.samples = samples
        self.first, self.size, self.stride = first, size, stride
        self.end = sys.maxsize if end is None else end

    def __getitem__(self, batch: int) -> dict[str, torch.Tensor]:
        shape = (self.size, self.samples.seq_len)
        arrays = {"tokens": np.zeros(shape, dtype=np.int64), "labels": np.full(shape, IGNORED, dtype=np.int64)}
        if self.samples.document_mask:
            arrays["document_ids"] = np.zeros(shape, dtype=np.int64)
            arrays["positions"] = np.tile(np.arange(shape[1], dtype=np.int64), (self.size, 1))
        for row in range(self.size):
            sample = self.first + batch * self.stride + row
            if sample >= self.end:
                break
            for name, array in self.samples.read(sample).items():
                arrays[name][row] = array
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def loader(
    samples: Samples,
    *,
    global_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    start_sample: int,
    workers: int,
    once: bool = False,
    limit: int | None = None,
) -> Generator[dict[str, torch.Tensor]]:
    """One rank's part of the global batches from sample `start_sample` on, at most `limit` of them.

    Each is a dict of `tokens` and `labels`, int64 [local batch, seq_len], with global_batch_size / dp_degree sequences.

    Where documents are kept apart it also has `document_ids` and `positions`, of the same shape. document_ids counts the
    documents within a row from 0; positions restart at 0 at each one's first token in the row. The token that ends a document
    belongs to it. In contiguous windows it keeps its label, the first token of the next document: it sees its own document
    alone, so what it learns is how documents begin, and the number of labels does not depend on the mask. Samples that fill a
    batch up are one document.

    It goes on epoch after epoch. With `once`, for validation, of one source, it ends with the first epoch, and the last global
    batch is filled up with samples whose labels are all -100, so every sample counts once and all ranks get as many batches. No
    global random state is used. Closing or dropping the iterator ends its workers.
    Raises ValueError where the ranks do not divide the batch, and WorkerDiedError within seconds of needing a batch of a worker
    that is dead.
    """
    if global_batch_size % dp_degree or not 0 <= dp_rank < dp_degree:
        raise ValueError(f"rank {dp_rank} of {dp_degree} cannot take an equal part of a batch of {global_batch_size} samples")
    size = global_batch_size // dp_degree
    end = samples.count if once else None
    batches = RankBatches(samples, start_sample + dp_rank * size, size, global_batch_size, end)
    count = sys.maxsize if limit is None else limit
    if once:
        count = min(count, max(0, -(-(samples.count - start_sample) // global_batch_size)))
    return _read_ahead(batches, range(count), workers)


def _read_ahead(batches: RankBatches, numbers: range, workers: int) -> Generator[dict[str, torch.Tensor]]:
    """The batches of these numbers in order; workers live as long as the iterator."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata's own affair
        stateful = StatefulDataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_the_jobs_signals,
            generator=torch.Generator(),  # else it draws from the global random state
        )
    iterator = iter(stateful)
    if workers and iterator._worker_pids_set:
        # PyTorch would raise in a signal's handler, wherever training is. Without that, it is found where a batch is missing.
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    try:
        yield from iterator
    except RuntimeError as error:
        if not workers or "exited unexpectedly" not in str(error):
            raise
        raise WorkerDiedError(_the_dead(iterator._workers)) from error
    finally:
        if workers:  # now, though a traceback may still hold the iterator
            iterator._shutdown_workers()


def _the_dead(workers: Sequence[multiprocessing.Process]) -> str:
    """Which of a rank's workers died, and of what, for people."""
    dead = [f"{i} (pid {worker.pid}, {_death(worker.exitcode)})" for i, worker in enumerate(workers) if not worker.is_alive()]
    return (
        f"of this rank's {len(workers)} workers that read ahead (data.workers), {', '.join(dead)} died; where the memory was "
        "used up, lower data.workers, or set it to 0 to read in the training process"
    )


def _death(code: int | None) -> str:
    return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _ignore_the_jobs_signals(worker: int) -> None:
    """Let a worker outlive signals meant for the job.

    Ctrl-C, SLURM and launchers signal every process of a job. The training process then still wants batches, to finish its
    step and save; it ends its workers itself, at the latest by a SIGTERM when it exits. So a worker ignores all but that.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for a SIGTERM from the training process, and leave at once."""
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
