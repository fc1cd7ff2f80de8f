"""What each switch of titan's costs and brings on one GPU: Llama 1B, 3B and layers of 8B, with one thing changed a row.

    python benchmarks/gpu.py [--models 1b 3b 8b] [--variants baseline eager ..] [--layers 8b=8] [--out gpu.jsonl]
    python benchmarks/gpu.py --list              # the rows, and what each changes
    python benchmarks/gpu.py --table gpu.jsonl   # the table of all that was measured into a file, in as many calls as it took
    python benchmarks/gpu.py --toy               # every row at toy size, on a CPU too; so it is where there is no GPU

A row is a process of its own that trains train_configs/llama3_<model>.toml on one device: forward and backward, clipping, fused
AdamW with float32 masters, bfloat16, every block compiled, on the same random tokens again and again, which lie on the device.
Reading data, the guard, logs and checkpoints are left out. After three steps to warm up, in which it compiles, steps are timed
together, with one wait for the device before the first and one after the last. Printed, as Markdown:

    MFU          FLOP per token x tokens/s / peak. The FLOP are those of titan/metrics/flops.py: 6 for each weight of a matrix,
                 the head's included and lookups not, and 6 x layers x heads x head_dim x seq_len for causal attention; nothing
                 for what is recomputed. The peak is of dense bfloat16 products (titan/metrics/peaks.py), for Float8's rows too.
    of baseline  tokens/s over those of the same model's baseline
    memory       the most that PyTorch's allocator handed out, and reserved, from when model and optimizer were made; on a CPU
                 what the process's peak (ru_maxrss) grew by from before that. Compiling and warm-up are included.
    loss         of the last step: rows of a model compute the same thing, so a fast one with another loss is a wrong one

A row that fails says why and the next one runs; --out keeps each as it ends, as a line of JSON, with the whole traceback.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "train_configs"
MODELS, LAYERS = ("1b", "3b", "8b"), {"8b": 8}  # weights, gradients and Adam's states of the whole 8B take 128 GB
WARM_UP = 3
ALONE = {"parallel.dp_replicate": "1", "parallel.dp_shard": "1"}
BASELINE = {"precision.param": "bfloat16", "precision.float8": "none", "compile.enable": "true", "recompute.mode": "none"}
KERNELS = {f"kernels.{name}": "triton" for name in ("rms_norm", "rope", "swiglu", "linear_cross_entropy")}
FLOAT8_KERNELS = KERNELS | {"kernels.float8_cast": "triton"}  # refused where nothing is computed in Float8
VARIANTS: dict[str, dict[str, str]] = {
    "baseline": {},
    "eager": {"compile.enable": "false"},
    "recompute-selective": {"recompute.mode": "selective"},
    "recompute-full": {"recompute.mode": "full"},
    "float8-tensorwise": {"precision.float8": "tensorwise"},
    "float8-rowwise": {"precision.float8": "rowwise"},
    "all-logits": {"loss.chunk": "0"},
    "triton": KERNELS,
    "triton-eager": KERNELS | {"compile.enable": "false"},
    "triton-tensorwise": FLOAT8_KERNELS | {"precision.float8": "tensorwise"},
    "triton-rowwise": FLOAT8_KERNELS | {"precision.float8": "rowwise"},
}
# Widths that Float8 takes, and fewer logits held than there are, so that the loss is made in blocks here, too.
WIDTHS = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 352, "vocab_size": 512}
TOY = {"loss.chunk": str(64 * 256)} | {f"model.{key}": str(value) for key, value in WIDTHS.items()}
SAME = ("device", "driver", "cuda", "torch", "triton", "toy", "seq_len", "micro_batch", "steps")
"""Rows that agree in these may be compared, and share a table."""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--layers", nargs="+", default=[], metavar="MODEL=N", help="0: all; 8b=8 unless given")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (8192; toy: 64)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences in a step")
    parser.add_argument("--steps", type=int, help="steps that are timed (10; toy: 2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a row may take")
    parser.add_argument("--toy", action="store_true", help="tiny models")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--out", type=Path, help="append each row to this file; the table is then of all that it holds")
    parser.add_argument("--table", type=Path, help="print such a file's table and end")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("\n" + json.dumps(child(given.child)))
        return
    if given.table:
        print(table(read(given.table)))
        return
    try:
        layers = LAYERS | {model: int(count) for model, count in (word.split("=") for word in given.layers)}
    except ValueError:
        parser.error("--layers: expected MODEL=N, such as 8b=8")
    if set(layers) - set(MODELS):
        parser.error(f"--layers: the models are {', '.join(MODELS)}")
    rows = [(model, variant) for model in given.models for variant in given.variants]
    if given.list:
        for model, variant in rows:
            changes = (f"--{key}={value}" for key, value in VARIANTS[variant].items())
            print(f"{name_of(model, layers, given.toy):14} {variant:20}", *changes)
        return

    here = in_a_process("facts", given.timeout)
    if "error" in here:
        raise SystemExit(f"{here['trace']}\n{here['error']}")
    if not (here["gpu"] or given.toy):
        say("There is no GPU: toy size.\n")
    toy = given.toy or not here["gpu"]
    here |= {"toy": toy, "seq_len": given.seq_len or (64 if toy else 8192), "micro_batch": given.micro_batch}
    here |= {"steps": given.steps or (2 if toy else 10), "date": time.strftime("%Y-%m-%d")}
    here["command"] = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    say(header(here) + "\n")
    measured = []
    for model, variant in rows:
        row: Row = here | {"model": model, "name": name_of(model, layers, toy), "variant": variant}
        say(f"{row['name']:14} {variant:20} ")
        began = time.monotonic()
        row |= in_a_process("\n".join(words_of(row, layers.get(model, 0))), given.timeout)
        row["wall_s"] = round(time.monotonic() - began, 1)
        if "error" not in row:
            row["mfu"] = row["flops_per_token"] * row["tokens_per_s"] / row["peak"]
        said = row["error"] if "error" in row else f"{row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}"
        say(f"{said}  ({row['wall_s']} s in all)\n")
        measured.append(row)
        if given.out:
            with given.out.open("a") as file:
                file.write(f"\n{json.dumps(row)}\n")  # after what a call that was cut off left
    print(table(read(given.out) if given.out else measured))


def name_of(model: str, layers: dict[str, int], toy: bool) -> str:
    count = layers.get(model)
    return f"{model}, toy" if toy else f"{model}, {count} layers" if count else model


def words_of(row: Row, layers: int) -> list[str]:
    """What would follow `titan train` for a row. layers: 0: the model's own."""
    steps, sequences = str(WARM_UP + row["steps"]), str(row["micro_batch"])
    keys = {"training.seq_len": str(row["seq_len"]), "training.steps": steps, "schedule.warmup_steps": steps}
    keys |= {"training.global_batch_size": sequences, "training.micro_batch_size": sequences} | ALONE | BASELINE
    keys |= TOY if row["toy"] else {"model.n_layers": str(layers)} if layers else {}
    keys |= VARIANTS[row["variant"]]
    return [str(CONFIGS / f"llama3_{row['model']}.toml"), *(f"--{key}={value}" for key, value in keys.items())]


