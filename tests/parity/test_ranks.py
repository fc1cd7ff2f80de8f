"""What ranks must agree on: a difference, or one rank's failure, is an error on every rank within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from titan import ranks as between
from titan.pool import Pool


def ask(rank: int, what: str, folder: str) -> str:
    """On a worker: run one agreement; the error's text, or "fine"."""
    ranks = between.Ranks(rank, dist.get_world_size(), torch.device("cpu"))
    output = Path(folder)
    try:
        match what:
            case "same":
                assert between.agree_on_setup(ranks, "text", output) < 5
                assert between.agree(ranks, 10 + rank, rank == 1) == (21, True)
                assert between.agree(ranks, 1, False) == (2, False)
                assert between.total(ranks, 0.5, rank) == [1.0, 1.0]
                assert between.largest(ranks, rank, -rank) == [1.0, 0.0]
                assert between.on_first(ranks, lambda: f"from {rank}") == "from 0"
            case "config":
                between.agree_on_setup(ranks, f"text {rank}", output)
            case "folder":
                between.agree_on_setup(ranks, "text", output / str(rank))
            case "unwritable":
                between.agree_on_setup(ranks, "text", Path("/dev/null/run"))
            case "first fails":
                between.on_first(ranks, lambda: 1 / 0)
            case "second fails":
                with between.same_outcome(ranks):
                    assert rank != 1, "planted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("same", "fine", "fine"),
        ("config", "the ranks differ in config", "the ranks differ in config"),
        ("folder", "does not see what rank 0 wrote", "does not see what rank 0 wrote"),
        ("unwritable", "rank 0 cannot write there", "rank 0 cannot write there"),
        ("first fails", "ZeroDivisionError", "PeerFailedError: rank 0: ZeroDivisionError"),
        ("second fails", "PeerFailedError: rank 1: AssertionError: planted", "AssertionError: planted"),
    ],
)
def test_agreement(pool: Pool, tmp_path: Path, what: str, first: str, second: str) -> None:
    said = pool.run(2, ask, what, str(tmp_path), timeout=60)
    assert first in said[0]
    assert second in said[1]
