"""Steps that must not count: a loss or a gradient that is no number, and a loss far above what it was.

**No number.** One NaN in a gradient is a NaN in every weight after the step. It has two causes: a fault of the machine, which
is gone when the step is run again, or the data and the weights, which give the same again. So the step's update is withheld,
the step is run again, and only what is broken twice is treated as real: left out (`guard.nonfinite = "skip"`, so many times in
a row at most) or the end of the job ("stop").

The host does not wait for a GPU to learn of it. Whether the update is applied is decided on the device (fused AdamW takes a
`found_inf` and then changes nothing), and once a step is broken, all later updates are withheld as well until the host has
noticed, a step later. Weights are then what they were before the broken step; the run goes back to it. A fault of the machine
leaves no trace in the curve.

**Far above.** With `guard.spike_sigmas`, a step whose loss is that many standard deviations above the mean of the last
accepted ones is left out, once and for all: batches that poison a run are rare, and this is cheaper than going back by hand.
The losses it compares with are saved, so that a resumed run decides alike. Source: OLMo 2 (arXiv:2501.00656, section 3), PaLM
(arXiv:2204.02311, section 5.1).

Loss and norm are sums over all ranks, equal on all to the bit: each rank decides by itself, and all alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from titan.config import Guard as Config
from titan.layout import local
from titan.ranks import Ranks, gathered
from titan.terminal import warn

P = TypeVar("P")


class BrokenError(RuntimeError):
    """The training itself is broken: there is nothing to go on from."""


@dataclass
class Judged(Generic[P]):
    """A step whose verdict is on its way to the host."""

    step: int
    before: P
    after: P
    share: Tensor
    """This rank's part of the loss."""
    found: Tensor
    """[broken, spike, loss]"""
    arrived: torch.cuda.Event | None


class Guard(Generic[P]):
    """Judges each step's loss and norm before the optimizer acts on them. P: what says how far a run is."""

    def __init__(
        self,
        config: Config,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        losses: list[float],
        before_end: Callable[[], None] = lambda: None,
    ) -> None:
        """losses: the last accepted ones, of a run that goes on (`losses()` of the one before). before_end: called, on all
        ranks, before a BrokenError."""
        self.before_end = before_end
        self.config, self.optimizer, self.ranks = config, optimizer, ranks
        self._replayed: int | None = None  # the step that is being run a second time
        self._in_a_row = 0  # steps left out since one was accepted
        self._broken = torch.zeros((), device=ranks.device)  # 1 from a broken step on, until the host has gone back to it
        recent = losses[-config.spike_window :]
        # The last accepted losses, the newest at the end; NaN where there was none yet.
        self._window = torch.tensor([float("nan")] * (config.spike_window - len(recent)) + recent, device=ranks.device)
        self._under_way: deque[Judged[P]] = deque()

    def judge(self, step: int, share: Tensor, loss: Tensor, norm: Tensor, before: P, after: P) -> None:
        """Before the optimizer's step: decide, on the device, whether it changes anything.

        share: this rank's part of the loss. loss: the mean over the global batch, norm: the gradient's; float32 scalars, the
        same on all ranks. before, after: how far the run was and will be.
        """
        self._broken = torch.maximum(self._broken, (~(loss.isfinite() & norm.isfinite())).float())
        spike = self._is_spike(loss)
        skip = torch.maximum(self._broken, spike)
        home = local(self.optimizer.param_groups[0]["params"][0]).device  # the host, where states are offloaded
        self.optimizer.found_inf = skip.to(home)  # type: ignore[attr-defined]
        if self.config.spike_sigmas:
            self._window = torch.where(skip > 0, self._window, torch.cat((self._window[1:], loss[None])))
        found, arrived = torch.stack((self._broken, spike, loss)), None
        if found.device.type == "cuda":
            found = torch.empty(3, pin_memory=True).copy_(found, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._under_way.append(Judged(step, before, after, share, found, arrived))

    def look(self, now: bool) -> P | None:
        """Hear of verdicts: where the run has to go back to, or None to go on. BrokenError if the job is to end.

        now: wait for the device. Otherwise the last step's verdict may come with the next look: a GPU is still at it.
        """
        while self._under_way:
            judged = self._under_way[0]
            if judged.arrived is not None:
                if not now and len(self._under_way) == 1:
                    return None
                judged.arrived.synchronize()
            self._under_way.popleft()
            broken, spike, loss = judged.found.tolist()
            if broken:
                return self._go_back(judged)
            if spike:
                self._leave_out(judged.step, f"its loss is {loss:.4g}, far above what it was")
                continue
            self._in_a_row = 0
            if self._replayed == judged.step:
                self._replayed = None
                self._say(f"step {judged.step}: the second time it is a number: a fault of the machine, not of the data")
        return None

    def losses(self) -> list[float]:
        """The last accepted losses, the oldest first, for a checkpoint. Waits for the device."""
        if not self.config.spike_sigmas:
            return []
        return [loss for loss in self._window.tolist() if loss == loss]

    def _is_spike(self, loss: Tensor) -> Tensor:
        """1 or 0. While there are few losses to compare with, nothing is one."""
        if not self.config.spike_sigmas:
            return torch.zeros_like(loss)
        count = (~self._window.isnan()).sum()
        mean = self._window.nansum() / count
        deviation = ((self._window - mean).square().nansum() / count).sqrt()
        return ((count * 2 >= len(self._window)) & (loss > mean + self.config.spike_sigmas * deviation)).float()

    def _go_back(self, judged: Judged[P]) -> P:
        """Before a step that is broken for the first time, after one that is left out. Later ones were withheld for it."""
        self._under_way.clear()
        self._broken.zero_()
        odd = [str(rank) for rank, fine in enumerate(gathered(self.ranks, bool(judged.share.isfinite()))) if not fine]
        cause = f"the loss of rank {', '.join(odd)} is no number" if odd else "the gradient is no number, the losses are"
        if self._replayed != judged.step:
            self._replayed = judged.step
            self._say(f"step {judged.step}: {cause}; no weight was changed, and the step is run again")
            return judged.before
        self._replayed = None
        if self.config.nonfinite == "stop":
            self.before_end()
            raise BrokenError(f"step {judged.step}: {cause}, twice: the batch and the weights give it, not the machine")
        self._leave_out(judged.step, f"{cause}, twice")
        return judged.after

    def _leave_out(self, step: int, why: str) -> None:
        self._in_a_row += 1
        if self._in_a_row > self.config.max_skips:
            self.before_end()
            raise BrokenError(f"step {step}: {why}: more than guard.max_skips = {self.config.max_skips} steps in a row")
        self._say(f"step {step} is left out: {why}")

    def _say(self, text: str) -> None:
        if self.ranks.first:
            warn(text)
