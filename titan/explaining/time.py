"""Time: what a step goes to, the pipeline's grid, tokens a second, MFU, and how long the whole run takes."""

from __future__ import annotations

from typing import Any

from titan.commands.trace import plan_words
from titan.config import Config, accumulation
from titan.drawing.mesh import COLOURS
from titan.drawing.schedule import Panel, svg
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan
from titan.explaining.facts import Facts
from titan.explaining.job import summed
from titan.explaining.numbers import Number, evaluate, figure, given, worked
from titan.explaining.pieces import Html, bar, html, listed, name, paragraph, picture, plain, section
from titan.parallel import timeline
from titan.parallel.schedules import table

LESSON = (
    "A step is as long as its slowest rank. The dry run lays out that rank's operations and messages as a GPU's queues would "
    "have them: what computes while messages travel costs nothing more, what waits for them does. The share of the GPU's peak "
    "that is left for what training needs is its MFU."
)
PIPELINE = (
    "A pipeline's ranks work on different micro batches at a time. At a step's beginning the later ranks have nothing yet, at "
    "its end the first ranks have nothing more: the bubble. More micro batches make it smaller."
)


def time(config: Config, plan: JobPlan, cluster: Cluster, facts: Facts) -> Html:
    """The section."""
    spent = [(kind, seconds) for kind, seconds in plan.time.spent.most_common() if seconds > 0]
    whole = step_seconds(plan)
    colours = {kind: COLOURS[i % len(COLOURS)] for i, (kind, _) in enumerate(spent)}
    which = ", of the slowest pipeline rank" if len(plan.ranks) > 1 else ""
    body = [paragraph("A step takes ", plain(whole), f". What it goes to{which}:")]
    body.append(strip([(kind, seconds / whole.value, colours[kind]) for kind, seconds in spent]))
    for kind, seconds in spent:
        share = worked(f"{rounded(seconds)} (seconds) / {rounded(whole.value)} (seconds of a step)", "share")
        body.append(bar(name(kind), given(seconds, "seconds"), share.value, colours[kind], share))
    body += [paragraph("In all: ", whole)]
    if len(plan.ranks) > 1:
        body += pipeline(config, plan)
    body += [Html("<h3>What comes of it</h3>"), listed(outcomes(config, plan, cluster, facts, whole), "numbers")]
    more = "Without saves, validation and restarts. By data sheets and assumed shares of them, unless the cluster was measured."
    return section("time", "Time", LESSON, *body, paragraph(more, kind="note"))


def rounded(seconds: float) -> str:
    """Seconds for a formula."""
    return figure(float(f"{seconds:.6g}"))


def step_seconds(plan: JobPlan) -> Number:
    """Of a step: the sum of what it goes to."""
    return worked(
        " + ".join(f"{rounded(seconds)} ({kind})" for kind, seconds in plan.time.spent.most_common() if seconds > 0), "seconds"
    )


def strip(parts: list[tuple[str, float, str]]) -> Html:
    """The step as one bar."""
    said = "".join(
        f'<div class="bar" style="flex:{share:.5f} 0 0;background:{colour}" title="{kind}"></div>'
        for kind, share, colour in parts
    )
    return Html(f'<div class="strip" aria-hidden="true">{said}</div>')


def pipeline(config: Config, plan: JobPlan) -> list[Html]:
    """The grid, and its bubble."""
    parallel, micros = config.parallel, accumulation(config.training, plan.plan.data_parallel)
    schedule = table(parallel.pp_schedule, parallel.pp, parallel.pp_stages_per_rank, micros)
    panel = Panel(
        "planned", "passes as long as planned", plan.time.times, plan.time.owners, timeline.in_flight(schedule.orders)
    )
    drawn = svg(plan_words(config, plan.plan.world), [panel])
    busy = sum(end - start for start, end in plan.time.times.values())
    last = max(end for _, end in plan.time.times.values())
    idle = worked(
        f"1 - {rounded(busy)} (seconds in passes) / ({parallel.pp:,} (pp) x {rounded(last)} (seconds until the last))", "share"
    )
    m, p = micros, parallel.pp
    ideal = f"({p:,} (pp) - 1) / ({m:,} (micro batches) + {p:,} (pp) - 1)"
    alike = worked(ideal, "share") if abs(evaluate(ideal) - plan.bubble) < 1e-9 else given(plan.bubble, "share")
    said = [html("share of the passes' time in which ranks idle: ", idle), html("if all stages were alike: ", alike)]
    return [
        Html("<h3>The pipeline</h3>"),
        paragraph(PIPELINE),
        picture(drawn),
        listed(said, "numbers"),
    ]


def outcomes(config: Config, plan: JobPlan, cluster: Cluster, facts: Facts, whole: Number) -> list[Html]:
    """Rates, operations and hours."""
    training, world, seconds = config.training, plan.plan.world, rounded(whole.value)
    tokens = f"{training.global_batch_size:,} (global_batch_size) x {training.seq_len:,} (seq_len)"
    rate = worked(f"{tokens} / {seconds} (seconds) / {world:,} (GPUs)", "tokens a second and GPU")
    per_token = flops(config, facts)
    step = worked(f"{round(per_token.value):,} (FLOP a token) x {tokens}", "flop")
    peak = f"{figure(cluster.gpu.bfloat16_tflops)} (peak in TFLOP a second) x 1,000,000,000,000"
    mfu = worked(f"{round(step.value):,} (FLOP) / {world:,} (GPUs) / {seconds} (seconds) / ({peak})", "share")
    hours = worked(f"{training.steps:,} (steps) x {seconds} (seconds) / 3,600", "hours")
    return [
        html("speed: ", rate),
        html("operations for a token: ", per_token),
        html("operations in a step: ", step),
        html("MFU: ", mfu),
        html(
            "peak of a GPU in ",
            name("bfloat16"),
            ": ",
            given(cluster.gpu.bfloat16_tflops, "TFLOP/s", "cluster.gpu.bfloat16_tflops"),
        ),
        html("the whole run: ", hours),
        html(
            "of all GPUs: ", worked(f"{training.steps:,} (steps) x {seconds} (seconds) / 3,600 x {world:,} (GPUs)", "GPU-hours")
        ),
        html("tokens in all: ", worked(f"{training.steps:,} (steps) x {tokens}", "tokens")),
    ]


def flops(config: Config, facts: Facts) -> Number:
    """Of a token, forward and backward: six for each weight that it meets, and attention's (`titan.metrics.flops`)."""
    model: Any = config.model.config
    matrices = [key for key, shape in facts.whole.items() if len(shape) > 1 and key not in facts.lookups]
    layers, heads = f"{model.n_layers:,} (layers)", f"{model.n_heads:,} (heads) x {model.head_dim:,} (their width)"
    attention = f"6 x {layers} x {heads} x {config.training.seq_len:,} (seq_len)"
    return worked(f"6 x ({summed(facts, matrices)}) + {attention}", "flop")
