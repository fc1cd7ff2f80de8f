"""How long a save keeps training waiting: written while training waits, against beside it (`checkpoint.async_save`).

    python benchmarks/save_stall.py [--steps 10] [--every 3] [--ranks 2] [--table.key=value ...]

Two runs of `titan train`, one after the other, with the same Llama of 303 M parameters in float32 with AdamW (3.6 GB a
checkpoint; 12 GB of memory). Printed for each save: the seconds that training waited (`save_stall_seconds` in metrics.jsonl),
also as a share of the median step; then the median step while nothing was being written, and right after a save. The last
step's save is left out: nothing is left to train beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPE: dict[str, Any] = {"dim": 1024, "n_layers": 18, "n_heads": 16, "n_kv_heads": 16, "ffn_dim": 4096, "vocab_size": 512}


def run(folder: Path, beside: bool, options: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
    """The records of one run's steps."""
    arguments = [sys.executable, "-m", "titan.cli", "train", str(ROOT / "train_configs" / "debug.toml")]
    arguments += [f"--model.{key}={value}" for key, value in SHAPE.items()]
    arguments += ["--data.tokenizer=bytes", "--training.seq_len=128", "--training.global_batch_size=4"]
    arguments += ["--training.micro_batch_size=2", "--validation.interval=0", "--sample.prompts=[]", "--metrics.interval=1"]
    arguments += [f"--training.steps={options.steps}", f"--checkpoint.interval={options.every}", "--checkpoint.keep_last=1"]
    arguments += [f"--checkpoint.async_save={str(beside).lower()}", f"--job.output={folder}", *words]
    given = {"NPROC": str(options.ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(arguments, env=os.environ | given, cwd=folder.parent, check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tell(name: str, records: list[dict[str, Any]], every: int) -> None:
    # A stall is counted by the step after it. The first two steps warm up; the one after a save has company in writing.
    writing = [r["step_seconds"] for r in records if r["step"] > 2 and (r["step"] - 1) % every == 0]
    alone = statistics.median(r["step_seconds"] for r in records if r["step"] > 2 and (r["step"] - 1) % every)
    stalls = [r["save_stall_seconds"] for r in records if r["step"] > 1 and (r["step"] - 1) % every == 0]
    each = ", ".join(f"{stall:.2f} s ({stall / alone:.0%} of a step)" for stall in stalls)
    after = statistics.median(writing)
    print(f"{name:<7} stalls: {each}; median step {alone:.1f} s, the step after a save {after:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument("--every", type=int, default=3, help="a save every so many steps")
    parser.add_argument("--ranks", type=int, default=2, help="processes, or GPUs")
    options, words = parser.parse_known_args()
    for name, beside in (("waiting", False), ("beside", True)):
        with tempfile.TemporaryDirectory() as folder:
            tell(name, run(Path(folder) / "run", beside, options, words), options.every)


if __name__ == "__main__":
    main()
