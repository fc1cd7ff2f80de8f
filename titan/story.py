"""One step as a rank goes through it, in plain sentences: from the batch to the optimizer, with the figures of a real step.

`live` runs on the rank and brings back facts; `tell` makes sentences of them. Bytes are those that `titan trace` counts and
compares with the formulas.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from titan.config import Config, Degrees, accumulation, degrees
from titan.drawing.memory import amount
from titan.drawing.mesh import Place, places, words
from titan.drawing.shards import ranges
from titan.holdings import in_words, parts_of, share
from titan.parallel.context import pieces
from titan.parallel.schedules import Table, table
from titan.rehearsal import FLAGS, Outcome, Rehearsal
from titan.tracing import Recorder
from titan.traffic.shape import Flow
from titan.traffic.step import expected

OPERATIONS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "send": "message sent",
    "recv": "message received",
    "broadcast": "broadcast",
}


@dataclass
class Facts:
    """What a rank can tell of its step."""

    number: int
    place: Place
    outcome: Outcome
    modules: str
    own: int
    """Parameters that it holds."""
    whole: int
    """Parameters of those modules in all."""
    flows: list[Flow]
    messages: int
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each part of the step."""


def live(rank: int, config: Config, number: int, seconds: float) -> Facts:
    """On a rank: its step of this number, 2 or more. config: from `titan.rehearsal.with_data`."""
    job = Rehearsal(rank, config, seconds)
    for _ in range(number - 1):
        job.step()
    recorder, spent = Recorder(job.mesh), Counter[str]()

    @contextmanager
    def part(name: str) -> Iterator[None]:
        began = time.perf_counter()
        with recorder.at(name):
            yield
        spent[name] += time.perf_counter() - began  # type: ignore[assignment]

    outcome = job.step(part)
    job.close()
    held = parts_of(job.parts.model, job.parts.cuts)
    traffic = recorder.traffic(1)
    return Facts(
        number,
        places(degrees(config.parallel, job.ranks.world))[rank],
        outcome,
        in_words(held, job.parts.table),
        *share(held),
        expected(config, job.mesh, job.parts, len(FLAGS)),
        sum(count for count, _ in traffic.values()),
        sum(size for _, size in traffic.values()),
        dict(spent),
    )


def tell(config: Config, world: int, facts: Facts) -> Iterator[tuple[str, str]]:
    """The step's parts in order: a word for each, and its sentences."""
    plan, training = degrees(config.parallel, world), config.training
    yield "who", who(plan, world, facts)
    yield "batch", batch(config, plan, facts)
    yield "count", count(world, facts)
    if flows := at(facts, "weights"):
        yield "weights", listed(flows)
    yield "forward", forward(config, plan, facts)
    if flows := at(facts, "hand-over"):
        yield "hand-over", hand_over(config, plan, facts) + listed(flows)
    yield "backward", backward(config, facts)
    if flows := at(facts, "gradients"):
        yield "gradients", f"After the last pass: {listed(flows)}"
    yield "norm", norm(training.clip_norm, world, facts)
    yield "optimizer", optimizer(config, facts)
    yield "in all", in_all(facts)


def at(facts: Facts, phase: str) -> list[Flow]:
    return [flow for flow in facts.flows if flow.phase == phase]


def listed(flows: list[Flow]) -> str:
    """Sentences: how many messages, over which dimension, how large together, what for."""
    said = []
    for flow in flows:
        name = OPERATIONS[flow.op]
        first, *rest = name.split(" ")
        many = " ".join([first if flow.count == 1 else f"{first}s", *rest])
        said.append(f"{flow.count:,} {many} over {flow.dimension}, {amount(flow.bytes)}: {flow.what}")
    return "; ".join(said) + "."


def who(plan: Degrees, world: int, facts: Facts) -> str:
    said = "one process, alone"
    if world > 1:
        said = f"this is rank {facts.place.rank} of {world} ({words(plan, facts.place)})"
    size = 4 * facts.own
    return (
        f"Step {facts.number}: {said}. It holds {facts.modules}: {facts.own:,} of their {facts.whole:,} parameters, "
        f"{amount(size)} in float32. Gradients take as much again, and AdamW's two states twice as much: "
        f"{amount(4 * size)} in all."
    )


