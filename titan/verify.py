"""Does a plan compute what one process computes? Trained for a few steps each, the two are compared number by number.

Both runs go through the same build, loader and step as training. From each come, by name and in full: the initial weights,
which must be equal to the bit; every parameter's gradient in the first step; the loss and the gradient's norm of each step. A
gradient's error is the norm of the difference over the norm of the gradient:

    error(p) = |g_plan(p) - g_one(p)| / |g_one(p)|

In float32 with gradients that were added up in another order, 1e-7 to 1e-6 is rounding. A wrong divisor, a sum that was left
out or a label that is off by one is 1e-3 or more, and shows in the parameter where it happened: so the table names the worst.
Some gradients are zero but for rounding (a bias of keys moves all of a query's scores alike, which softmax does not see): where
both are below float32's epsilon times the model's typical element, there is no direction to compare, and they count as equal.

In Float8 rounding is not small. A number that lies where two roundings meet goes one way or the other by the last bit of the
sum that made it, and is then off by up to 1/8: that befalls one number in some hundred thousand. So most gradients agree as
they do in float32, and some only as well as Float8 itself does. A mistake of less than a tenth does not show there: a plan
is verified without Float8 first.

Each rank sends the blocks that it holds. Where several ranks hold the same block, they must agree, or the plan is broken even
though each of them looks right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from titan.config import Compile, Config, Kernels, Offload, Parallel, Recompute, degrees
from titan.layout import Cuts, block
from titan.pool import Pool
from titan.rehearsal import Rehearsal


@dataclass(frozen=True)
class Tolerance:
    """What is still rounding; relative."""

    gradient: float
    """Of a parameter's first gradient, to its norm."""
    loss: float
    """Of a step's loss, and of the gradient's norm, over five steps; AdamW amplifies rounding where a second moment is tiny."""


FLOAT32 = Tolerance(gradient=3e-6, loss=1e-5)
"""7e-7 against float64 was measured for one process alone."""
FLOAT8 = Tolerance(gradient=0.1, loss=5e-3)
"""As far as Float8 is from float32."""
REPLICA_TOLERANCE = 1e-6
"""Between ranks that hold the same block of a gradient, relative to the block's norm."""


@dataclass(frozen=True)
class Run:
    """What a few steps gave. Arrays are float32, of whole parameters."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """A plan against one process; errors are relative."""

    starts_equal: bool
    loss: float
    """Largest error of a step's loss."""
    norm: float
    """Largest error of a step's gradient norm."""
    gradients: dict[str, float]
    """Each parameter's error in the first step."""
    tolerance: Tolerance = FLOAT32

    @property
    def worst(self) -> str:
        return max(self.gradients, key=lambda name: (math.isnan(self.gradients[name]), self.gradients[name]))

    @property
    def gradient(self) -> float:
        return self.gradients[self.worst]

    @property
    def holds(self) -> bool:
        """Whether all that was compared is within the tolerances. Not-a-number is not."""
        return (
            self.starts_equal
            and self.loss <= self.tolerance.loss
            and self.norm <= self.tolerance.loss
            and all(error <= self.tolerance.gradient for error in self.gradients.values())
        )


def tolerance(config: Config) -> Tolerance:
    return FLOAT32 if config.precision.float8 == "none" else FLOAT8


def compare(got: Run, reference: Run, tolerance: Tolerance = FLOAT32) -> Comparison:
    """A run against the one-process run."""
    assert got.gradients.keys() == reference.gradients.keys(), "the runs have different parameters"
    expected = reference.gradients
    typical = math.sqrt(sum(_norm(g) ** 2 for g in expected.values()) / sum(g.size for g in expected.values()))
    errors = {}
    for name, gradient in expected.items():
        nothing = typical * np.finfo(np.float32).eps * math.sqrt(gradient.size)
        is_zero = max(_norm(gradient), _norm(got.gradients[name])) < nothing
        errors[name] = 0.0 if is_zero else _distance(got.gradients[name], gradient)
    return Comparison(
        all(np.array_equal(got.initial[name], weight) for name, weight in reference.initial.items()),
        _largest_error(got.losses, reference.losses),
        _largest_error(got.norms, reference.norms),
        errors,
        tolerance,
    )


class DisagreeError(RuntimeError):
    """Ranks that should hold the same part of a tensor do not."""


