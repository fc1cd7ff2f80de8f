"""Memory and time of the loss: the model's plain one, which holds all logits, against blocks of them.

    python benchmarks/loss.py [--tokens 4096] [--words 128000] [--width 1024] [--dtype bfloat16] [--chunk 16777216]

A process for each, on this machine's CPU: forward and backward once, after a small one; printed is what the process's peak
memory (ru_maxrss) grew by over its inputs, the gradients that come out included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from titan.kernels.linear_cross_entropy import linear_cross_entropy
from titan.models.llama3.model import SummedCrossEntropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 4096), ("words", 128_000), ("width", 1024), ("chunk", 2**24)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        measure(given)
        return
    print(f"{given.tokens:,} tokens, {given.words:,} words, width {given.width:,}, {given.dtype}, torch {torch.__version__}")
    found = {}
    for which in ("plain", "blocks"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory, seconds, loss = map(float, done.stdout.split())
        found[which] = memory
        print(f"{which:7} {memory / 1e6:8,.0f} MB  {seconds:6.2f} s   loss {loss:,.3f}")
    print(f"memory of blocks over plain: {found['blocks'] / found['plain']:.3f}")


def measure(given: argparse.Namespace) -> None:
    """Bytes, seconds and the loss of one of the two."""
    plain = SummedCrossEntropy()

    def step(tokens: int, words: int) -> tuple[float, int, float]:
        torch.manual_seed(0)
        h = torch.randn(tokens, given.width, dtype=getattr(torch, given.dtype)).requires_grad_()
        weight = torch.empty(words, given.width, dtype=h.dtype).normal_(std=0.02).requires_grad_()
        labels = torch.randint(0, words, (tokens,))
        before, began = peak(), time.perf_counter()
        loss = plain(h, weight, labels) if given.only == "plain" else linear_cross_entropy(h, weight, labels, most=given.chunk)
        loss.backward()
        return time.perf_counter() - began, peak() - before, loss.item()

    step(64, 64)
    seconds, memory, loss = step(given.tokens, given.words)
    print(memory, seconds, loss)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