def batch(config: Config, plan: Degrees, facts: Facts) -> str:
    training = config.training
    total, each = training.global_batch_size, training.global_batch_size // plan.data_parallel
    begin = (facts.number - 1) * total
    first = begin + (facts.place.replicate * plan.dp_shard + facts.place.shard) * each
    said = f"The global batch is samples {begin:,} to {begin + total - 1:,}, {total} sequences of {training.seq_len:,} tokens."
    said += f" This rank reads {'all of them' if each == total else f'{each} of them, {ranges(range(first, first + each))}'}"
    alike = [name for name in ("tp", "cp", "pp") if getattr(plan, name) > 1]
    said += f", as do the ranks that differ from it in {' or '.join(alike)} only." if alike else "."
    if plan.cp > 1:
        own = " and ".join(f"{a:,} to {b - 1:,}" for a, b in pieces(training.seq_len, facts.place.cp, plan.cp))
        said += f" Of each sequence it keeps tokens {own}."
    micros = each // training.micro_batch_size
    many = f"{micros} micro batches" if micros > 1 else "one micro batch"
    return f"{said} It takes them through the model in {many} of {training.micro_batch_size}."


def count(world: int, facts: Facts) -> str:
    own, valid = facts.outcome.own, facts.outcome.valid
    if world == 1:
        return f"{valid:,} tokens are to be predicted; each loss is divided by that."
    said = f"It counts {own:,} tokens to predict" if own else "Another rank counts the same tokens, so it counts 0"
    size = at(facts, "count")[0].bytes
    return f"{said}; all ranks add up {valid:,}, in one all-reduce of {size} bytes. Each loss is divided by that."


def forward(config: Config, plan: Degrees, facts: Facts) -> str:
    said = "Forward, in all micro batches together: "
    said += listed(at(facts, "forward")) if at(facts, "forward") else "nothing has to be sent."
    modes = {"full": "only its input", "selective": f"its input and results of {', '.join(config.recompute.save)}"}
    if config.recompute.mode == "none":
        said += " Each block keeps what its backward pass needs."
    elif config.recompute.mode == "block":
        said += f" One block in {config.recompute.every} keeps only its input, the others all that backward needs."
    else:
        said += f" Each block keeps {modes[config.recompute.mode]}; the rest is computed again later."
    if config.offload.activations:
        said += " What blocks keep goes to the host's memory."
    if plan.pp > 1:
        owner = pipeline(config, plan)[1][-1]
        said += " Here the losses are made." if owner == facts.place.pp else f" The losses are made on pipeline rank {owner}."
    return said


def pipeline(config: Config, plan: Degrees) -> Table:
    parallel, micros = config.parallel, accumulation(config.training, plan.data_parallel)
    return table(parallel.pp_schedule, plan.pp, parallel.pp_stages_per_rank, micros)


def hand_over(config: Config, plan: Degrees, facts: Facts) -> str:
    orders, owners = pipeline(config, plan)
    own = [stage for stage, rank in enumerate(owners) if rank == facts.place.pp]
    order = orders[facts.place.pp]
    shown = " ".join(str(action) for action in order[:12]) + (f" ... ({len(order)} passes)" if len(order) > 12 else "")
    which = f"stage {own[0]}" if len(own) == 1 else f"stages {ranges(own)}"
    return f"It has {which} of {len(owners)}; its passes, as stage, kind, micro batch: {shown}. "


def backward(config: Config, facts: Facts) -> str:
    said = "Backward: " + (listed(at(facts, "backward")) if at(facts, "backward") else "nothing has to be sent.")
    if config.recompute.mode != "none":
        said += " What was not kept is computed again, with what that sends."
    return said


def norm(most: float, world: int, facts: Facts) -> str:
    outcome = facts.outcome
    said = "All ranks add up the squares of their gradients, and the loss: t" if world > 1 else "T"
    norm, loss = outcome.norm.item(), outcome.loss.item()
    perplexity = math.exp(min(loss, 700))
    said += f"he gradient's norm is {norm:.4g}, the mean loss {loss:.4f} (perplexity {perplexity:,.1f})."
    if most and norm > most:
        return f"{said} The norm is above {most:g}, so all gradients are multiplied by {most / norm:.3f}."
    return said + (f" It is below {most:g}, so nothing is clipped." if most else "")


def optimizer(config: Config, facts: Facts) -> str:
    where = "On the host's cores, " if config.offload.states else ""
    said = f"{where}AdamW changes the {facts.own:,} parameters that are here, at a learning rate of {facts.outcome.lr:.3g}"
    return f"{said}. It needs nobody: no message. Then gradients are forgotten."


def in_all(facts: Facts) -> str:
    total = sum(facts.seconds.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in facts.seconds.items() if seconds >= 0.005 * total)
    said = f"{facts.messages:,} messages, {amount(facts.bytes)}" if facts.messages else "No messages"
    return f"{said}. The step took {total * 1e3:.0f} ms here while it was watched: {shares.replace('forward', 'passes')}."