class Verifier:
    """Compares plans; the one-process run of a config is made once."""

    def __init__(self, pool: Pool, steps: int, mistake: str = "") -> None:
        """mistake: one of `titan.mistakes`, which the plan's ranks make, or none."""
        self.pool = pool
        self.steps = steps
        self.mistake = mistake
        self.references: dict[str, Run] = {}

    def compare(self, config: Config) -> Comparison:
        """A config, its data.path a folder of token shards, against the same without a plan."""
        alone = one_process(config)
        key = repr(alone)
        if key not in self.references:
            self.references[key] = run(self.pool, alone, 1, self.steps)
        world = degrees(config.parallel, 1).world
        got = run(self.pool, config, world, self.steps, mistake=self.mistake)
        return compare(got, self.references[key], tolerance(config))


def one_process(config: Config) -> Config:
    """The same training without any plan: one process that takes the whole batch at once."""
    training = replace(config.training, micro_batch_size=config.training.global_batch_size)
    plain = {"parallel": Parallel(), "recompute": Recompute(), "offload": Offload(), "compile": Compile(), "kernels": Kernels()}
    return replace(config, training=training, loss=replace(config.loss, chunk=0), **plain)  # type: ignore[arg-type]


def run(pool: Pool, config: Config, world: int, steps: int, timeout: float = 600.0, mistake: str = "") -> Run:
    """Train `steps` steps on `world` gloo ranks; data.path has to be a folder of token shards.

    Raises WorkerFailed where a rank fails, DisagreeError where ranks that hold the same block do not agree.
    """
    answers = pool.run(world, train, config, steps, pool.group_seconds, mistake, timeout=timeout)
    losses, norms = answers[0][:2]
    initial, gradients, final = zip(*(answer[2:] for answer in answers), strict=True)
    return Run(losses, norms, assemble(initial, 0), assemble(gradients, REPLICA_TOLERANCE), assemble(final, 0))


Blocks = dict[str, tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]
"""Name -> shape of the whole, offset of the block, block."""


def train(
    rank: int, config: Config, steps: int, seconds: float, mistake: str = ""
) -> tuple[list[float], list[float], Blocks, Blocks, Blocks]:
    """On a worker: the training loop without its logs and checkpoints."""
    from titan.mistakes import made

    with made(mistake):
        return _train(rank, config, steps, seconds)


def _train(rank: int, config: Config, steps: int, seconds: float) -> tuple[list[float], list[float], Blocks, Blocks, Blocks]:
    job = Rehearsal(rank, config, seconds)
    model, cuts = job.parts.model, job.parts.cuts
    initial, gradients = blocks_of(dict(model.named_parameters()), cuts), {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        if name == "norm" and job.number == 1:  # gradients are complete, and not clipped yet
            found = {name: p.grad for name, p in model.named_parameters()}
            without = [name for name, grad in found.items() if grad is None]
            assert not without, f"no gradient for {', '.join(without)}"
            gradients.update(blocks_of({name: grad for name, grad in found.items() if grad is not None}, cuts))
        yield

    outcomes = [job.step(part) for _ in range(steps)]
    job.close()
    losses, norms = [outcome.loss.item() for outcome in outcomes], [outcome.norm.item() for outcome in outcomes]
    return losses, norms, initial, gradients, blocks_of(dict(model.named_parameters()), cuts)


def blocks_of(tensors: Mapping[str, Tensor], cuts: Cuts) -> Blocks:
    found = {}
    for name, tensor in tensors.items():
        here = block(tensor.detach(), cuts.get(name))
        found[name] = (tuple(here.shape), here.offset, here.local.float().cpu().numpy().copy())
    return found


def assemble(by_rank: Sequence[Blocks], tolerance: float) -> dict[str, np.ndarray]:
    """Whole arrays out of all ranks' blocks. Ranks may hold the same block, and then have to agree."""
    whole: dict[str, np.ndarray] = {}
    seen: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    filled: dict[str, np.ndarray] = {}
    for rank, blocks in enumerate(by_rank):
        for name, (shape, offset, part) in blocks.items():
            full = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            place = tuple(slice(begin, begin + size) for begin, size in zip(offset, part.shape, strict=True))
            other = seen.setdefault((name, offset), part)
            if other.shape != part.shape or not _distance(part, other) <= tolerance:  # nor where it is no number
                raise DisagreeError(f"rank {rank} disagrees about {name} at {offset} with a rank that has the same part")
            full[place] = part
            filled.setdefault(name, np.zeros(shape, dtype=bool))[place] = True
    holes = [name for name, there in filled.items() if not there.all()]
    if holes:
        raise RuntimeError(f"no rank holds all of {', '.join(holes)}")
    return whole


def _norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64)))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    size, difference = _norm(b), float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    return difference / size if size else difference


def _largest_error(found: list[float], expected: list[float]) -> float:
    """The largest relative error of a row of numbers; not-a-number where there is one."""
    a, b = np.array(found), np.array(expected)
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), np.finfo(np.float64).tiny)))
