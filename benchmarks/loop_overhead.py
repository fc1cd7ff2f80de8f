"""What titan costs on top of PyTorch: `titan.train` in one process against a hand-written loop with the same model.

    python benchmarks/loop_overhead.py [--pairs 40] [--rounds 3]

Both train 12 M parameters on 2,048 tokens a step, in float32 and in bfloat16 (the loop by autocast, as one would write it).
They are two processes that take turns, one step each, first the one and then the other: a machine whose speed drifts
slows both. A turn is the whole loop, from one step's start to the next: data, step, metrics of every step. Printed: the median
over pairs of tokens per second, titan / loop, and the ratio of peak memory. Each round starts both processes anew.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {"dim": 384, "n_layers": 6, "n_heads": 12, "n_kv_heads": 6, "ffn_dim": 1312, "vocab_size": 512}
SEQ_LEN, BATCH, MICRO, SEED, WARM_UP = 256, 8, 8, 1, 4


def plain_loop(data: str, steps: int, dtype: str) -> None:
    """The hand-written loop."""
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
    for step in range(steps):
        wait_for_turn()
        starts = random.integers(0, 400_000, BATCH)
        batch = torch.from_numpy(np.stack([tokens[s : s + SEQ_LEN + 1] for s in starts]).astype(np.int64))
        total = 0.0
        for micro in batch.split(MICRO):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(micro[:, :-1], labels=micro[:, 1:]) / (BATCH * SEQ_LEN)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {total}", file=sys.stderr)
    wait_for_turn()


def titan_run(data: str, steps: int, dtype: str) -> None:
    """`titan.train` as it is, in one process, with every step logged. It asks whether to stop once a step: that is its turn."""
    import titan.train

    class TurnTakingStop(titan.train.Stop):
        def wanted(self) -> bool:
            wait_for_turn()
            return super().wanted()

    titan.train.Stop = TurnTakingStop  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as output:
        words = [f"--model.{key}={value}" for key, value in SHAPE.items()]
        words += [f"--data.path={data}", f"--job.output={output}", f"--precision.param={dtype}", "--metrics.interval=1"]
        words += [f"--training.steps={steps + 2}", f"--training.seq_len={SEQ_LEN}", f"--training.global_batch_size={BATCH}"]
        words += [f"--training.micro_batch_size={MICRO}", "--validation.interval=0", "--schedule.warmup_steps=1"]
        words += ["--checkpoint.interval=0", "--data.tokenizer=bytes", "--sample.prompts=[]"]
        code = titan.train.run([str(Path(__file__).parents[1] / "train_configs" / "debug.toml"), *words])
        assert code == 0, code


def wait_for_turn() -> None:
    """Tell the parent that a step is done, with the peak memory in KiB, and wait for its word."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.__stdout__.write(f"TURN {peak}\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]
    if not sys.stdin.readline():
        sys.exit(0)


class Runner:
    """One of the two processes."""

    def __init__(self, what: str, data: str, steps: int, dtype: str) -> None:
        command = [sys.executable, __file__, "--child", what, "--data", data, "--steps", str(steps), "--dtype", dtype]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.memory = 0
        self._until_done()

    def turn(self) -> float:
        """Let it take a step; the seconds that took."""
        assert self.process.stdin is not None
        started = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._until_done()
        return time.perf_counter() - started

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _until_done(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("TURN "):
                self.memory = int(line.split()[1])
                return
        raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")


def compare(data: str, pairs: int, dtype: str) -> tuple[list[float], float]:
    """titan / loop: speed of each pair of steps, and peak memory."""
    loop, titan = (Runner(what, data, pairs + WARM_UP, dtype) for what in ("loop", "titan"))
    try:
        ratios = []
        for i in range(pairs + WARM_UP):
            seconds = {runner: runner.turn() for runner in ((loop, titan) if i % 2 else (titan, loop))}
            ratios.append(seconds[loop] / seconds[titan])
        return ratios[WARM_UP:], titan.memory / loop.memory
    finally:
        loop.close()
        titan.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are started anew")
    parser.add_argument("--child", choices=("loop", "titan"), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        (plain_loop if options.child == "loop" else titan_run)(options.data, options.steps, options.dtype)
        return

    from titan.config import Data, Source
    from titan.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        data = str(prepare(Source(path="builtin:topics"), Data(cache=folder), print))
        for dtype in ("float32", "bfloat16"):
            speeds, memories = [], []
            for i in range(options.rounds):
                ratios, memory = compare(data, options.pairs, dtype)
                print(
                    f"{dtype} round {i + 1}: {statistics.median(ratios):.3f} of the tokens/s, {memory:.3f} of the memory",
                    flush=True,
                )
                speeds += ratios
                memories.append(memory)
            low, middle, high = statistics.quantiles(speeds, n=4)
            print(
                f"{dtype}: titan / loop = {middle:.3f} of the tokens/s (quartiles {low:.3f} to {high:.3f}), "
                f"{statistics.median(memories):.3f} of the memory; {len(speeds)} pairs"
            )


if __name__ == "__main__":
    main()
