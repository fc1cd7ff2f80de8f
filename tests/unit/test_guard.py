"""Steps that must not count: what the guard withholds, where it goes back to, and when it gives up."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from titan.config import Guard as Config
from titan.guard import BrokenError, Guard
from titan.ranks import Ranks


@pytest.fixture(autouse=True, scope="module")
def alone() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A model whose weight grows by what the optimizer does; the guard's word for how far it is, is the step."""

    def __init__(self, losses: list[float] | None = None, **config: object) -> None:
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=True)
        self.guard: Guard[int] = Guard(Config(**config), self.optimizer, Ranks(0, 1, torch.device("cpu")), losses or [])  # type: ignore[arg-type]

    def step(self, number: int, loss: float, norm: float = 1.0) -> bool:
        """A step that has not been looked at yet; whether it changed the weight."""
        before = self.weight.item()
        self.weight.grad = torch.ones(1)
        found = torch.tensor(loss)
        self.guard.judge(number, found, found, torch.tensor(norm), number - 1, number)
        self.optimizer.step()
        return self.weight.item() != before


def test_a_fault_of_the_machine_is_run_again_and_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    plain, run = Run(), Run()
    for number in (1, 2, 3, 4):
        assert plain.step(number, 1.0)
        assert plain.guard.look(now=True) is None
    assert run.step(1, 1.0)
    assert run.guard.look(now=True) is None
    assert not run.step(2, 1.0, norm=math.inf)
    assert not run.step(3, 1.0), "a step after a broken one changed weights before anybody went back"
    assert run.guard.look(now=True) == 1
    assert "step 2: the gradient is no number" in capsys.readouterr().err
    for number in (2, 3, 4):
        assert run.step(number, 1.0)
        assert run.guard.look(now=True) is None
    assert "step 2: the second time it is a number" in capsys.readouterr().err
    assert run.weight.item() == plain.weight.item()
    assert run.optimizer.state[run.weight]["step"].item() == 4


def test_what_is_broken_twice_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    assert not run.step(1, math.nan)
    assert run.guard.look(now=True) == 0
    assert not run.step(1, math.nan)
    assert not run.step(2, 1.0)
    assert run.guard.look(now=True) == 1  # step 2 was withheld for its sake, and is run again
    assert "step 1 is left out: the loss of rank 0 is no number, twice" in capsys.readouterr().err
    assert run.step(2, 1.0)
    assert run.guard.look(now=True) is None


def test_what_is_broken_twice_ends_the_job_if_that_is_wanted() -> None:
    run = Run(nonfinite="stop")
    run.step(5, math.inf)
    assert run.guard.look(now=True) == 4
    run.step(5, math.inf)
    with pytest.raises(BrokenError, match="step 5: the loss of rank 0 is no number, twice"):
        run.guard.look(now=True)


def test_too_many_in_a_row_end_the_job() -> None:
    run = Run(max_skips=2)
    for number in (1, 2, 4, 5):
        if number == 4:
            assert run.step(3, 1.0)
            assert run.guard.look(now=True) is None
        for back in (number - 1, number):
            run.step(number, math.nan)
            assert run.guard.look(now=True) == back
    run.step(6, math.nan)
    run.guard.look(now=True)
    run.step(6, math.nan)
    with pytest.raises(BrokenError, match=r"guard\.max_skips = 2"):
        run.guard.look(now=True)


@pytest.mark.parametrize("seed", range(10))
def test_a_spike_is_left_out_by_the_losses_before_it(seed: int) -> None:
    """Against a plain computation of mean and deviation, and again in a run that goes on from the saved losses."""
    draw, window = random.Random(seed), 10
    run, accepted = Run(spike_sigmas=3.0, spike_window=window, max_skips=1000), list[float]()
    for number in range(1, 120):
        if number == 60:
            saved = run.guard.losses()
            assert saved == pytest.approx(accepted[-window:])
            run = Run(saved, spike_sigmas=3.0, spike_window=window, max_skips=1000)
        loss = 3 + draw.gauss(0, 0.1) + (draw.random() < 0.1) * draw.uniform(0.1, 3)
        recent = accepted[-window:]
        spike = False
        if 2 * len(recent) >= window:
            mean = sum(recent) / len(recent)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
            spike = loss > mean + 3 * deviation
        assert run.step(number, loss) == (not spike)
        assert run.guard.look(now=True) is None
        accepted += [] if spike else [loss]


def test_without_the_key_nothing_is_a_spike() -> None:
    run = Run()
    for number in range(1, 200):
        assert run.step(number, 1.0 if number % 100 else 1e30)
        assert run.guard.look(now=True) is None
    assert run.guard.losses() == []