def in_a_process(what: str, seconds: float) -> Row:
    """What `--child what` prints; or the error that it ended with."""
    # Output goes to files: the compiler's helpers may outlive a process that is killed, and would keep pipes open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command, environment = [sys.executable, __file__, "--child", what], os.environ | {"TITAN_LAUNCHER": str(os.getpid())}
        try:
            code = subprocess.run(command, stdout=out, stderr=err, env=environment, timeout=seconds).returncode
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, how = 1, f"not done after {seconds:.0f} s"
        out.seek(0)
        err.seek(0)
        if code == 0:
            return json.loads(next(line for line in reversed(out.readlines()) if line.startswith("{")))  # type: ignore[no-any-return]
        said = [line.strip() for line in err if line.strip()]
        return {"error": ": ".join([how, *said[-1:]])[:120], "trace": "\n".join(said[-100:])}


def child(what: str) -> Row:
    """In the process of a row: its figures, or what went wrong in one line and at length."""
    from titan.stop import die_with_launcher

    die_with_launcher()
    try:
        return facts() if what == "facts" else measure(what.split("\n"))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": "out of memory" if "out of memory" in said else said[:120], "trace": traceback.format_exc()}


def facts() -> Row:
    """This machine, as far as figures depend on it."""
    import torch

    from titan import ranks as between
    from titan.metrics.peaks import find_peak

    ranks = between.start(60)
    cuda = ranks.device.type == "cuda"
    found: Row = {"gpu": cuda, "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or torch.version.hip or "none"
    found["triton"] = import_module("triton").__version__ if find_spec("triton") else "none"
    smi = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null")
    found["driver"] = smi.split("\n")[0] or "none"
    peak = find_peak(ranks, torch.bfloat16)
    return found | {"peak": peak.flops, "peak_source": peak.source}


def measure(words: list[str]) -> Row:
    """Train as `titan.train` does, from its config on, without all that is not a step."""
    import torch
    from torch import Tensor

    from titan import ranks as between
    from titan.arguments import check_config, read_config
    from titan.build import build
    from titan.config import degrees
    from titan.metrics.flops import flops_per_token
    from titan.optim import set_lr
    from titan.parallel.mesh import make_mesh
    from titan.schedule import lr_share

    began = time.perf_counter()
    between.keep_freed_memory()
    config = check_config(read_config(words), 1, words)
    ranks, training = between.start(60), config.training
    cuda = ranks.device.type == "cuda"
    rss = peak_rss()
    parts = build(config, ranks.device, make_mesh(ranks.device.type, degrees(config.parallel, 1), 60))
    plan, step = parts.step.plan, parts.step
    torch.manual_seed(training.seed)
    tokens = torch.randint(config.model.config.vocab_size, (training.global_batch_size, training.seq_len + 1))
    micros = step.batches.split({"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()})
    count = training.global_batch_size * training.seq_len

    def train(number: int) -> Tensor:
        plan.refresh()  # from here as Step.forward_backward, which would move a batch to the device anew
        share = step.passes.train(micros, count, number)
        plan.finish()
        _, loss = parts.norms.clip(training.clip_norm, share)
        set_lr(parts.optimizer, config.optimizer.lr * lr_share(config.schedule, number, training.steps))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        return loss

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for number in range(1, WARM_UP + 1):
        train(number)
    gc.collect()
    gc.freeze()
    gc.disable()
    started = now()
    for number in range(WARM_UP + 1, training.steps + 1):
        loss = train(number)
    seconds = (now() - started) / (training.steps - WARM_UP)
    row: Row = {"tokens_per_s": count / seconds, "ms": 1e3 * seconds, "loss": loss.item(), "warm_s": round(started - began, 1)}
    row["flops_per_token"] = flops_per_token(parts.whole, training.seq_len).total
    row["allocated"] = torch.cuda.max_memory_allocated() if cuda else peak_rss() - rss
    return row | {"reserved": torch.cuda.max_memory_reserved() if cuda else None}


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(path: Path) -> list[Row]:
    """The rows in a file, without a line that a call left unfinished."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def header(row: Row) -> str:
    where = f"{row['device']}, driver {row['driver']}, CUDA {row['cuda']}, torch {row['torch']}, triton {row['triton']}"
    peak = f"peak {row['peak'] / 1e12:,.4g} TFLOP/s ({row['peak_source']})"
    return f"{where}; {row['micro_batch']} x {row['seq_len']:,} tokens a step, {row['steps']} steps timed; {peak}."


def table(rows: list[Row]) -> str:
    """Markdown, a table for each set of rows that may be compared. Of a row that was measured twice, the last counts."""
    tables: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        tables.setdefault(tuple(row[key] for key in SAME), {})[row["name"], row["variant"]] = row
    lines, order = [], [*MODELS, *VARIANTS]
    for found in tables.values():
        commands = dict.fromkeys(f"{row['date']}: `{row['command']}`" for row in found.values())
        lines += [header(list(found.values())[-1]), "", "; ".join(commands) + ".", ""]
        lines += ["| model | variant | tokens/s | ms a step | MFU | of baseline | GiB allocated | reserved | loss |"]
        lines += ["|---" * 9 + "|"]
        for row in sorted(found.values(), key=lambda r: (order.index(r["model"]), r["name"], order.index(r["variant"]))):
            baseline = found.get((row["name"], "baseline"), {}).get("tokens_per_s")
            lines += [f"| {' | '.join((row['name'], row['variant'], *cells(row, baseline)))} |"]
        lines += [""]
    return "\n".join(lines).rstrip()


def cells(row: Row, baseline: float | None) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), *[""] * 6]
    speed, reserved = row["tokens_per_s"], row["reserved"]
    figures = [f"{speed:,.0f}", f"{row['ms']:,.1f}", f"{row['mfu']:.1%}", f"{speed / baseline:.2f}" if baseline else "-"]
    memory = [f"{row['allocated'] / 2**30:.2f}", f"{reserved / 2**30:.2f}" if reserved is not None else "-"]
    return [*figures, *memory, f"{row['loss']:.3f}"]


def say(text: str) -> None:
    """Progress, beside the table: a row's name as it starts, its outcome as it ends."""
    print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
