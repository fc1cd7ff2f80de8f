"""The worker pool: a rank that fails, or dies, ends the call within seconds, with its story; the next call works again."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from titan.pool import Pool, WorkerFailed


@pytest.mark.parametrize(("how", "said"), [("raise", "planted on rank 1"), ("die", "the process died")])
def test_a_rank_that_fails_ends_the_call_with_its_story(how: str, said: str) -> None:
    with Pool() as pool:
        pool.run(2, fail_on_rank_one, "not at all", timeout=60)
        began = time.monotonic()
        with pytest.raises(WorkerFailed, match=rf"(?s)rank 1: .*{said}"):
            pool.run(2, fail_on_rank_one, how, timeout=60)
        assert time.monotonic() - began < 20
        pool.run(2, fail_on_rank_one, "not at all", timeout=60)


def test_a_worker_that_dies_while_it_starts_is_said_and_made_again() -> None:
    with Pool(workers=2) as pool:
        pool.workers[1][0].kill()
        with pytest.raises(WorkerFailed, match="rank 1: the process died while it started"):
            pool.run(2, fail_on_rank_one, "not at all", timeout=60)
        pool.run(2, fail_on_rank_one, "not at all", timeout=60)


def fail_on_rank_one(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise RuntimeError("planted on rank 1")
    if rank == 1 and how == "die":
        os._exit(7)
    dist.all_reduce(torch.zeros(1))
