"""The job in words: how many ranks there are, what each dimension of the plan shares out, and what a step is."""

from __future__ import annotations

from titan.commands.trace import plan_words
from titan.config import Config
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan
from titan.explaining.facts import Facts
from titan.explaining.numbers import Number, figure, given, worked
from titan.explaining.pieces import Html, html, listed, name, paragraph, section

LESSON = (
    "Training repeats one step: take a batch of sequences, run the model forward and backward, move every parameter a little. "
    "A plan says how ranks, one a GPU, share that step. The shares multiply: each rank is one choice in every dimension."
)
SHARES = {
    "dp_replicate": "copies of the model see different samples, and add up their gradients",
    "dp_shard": "ranks see different samples, too; each keeps a part of every parameter and borrows the rest when it is needed",
    "tp": "ranks share every matrix, and between the blocks every sequence",
    "cp": "ranks share every sequence; attention passes keys and values between them",
    "pp": "ranks share the layers, and pass micro batches on like an assembly line",
}


def job(config: Config, plan: JobPlan, cluster: Cluster, facts: Facts) -> Html:
    """The section."""
    training, degrees = config.training, plan.plan
    head = paragraph(name(f"{cluster.gpu.name}: {plan_words(config, degrees.world)}"), kind="big")
    used = [key for key in SHARES if getattr(degrees, key) > 1]
    shares = listed([html(given(getattr(degrees, key), "", f"plan.{key}"), f" ({key}) ", SHARES[key]) for key in used])
    numbers = [
        html("ranks: ", worked(" x ".join(f"{getattr(degrees, key):,} ({key})" for key in used) or "1 (one rank)")),
        html("parameters of the model: ", parameters(facts)),
        html(
            "tokens in a step: ", worked(f"{training.global_batch_size:,} (global_batch_size) x {training.seq_len:,} (seq_len)")
        ),
        html("samples that a rank sees in a step: ", worked(samples_of_rank(config, plan))),
        html("micro batches of a rank: ", micro_batches(config, plan)),
        html("steps: ", given(training.steps, "", "training.steps")),
    ]
    return section("job", "The job", LESSON, head, shares, listed(numbers, "numbers"))


def samples_of_rank(config: Config, plan: JobPlan) -> str:
    """A formula."""
    used = [key for key in ("dp_replicate", "dp_shard") if getattr(plan.plan, key) > 1]
    shared = "".join(f" / {getattr(plan.plan, key):,} ({key})" for key in used)
    return f"{config.training.global_batch_size:,} (global_batch_size){shared}"


def micro_batches(config: Config, plan: JobPlan) -> Number:
    """How many times a rank's layers run forward and backward in a step."""
    return worked(f"{samples_of_rank(config, plan)} / {config.training.micro_batch_size:,} (micro_batch_size)")


def parameters(facts: Facts) -> Number:
    """Of the whole model, each matrix of the blocks once and the blocks multiplied."""
    return worked(summed(facts, list(facts.whole)))


def summed(facts: Facts, names: list[str]) -> str:
    """A formula: elements of parameters, the blocks alike in brackets."""
    stem = facts.table.block.split("*")[0]
    blocks = [n for n in names if n.startswith(stem)]
    first = blocks[0].removeprefix(stem).split(".")[0] if blocks else ""
    said = [" x ".join(map(figure, facts.whole[n])) + f" ({n.split('.')[0]})" for n in names if not n.startswith(stem)]
    inside = [" x ".join(map(figure, facts.whole[n])) for n in blocks if n.startswith(f"{stem}{first}.")]
    if inside:
        said.append(f"{facts.table.blocks:,} (blocks) x ({' + '.join(inside)})")
    return " + ".join(said)
