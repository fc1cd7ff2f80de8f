"""What a run says of itself at its start and at its end: what is trained, what came of it, what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill

import torch

from titan import zoo
from titan.build import Parts
from titan.checkpoint.commit import newest
from titan.checkpoint.manager import Progress
from titan.config import Config, Degrees, accumulation, degrees
from titan.data.dataset import unigram_entropy
from titan.data.mixture import PERIOD, Samples
from titan.metrics.console import PLAIN_COLUMNS, count, duration, rate, short, si
from titan.metrics.flops import Flops
from titan.metrics.history import Record, number, numbers, read_history
from titan.metrics.peaks import Peak
from titan.precision.float8_layers import float8_layers
from titan.ranks import Ranks
from titan.schedule import lr_share
from titan.status import Exit, write_status
from titan.stop import tell_reason
from titan.terminal import columns, labelled, plural, showable

Next = tuple[list[str], str]  # a command, word by word, and what to know of it


def introduce(
    config: Config,
    ranks: Ranks,
    parts: Parts,
    data: Samples,
    progress: Progress,
    latency: float,
    flops: Flops,
    peak: Peak,
) -> None:
    """What is about to be trained, in a few lines."""
    training, plan = config.training, degrees(config.parallel, ranks.world)
    if progress.step >= training.steps:
        at = f"{config.job.output} is at step {progress.step:,}, training.steps is {training.steps:,}"
        say("done", f"nothing left to do: {at}")
        sys.stdout.flush()
        return
    per_step = training.global_batch_size * training.seq_len
    say("model", model_line(config, sum(p.numel() for p in parts.whole.parameters())))
    device = f"CPU, {plural(torch.get_num_threads(), 'thread')} each"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    say(
        "ranks",
        f"{plural(ranks.world, 'rank')} on {device}: {plan_words(plan)}; "
        f"an all-reduce takes {latency * 1e3:.2f} ms",
    )
    say(
        "step",
        f"{per_step:,} tokens: {training.global_batch_size} sequences of {training.seq_len}, a rank takes "
        f"{training.micro_batch_size} at once, {accumulation(training, plan.data_parallel)} times",
    )
    say(
        "flops",
        f"{si(flops.total)}FLOP a token: {si(flops.matrices)}FLOP in matrices, {si(flops.attention)}FLOP in attention; "
        f"peak {si(peak.flops)}FLOP/s ({peak.source})",
    )
    for label, line in zip(("data", *[""] * len(data.names)), data_lines(config, data), strict=False):
        say(label, line)
    if len(data.datasets) == 1:
        entropy = unigram_entropy(data.datasets[0].token_counts(limit=1 << 26))
        say("", f"entropy of its unigrams {entropy:.4f}: the loss of a model that ignores the context")
    say("output", config.job.output)
    load = config.checkpoint.load
    if progress.step:
        say("resumed", f"after step {progress.step:,}, at sample {progress.samples:,}")
        if load:
            say("note", f"checkpoint.load is not used: {config.job.output} goes on from its step {progress.step:,}")
    elif load:
        say("loaded", f"weights of {load}")
    sys.stdout.flush()


def data_lines(config: Config, data: Samples) -> list[str]:
    """Each source: its share of the tokens, stage by stage, its size, and how often the run reads it."""
    read = data.mixture.done(config.training.steps * config.training.global_batch_size)
    lines = []
    for i, (source, windows) in enumerate(zip(config.data.all_sources, data.windows, strict=True)):
        shares = ", then ".join(f"{stage[i] / PERIOD:.2%} ({stage[i]}/{PERIOD})" for stage in data.mixture.parts)
        head = f"{source.name}: {shares} of {source.path}" if config.data.sources else source.path
        tokens = sum(split.tokens for split in windows.datasets)
        lines.append(f"{head}: {tokens:,} tokens, {short(read[i] / windows.count)} epochs planned")
    return lines


def conclude(
    config: Config, parts: Parts, progress: Progress, started_at: int, code: int, reason: str, seconds: float, words: list[str]
) -> None:
    """How it ended, for people and for scripts.

    started_at: the step this start went on from; reason: why it stopped, if it did; seconds: how long it took; words: its
    command line, CONFIG and overrides.
    """
    output = Path(config.job.output)
    saved = newest(output / "checkpoints")
    stopped = code == Exit.STOPPED
    facts = {"reason": reason} if stopped else {}
    write_status(output, "stopped" if stopped else "finished", step=progress.step, exit_code=code, **facts)
    if stopped:
        tell_reason(reason)
    if stopped or progress.step > started_at:
        took = f"{progress.tokens:,} tokens; this start took {duration(seconds)}"
        if stopped:
            say("stopped", f"({reason}) after step {progress.step:,} of {config.training.steps:,}, all saved: {took}")
        else:
            say("finished", f"{plural(progress.step, 'step')}, {took}")
        say("model", model_line(config, sum(p.numel() for p in parts.whole.parameters())))
        try:
            records = read_history(output / "metrics.jsonl")
        except OSError:
            records = []
        for label, text in results(records):
            say(label, text)
    if saved is not None:
        say("saved", str(saved))
    print("next")
    width = columns(sys.stdout, PLAIN_COLUMNS)
    for (program, *rest), note in next_commands(config, progress.step, stopped, words, saved):
        if note:
            print(fill(note, max(width, 20), initial_indent="  # ", subsequent_indent="  # "))
        print(wrapped([installed(program), *rest], width))
    sys.stdout.flush()


def plan_words(plan: Degrees) -> str:
    """The plan's degrees: the data's always, the others where they are more than 1."""
    others = [f"{name} {getattr(plan, name)}" for name in ("pp", "cp", "tp") if getattr(plan, name) > 1]
    return " x ".join([f"dp_replicate {plan.dp_replicate}", f"dp_shard {plan.dp_shard}", *others])


def model_line(config: Config, parameters: int) -> str:
    layers = float8_layers(zoo.sharding(config.model.name, config.model.config), config.precision)
    float8 = f", {len(layers)} layers' products in Float8 ({config.precision.float8})" if layers else ""
    return f"{config.model.name} {config.model.size}: {parameters:,} parameters, {config.precision.param}{float8}"


def results(records: list[Record]) -> list[tuple[str, str]]:
    """What metrics.jsonl says of the whole run, all its starts together: label and text."""
    found = []
    losses = [(record["step"], loss) for record in records if (loss := number(record, "loss")) is not None]
    held_out = [(loss, record["step"]) for record in records if (loss := number(record, "validation_loss")) is not None]
    said = []
    if losses:
        (first, before), (last, after) = losses[0], losses[-1]
        said.append(f"{before:.4f} at step {first:,}" + (f", {after:.4f} at step {last:,}" if last != first else ""))
    if held_out:
        best, step = min(held_out)
        said.append(f"best validation loss {best:.4f} at step {step:,}")
    if said:
        found.append(("loss", "; ".join(said)))
    speeds, shares, memory = (numbers(records, key) for key in ("tokens_per_second", "mfu", "memory_gib"))
    if speeds:
        mfu = f", mfu {statistics.median(shares):.0%}" if shares else ""
        peak = f"; a rank's memory at most {short(max(memory))} GiB" if memory else ""
        found.append(("speed", f"{count(statistics.median(speeds))} tokens a second{mfu} (medians){peak}"))
    return found


def next_commands(config: Config, step: int, stopped: bool, words: list[str], saved: Path | None) -> list[Next]:
    """What to type next. What continues the run comes first where it was stopped."""
    output = config.job.output
    if stopped:
        by_key = config.job.stop_after is not None and step >= config.job.stop_after
        again = go_past_stop_after(words) if by_key else words
    else:
        again = [word for word in words if not word.startswith("--training.steps=")]
        again = go_past_stop_after(again) if config.job.stop_after is not None else again
        again.append(f"--training.steps={longer(config, step)}")
    commands: list[Next] = [(["titan", "plot", output], "")]
    if "tensorboard" in config.metrics.trackers:
        commands.append((["tensorboard", "--logdir", str(Path(output).parent)], ""))  # it names runs by their folders
    if "mlflow" in config.metrics.trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        look = ["env", "MLFLOW_ALLOW_FILE_STORE=true", installed("mlflow"), "ui", "--backend-store-uri", f"{output}/mlruns"]
        commands.append((look, "" if find_spec("flask") else "serving pages takes the whole package: pip install mlflow"))
    if saved is not None:
        prompt = config.sample.prompts[0] if config.sample.prompts else "Once upon a time"
        commands.append((["titan", "generate", str(saved), showable(prompt, sys.stdout)], ""))
        commands.append((["titan", "export", "hf", str(saved), f"{Path(output)}-hf"], ""))
    go_on = ["titan", "train", *again], "" if stopped else rate_note(config, step)
    return [go_on, *commands] if stopped else [*commands, go_on]


def longer(config: Config, step: int) -> int:
    """training.steps of a continuation of a run that is at its end."""
    return 2 * max(config.training.steps, step)


def rate_note(config: Config, step: int) -> str:
    """What a longer run does to the learning rate, where its schedule, stretched, is not where it ended: else nothing."""
    steps, peak = longer(config, step), config.optimizer.lr
    ended = peak * lr_share(config.schedule, step, max(config.training.steps, step))
    onward = peak * lr_share(config.schedule, step + 1, steps)
    if onward <= 1.05 * ended:
        return ""
    return f"on to step {steps:,}; the {config.schedule.name} schedule then starts from {rate(onward)} again, not {rate(ended)}"


def installed(program: str) -> str:
    """A program's name, or its path beside this Python where a shell would not find it: ./run_train.sh activates nothing."""
    here = Path(sys.executable).with_name(program)
    return program if shutil.which(program) or not here.exists() else os.path.relpath(here)


def go_past_stop_after(words: list[str]) -> list[str]:
    """The command line without the key that stopped the run; where the TOML has it, with a word that unsets it."""
    left = [word for word in words if not word.startswith("--job.stop_after=")]
    return left if left != words else [*words, "--job.stop_after=none"]


def wrapped(command: list[str], width: int) -> str:
    """A command as a shell takes it, indented, broken between words where it is wider than the terminal."""
    lines = ["  "]
    for word in map(shlex.quote, command):
        if lines[-1].strip() and len(lines[-1]) + len(word) + 2 > width:
            lines.append("      ")
        lines[-1] += word + " "
    return "\\\n".join([*lines[:-1], lines[-1].rstrip()])


def say(label: str, text: str) -> None:
    """A labelled line on stdout, wrapped at the terminal's width."""
    print(labelled(label, text, columns(sys.stdout, PLAIN_COLUMNS)))
