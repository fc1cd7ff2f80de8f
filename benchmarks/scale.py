"""The tables of docs/scale.md: weak and strong scaling by `titan plan`, and saves under failures. No GPU; some minutes.

    python benchmarks/scale.py [--only 8b,70b,405b,saves]

Each row is `titan plan CONFIG --world-size N --cluster C --plan PLAN --training.global_batch_size=B --json`. Weak: the batch
grows with the GPUs, so each has the same work. Strong: the batch stays, and each has less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from titan.cli import main as titan

CONFIGS = Path(__file__).parents[1] / "train_configs"
PLANS: dict[str, tuple[str, str, str]] = {
    "8b": ("llama3_8b.toml", "dp_replicate=-1,dp_shard=8", "h100"),
    "70b": ("llama3_70b.toml", "dp_shard=8,tp=8,pp=4,dp_replicate=-1", "h100"),
    "405b": ("llama3_405b.toml", "dp_shard=4,tp=8,pp=16,dp_replicate=-1", "h200"),
}
"""Config, plan, and the GPUs that it is meant for."""
WEAK = {"8b": (8, 64, 512, 4096, 65536), "70b": (256, 2048, 16384, 65536), "405b": (512, 4096, 65536)}
STRONG = {"8b": (8, 64, 256, 512), "70b": (256, 512, 1024, 2048), "405b": (512, 1024, 2048)}
SEQUENCES = {"8b": 8, "70b": 1, "405b": 1}
"""Of a GPU, in weak scaling."""
GPU_HOURS_A_FAILURE = 54 * 24 * 16384 / 419
"""Llama 3's pretraining: 419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783, section 3.3.4)."""
STALL_SECONDS, RESTART_SECONDS = 2.0, 600.0
"""What a save beside training stops it for, and what a restart takes: assumptions."""


def planned(config: str, world: int, plan: str, cluster: str, batch: int) -> dict[str, Any]:
    """What `titan plan --json` says."""
    words = [str(CONFIGS / config), f"--world-size={world}", f"--plan={plan}", f"--cluster={cluster}"]
    words.append(f"--training.global_batch_size={batch}")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if titan(["plan", *words, "--json"]):
            raise SystemExit(f"titan plan {' '.join(words)} failed")
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def row(name: str, world: int, batch: int) -> str:
    """A line of a table."""
    config, plan, cluster = PLANS[name]
    found = planned(config, world, plan, cluster, batch)
    spent = found["spent_seconds"]
    waits = sum(seconds for kind, seconds in spent.items() if kind.startswith("waiting")) / found["step_seconds"]
    figures = f"{found['step_seconds']:.2f} s | {found['tokens_per_second_per_gpu']:,.0f} | {found['mfu']:.1%}"
    return f"| {world:,} | {batch:,} | {figures} | {spent.get('bubble', 0) / found['step_seconds']:.1%} | {waits:.1%} |"


def saves() -> list[str]:
    """For so many GPUs the hours between failures, the best interval, and what is left for training.

    With a failure each M seconds, a save each t that stalls for d, and a restart of r: of the time d / t goes to saves,
    t / 2M to what is done twice, r / M to restarts. The sum is least at t = sqrt(2 d M). Source: Young (CACM 1974).
    """
    found = []
    for world in (8, 64, 512, 4096, 16384, 65536):
        mean = GPU_HOURS_A_FAILURE / world * 3600
        every = math.sqrt(2 * STALL_SECONDS * mean)
        lost = STALL_SECONDS / every + every / 2 / mean + RESTART_SECONDS / mean
        hourly = STALL_SECONDS / 3600 + 3600 / 2 / mean + RESTART_SECONDS / mean
        left = f"{1 - lost:.1%} | {max(0.0, 1 - hourly):.1%}"
        found.append(f"| {world:,} | {mean / 3600:,.1f} h | {every / 60:,.1f} min | {left} |")
    return found


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="8b,70b,405b,saves")
    for name in parser.parse_args().only.split(","):
        if name == "saves":
            print("\n| GPUs | a failure each | best interval | goodput | saving each hour |\n|---|---|---|---|---|")
            print("\n".join(saves()))
            continue
        config, plan, cluster = PLANS[name]
        for kind, worlds in (("Weak", WEAK[name]), ("Strong", STRONG[name])):
            print(f"\n{kind}: {config} --cluster {cluster} --plan {plan}\n")
            print("| GPUs | sequences | a step | tokens/s/GPU | MFU | bubble | waiting |\n|---|---|---|---|---|---|---|")
            for world in worlds:
                batch = SEQUENCES[name] * world if kind == "Weak" else 1024
                print(row(name, world, batch), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
