"""A rank's training run, in the order it happens. Started by `titan train`, or by `torchrun -m titan.train CONFIG`."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch.profiler import record_function

from titan import ranks as between
from titan import toml
from titan.arguments import check_config, read_config
from titan.batch import reader
from titan.build import Parts, build
from titan.checkpoint.manager import Manager, Progress
from titan.checkpoint.saving import Saver
from titan.config import Config, degrees
from titan.data.tokenizer import Tokenizer
from titan.evaluate import evaluate
from titan.fault import Fault
from titan.files import write_atomically
from titan.generate import Draw, continuations
from titan.guard import Guard
from titan.lock import InUseError, lock
from titan.logs import STARTED, open_logs, record_failure
from titan.metrics.flops import flops_per_token
from titan.metrics.log import MetricsLog
from titan.metrics.peaks import find_peak
from titan.metrics.profile import BATCH
from titan.open_data import identity, open_data
from titan.optim import set_lr
from titan.parallel.mesh import make_mesh
from titan.profiling import Profiler
from titan.ranks import Ranks
from titan.report import conclude, introduce
from titan.schedule import lr_share
from titan.status import Exit, write_first_failure, write_status
from titan.stop import STOP_FILE, Stop, die_with_launcher, seconds_left
from titan.watchdog import Watchdog


def main(config: Config) -> int:
    """Train to the end or until asked to stop; returns the exit code."""
    began = time.perf_counter()
    stop = Stop(seconds_left(config.job.max_seconds, config.job.shutdown_seconds))
    between.keep_freed_memory()
    output, training = Path(config.job.output), config.training
    ranks = between.start(config.job.timeout_seconds)
    held = take_lock(ranks, output)
    stop.file = output / STOP_FILE if ranks.first else None
    open_logs(output, ranks.rank)
    latency = between.agree_on_setup(ranks, toml.dump(config, describe=False) + schedule_file(config), output)
    plan = degrees(config.parallel, ranks.world)
    mesh = make_mesh(ranks.device.type, plan, config.job.timeout_seconds, config.offload.states)

    data, tokenizer = open_data(config, ranks)
    try:
        parts = build(config, ranks.device, mesh)
    except ValueError as error:  # a word that only PyTorch can judge, such as a compiler's name
        raise toml.ConfigError(f"{config.source}: {error}") from error
    manager = Manager(output, ranks, parts, identity(config, data.train), config, tokenizer)
    progress = manager.resume(config.checkpoint.load)
    saver = Saver(config.checkpoint, ranks, progress.step, partial(between.say, ranks))
    read = reader(config, mesh)
    batches = read(data.train, start_sample=progress.samples, workers=config.data.workers)
    guard: Guard[Progress] = Guard(config.guard, parts.optimizer, ranks, manager.losses, saver.finish)
    fault = Fault(config.job.fault, ranks.rank)
    manager.before_writing, manager.counters = fault.while_saving, data.train.counters
    watchdog = Watchdog(output, ranks, config.job.hang_seconds, partial(leave, rank=ranks.rank, output=output))
    flops = flops_per_token(parts.whole, training.seq_len)
    peak = find_peak(ranks, getattr(torch, config.precision.param))
    metrics = MetricsLog(output, ranks, config, step=progress.step, tokens=progress.tokens, flops=flops, peak=peak)
    profiler = Profiler(config.profiling, output, ranks)
    if ranks.first:
        write_atomically(output / "config.toml", toml.dump(config))
        write_status(output, "running", step=progress.step)
        introduce(config, ranks, parts, data.train, progress, latency, flops, peak)

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection on one rank stalls all of them: it happens on all, at the same step
    last_step = min(training.steps, config.job.stop_after or training.steps)
    started_at = progress.step
    reason = "stop_after"

    def validate_after(step: int) -> bool:
        return data.validation is not None and (step == training.steps or due(step, config.validation.interval))

    def on_held_out(step: int) -> dict[str, float]:
        """A validation's figures; none where it is stopped."""
        most = config.validation.batches or None
        held_out = read(data.validation, start_sample=0, workers=0, once=True, limit=most)
        return evaluate(parts.step, held_out, data.tokens_per_byte, ranks, stop.now, partial(watchdog.beat, step))

    validated: tuple[int, float | None] = started_at, None
    owed = started_at > 0 and validate_after(started_at) and not manager.was_validated  # the start before was stopped in it
    if owed and (figures := on_held_out(started_at)):
        metrics.write({"step": started_at} | figures)
    metrics.start()
    while progress.step < last_step:
        step = progress.step + 1
        watchdog.beat(step)
        fault.before(step)
        profiler.before(step)
        started = time.perf_counter()
        with record_function(BATCH):
            batch = next(batches)
        waited = time.perf_counter() - started
        flags = stop.wanted(), stop.out_of_time(), saver.failed, saver.busy
        valid, asked, late, not_saved, saving = between.agree(ranks, parts.step.count(batch), *flags)
        saver.look(bool(not_saved))
        if asked or late:
            reason = "asked" if asked else "out of time"
            break

        loss = parts.step.forward_backward(batch, valid, step)
        loss = fault.after_backward(step, parts.model, loss)
        norms = parts.norms.of_layers() if due(step, config.metrics.gradient_norms) else {}
        norm, mean = parts.norms.clip(training.clip_norm, loss)
        after = Progress(step, progress.samples + training.global_batch_size, progress.tokens + valid)
        guard.judge(step, loss, mean, norm, progress, after)
        lr = config.optimizer.lr * lr_share(config.schedule, step, training.steps)
        set_lr(parts.optimizer, lr)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        profiler.after(step)

        progress = after
        metrics.add(valid, waited)
        metrics.gradient_norms(step, norms)
        save = step == last_step or due(step, config.checkpoint.interval)
        validate = validate_after(step)
        report = save or validate or step == 1 or due(step, config.metrics.interval)
        if (back := guard.look(now=report)) is not None and back.step < step:
            progress = back
            batches.close()
            batches = read(data.train, start_sample=progress.samples, workers=config.data.workers)
            metrics.go_back(progress.step, progress.tokens)
            continue
        if report:
            record = metrics.measure(step, loss, norm, lr, saver.stalled) | data.train.counters(progress.samples)
            saver.stalled = 0.0
            if validate:
                record |= on_held_out(step)
                validated = step, record.get("validation_loss")
            metrics.write(record)  # before the save: a step that is committed has its line
            if save:
                held_out_loss, losses = record.get("validation_loss"), guard.losses()
                prepare = partial(manager.prepare, progress, held_out_loss, losses, config.checkpoint.async_save)
                watchdog.rest()
                saver.save(step, prepare, busy=bool(saving), last=step == last_step)
                watchdog.beat(step)
            if step == training.steps or due(step, config.sample.interval * config.validation.interval):
                write_samples(config, parts, tokenizer, manager.about.document_start, metrics, step)
            metrics.start()
        if due(step, training.gc_interval):
            gc.collect()

    metrics.pause()
    watchdog.rest()
    profiler.close()
    if (back := guard.look(now=True)) is not None:  # a GPU may still have been at the last step
        progress = back
    code = Exit.STOPPED if progress.step < training.steps else Exit.FINISHED
    saver.finish()
    if progress.step > saver.saved:
        hurry = code == Exit.STOPPED
        held_out_loss = validated[1] if validated[0] == progress.step else None
        prepare = partial(manager.prepare, progress, held_out_loss, guard.losses(), copy=False, hurry=hurry)
        saver.save(progress.step, prepare, busy=False, last=True)
    watchdog.close()
    batches.close()
    if ranks.first:
        conclude(config, parts, progress, started_at, code, reason, time.perf_counter() - began, sys.argv[1:])
        stop.done()
    metrics.close()
    dist.barrier()
    dist.destroy_process_group()
    if held is not None:
        held.close()
    return code


