"""What titan costs on top of PyTorch: its training step in one process against a hand-written loop with the same model.

    python benchmarks/loop_overhead.py [--pairs 7] [--steps 6]

Both train 12 M parameters on 2,048 tokens a step, in float32 and in bfloat16 (the loop by autocast, as one would write it).
Each measurement is a process of its own; they alternate in pairs, and the ratio is taken within a pair, so that a machine
whose speed drifts does not decide. Printed: the median ratio of tokens per second (titan / loop) and of peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {"dim": 384, "n_layers": 6, "n_heads": 12, "n_kv_heads": 6, "ffn_dim": 1152, "vocab_size": 512}
SEQ_LEN, BATCH, MICRO, SEED = 256, 8, 8, 1


def plain_loop(data: str, steps: int, dtype: str) -> list[float]:
    """The hand-written loop: seconds of each step."""
    import numpy as np
    import torch

    from titan.models.llama3.config import Config
    from titan.models.llama3.model import Transformer

    model = Transformer(Config(**SHAPE))
    model.init_weights()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = np.memmap(next(Path(data).glob("train-*.tokens")), dtype=np.uint16, mode="r", offset=4096)
    random = np.random.default_rng(SEED)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        starts = random.integers(0, 400_000, BATCH)
        batch = torch.from_numpy(np.stack([tokens[s : s + SEQ_LEN + 1] for s in starts]).astype(np.int64))
        for micro in batch.split(MICRO):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(micro[:, :-1], labels=micro[:, 1:]) / (BATCH * SEQ_LEN)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return seconds


def titan_run(data: str, steps: int, dtype: str) -> list[float]:
    """`titan.train` as it is, in one process: seconds of each step, from metrics.jsonl with every step logged."""
    from titan.train import run

    with tempfile.TemporaryDirectory() as output:
        words = [f"--model.{key}={value}" for key, value in SHAPE.items()]
        words += [f"--data.path={data}", f"--job.output={output}", f"--precision.param={dtype}", "--metrics.interval=1"]
        words += [f"--training.steps={steps}", f"--training.seq_len={SEQ_LEN}", f"--training.global_batch_size={BATCH}"]
        words += [f"--training.micro_batch_size={MICRO}", "--validation.interval=0", "--schedule.warmup_steps=1"]
        assert run([str(Path(__file__).parents[1] / "train_configs" / "debug.toml"), *words]) == 0
        return [json.loads(line)["step_seconds"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def measure(what: str, data: str, steps: int, dtype: str) -> tuple[float, float]:
    """Tokens per second (median step, the first two left out) and peak memory in GiB of a fresh process."""
    command = [sys.executable, __file__, "--child", what, "--data", data, "--steps", str(steps), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return BATCH * SEQ_LEN / statistics.median(seconds[2:]), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", choices=("plain", "titan"), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        seconds = (plain_loop if options.child == "plain" else titan_run)(options.data, options.steps, options.dtype)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
        return

    from titan.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        data = str(prepare("builtin:topics", "bytes", folder, 0.05, print))
        for dtype in ("float32", "bfloat16"):
            pairs = []
            for i in range(options.pairs):
                order = ("plain", "titan") if i % 2 == 0 else ("titan", "plain")
                got = {what: measure(what, data, options.steps, dtype) for what in order}
                pairs.append(got)
                print(
                    f"{dtype} pair {i + 1}: " + ", ".join(f"{w} {s:,.0f} tok/s {m:.3f} GiB" for w, (s, m) in got.items()),
                    flush=True,
                )
            speed, memory = (statistics.median(p["titan"][k] / p["plain"][k] for p in pairs) for k in (0, 1))
            print(f"{dtype}: titan / loop = {speed:.3f} of the tokens/s, {memory:.3f} of the memory ({options.pairs} pairs)")


if __name__ == "__main__":
    main()
