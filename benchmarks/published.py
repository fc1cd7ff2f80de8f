"""What `titan plan` says of jobs whose speed others have published, beside what they say. No GPU; some minutes.

    python benchmarks/published.py [--only 0,3]

None of the cluster files' figures is fitted to these. Their software is not ours: kernels, what is kept and recomputed, and how
schedules interleave differ, so this shows what a plan by data sheets is worth, not how fast titan is. Sources:

    torchtitan   benchmarks/llama3_h100_202412_torchtitan.md: H100 96 GB at 500 W with 2.4 TB/s of memory, selective recompute
    llm-foundry  scripts/train/benchmarking/README.md: MPT, H100 80 GB; full recompute where it says so
    Llama 3      Meta, "The Llama 3 herd of models" (arXiv:2407.21783), table 4: the share of the peak in bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from titan.cli import main as titan

CONFIGS = Path(__file__).parents[1] / "train_configs"
TITAN, FOUNDRY = "torchtitan", "llm-foundry"


class Row(NamedTuple):
    """A published figure, and the plan that comes nearest."""

    who: str
    what: str
    figure: float
    """Tokens a second and GPU, or a share below 1: MFU."""
    config: str
    world: int
    plan: str


def mpt(dim: int, layers: int, heads: int) -> str:
    """A model of MPT's shape, which is GPT-2's, at 2,048 tokens."""
    shape = f"model.dim={dim},model.ffn_dim={4 * dim},model.n_layers={layers},model.n_heads={heads},model.vocab_size=50368"
    return f"{shape},model.context_length=2048,model.dropout=0.0,training.seq_len=2048"


def batch(micro: int, whole: int) -> str:
    return f"training.micro_batch_size={micro},training.global_batch_size={whole}"


LLAMA = "training.seq_len=8192,recompute.mode=selective"
HERD = f"tp=8,pp=16,pp_schedule=Interleaved1F1B,pp_stages_per_rank=4,{batch(1, 2048)},recompute.mode=none"
ROWS = (
    Row(TITAN, "Llama 8B, 8 GPUs, FSDP", 5762, "llama3_8b", 8, f"dp_shard=8,{LLAMA},{batch(2, 16)},compile.enable=false"),
    Row(TITAN, "the same, compiled", 6667, "llama3_8b", 8, f"dp_shard=8,{LLAMA},{batch(2, 16)}"),
    Row(TITAN, "compiled, 128 GPUs", 6514, "llama3_8b", 128, f"dp_shard=128,{LLAMA},{batch(2, 256)}"),
    Row(FOUNDRY, "7B, 8 GPUs, FSDP", 10643, "gpt2_124m", 8, f"dp_shard=8,{mpt(4096, 32, 32)},{batch(6, 48)}"),
    Row(FOUNDRY, "13B, 64 GPUs, FSDP", 4800, "gpt2_124m", 64, f"dp_shard=64,{mpt(5120, 40, 40)},{batch(2, 128)}"),
    Row(
        FOUNDRY,
        "70B, 64 GPUs, FSDP, full recompute",
        1039,
        "gpt2_124m",
        64,
        f"dp_shard=64,{mpt(8192, 80, 64)},{batch(8, 2048)},recompute.mode=full",
    ),
    Row("Llama 3", "405B, 8,192 GPUs, tp 8, pp 16, dp 64", 0.43, "llama3_405b", 8192, f"dp_shard=64,{HERD}"),
    Row("Llama 3", "405B, 16,384 GPUs, tp 8, pp 16, dp 128", 0.41, "llama3_405b", 16384, f"dp_shard=128,{HERD}"),
)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="numbers of rows, from 0, with commas between")
    wanted = [int(word) for word in parser.parse_args().only.split(",") if word] or range(len(ROWS))
    errors = []
    print("| who | what | published | planned | error |\n|---|---|---|---|---|")
    for who, what, figure, config, world, plan in (ROWS[number] for number in wanted):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = titan(["plan", str(CONFIGS / f"{config}.toml"), f"--world-size={world}", f"--plan={plan}", "--json"])
        if code:
            return code
        found = json.loads(said.getvalue())
        ours = found["mfu"] if figure < 1 else found["tokens_per_second_per_gpu"]
        errors.append(abs(ours / figure - 1))
        shown = [f"{value:.1%}" if figure < 1 else f"{value:,.0f}" for value in (figure, ours)]
        print(f"| {who} | {what} | {shown[0]} | {shown[1]} | {ours / figure - 1:+.0%} |", flush=True)
    print(f"\nhalf are within {statistics.median(errors):.0%}, all within {max(errors):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