def take_lock(ranks: Ranks, output: Path) -> IO[str] | None:
    """On rank 0: the output folder's lock. InUseError, on all ranks, where another job has it."""
    held, problem = None, ""
    if ranks.first:
        try:
            held = lock(output)
        except InUseError as error:
            problem = str(error)
    if said := between.gathered(ranks, problem)[0]:
        raise InUseError(said)
    return held


def schedule_file(config: Config) -> str:
    """What a pipeline's schedule file says, which has to be the same on all nodes."""
    name = config.parallel.pp_schedule
    return Path(name).read_text() if config.parallel.pp > 1 and name.endswith(".csv") else ""


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after this one."""
    return interval > 0 and step % interval == 0


def write_samples(
    config: Config, parts: Parts, tokenizer: Tokenizer, start: int, metrics: MetricsLog, step: int
) -> None:
    """What the model makes of the prompts, on all ranks alike; rank 0's is shown. start: the token before a document."""
    asked = config.sample
    if not asked.prompts:
        return
    draw = Draw(asked.temperature, asked.top_p, config.training.seed, tokenizer.vocab_size)
    with parts.step.generating() as model:
        texts = continuations(model, parts.table.core, tokenizer, start, asked.prompts, asked.tokens, draw, parts.step.device)
    metrics.samples(step, list(zip(asked.prompts, texts, strict=True)))


def run(words: list[str]) -> int:
    """Check the command line, train, and leave any failure where it is looked for."""
    die_with_launcher()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output = None
    try:
        config = read_config(words)
        output = Path(config.job.output)
        return main(check_config(config, world, words))
    except toml.ConfigError as error:
        if isinstance(error, InUseError):
            output = None  # another job's: nothing is written there
        if rank == 0:
            print("\n".join(f"titan: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
        if output is not None:
            with contextlib.suppress(OSError):
                write_first_failure(output, STARTED, error=str(error), exit_code=Exit.WRONG_CONFIG, rank=rank)
        if dist.is_initialized():
            os._exit(Exit.WRONG_CONFIG)  # before the ranks that only know that a peer is gone
        return Exit.WRONG_CONFIG
    except BaseException as error:
        if isinstance(error, between.PeerFailedError):
            time.sleep(1)  # the rank with the reason comes first
        leave(error, rank, output)
    return Exit.FAILED


def leave(error: BaseException, rank: int, output: Path | None) -> None:
    """End this process, the reason left where it is looked for."""
    record_failure(error, rank, output)
    os._exit(Exit.FAILED)  # threads of a broken process group could keep the interpreter from ending


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
