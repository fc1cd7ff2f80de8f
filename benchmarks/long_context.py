"""How memory grows with the sequence: a small Llama on CPU, one process against ranks that share the sequence.

    python benchmarks/long_context.py [--lengths 16384,32768,65536] [--degree 4] [--methods ring,allgather,ulysses]

One layer, forward and backward, of one sequence. Printed per run: the highest memory of any rank above what it used for a
sequence of 1,024 tokens (resident set, MiB), and the seconds of the step. Scores of the whole sequence would be
4 S^2 bytes per head: 16 GiB for 65,536 tokens. Each run is made of new processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

HEADS, HEAD_DIM, VOCABULARY, WARM_UP = 4, 16, 64, 1024


def rank_main(rank: int, degree: int, method: str, seq_len: int, store: str, answers: Any) -> None:
    """One rank of one run: puts (MiB above the warm-up, seconds) into `answers`."""
    import torch
    import torch.distributed as dist

    from titan.attention import TiledAttention
    from titan.models.llama3.config import Config
    from titan.models.llama3.model import Transformer
    from titan.parallel.context import ContextAttention, cut

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(Config(HEADS * HEAD_DIM, 1, HEADS, HEADS // 2, 2 * HEADS * HEAD_DIM, VOCABULARY))
    model.init_weights()
    block: Any = model.layers["0"]
    block.attention.core = TiledAttention()
    if degree > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=degree)
        group = dist.group.WORLD
        assert group is not None
        block.attention.core = ContextAttention(group, method)
    for length in (WARM_UP, seq_len):
        before, started = peak(), time.perf_counter()
        tokens = torch.randint(VOCABULARY, (1, length + 1))
        whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(length)[None]}
        loss = model(**cut(whole, rank, degree)) / length
        loss.backward()
    answers.put((peak() - before, time.perf_counter() - started))
    if degree > 1:
        dist.destroy_process_group()


def peak() -> float:
    """The most memory that this process ever had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(degree: int, method: str, seq_len: int) -> tuple[float, float]:
    """MiB and seconds, each the most of any rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        words = (degree, method, seq_len, str(Path(folder) / "store"), answers)
        ranks = [context.Process(target=rank_main, args=(rank, *words)) for rank in range(degree)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank ended with {[process.exitcode for process in ranks]}")
        found = [answers.get() for _ in ranks]
    return max(memory for memory, _ in found), max(seconds for _, seconds in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,32768,65536", help="sequence lengths in tokens")
    parser.add_argument("--degree", type=int, default=4, help="ranks that share a sequence")
    parser.add_argument("--methods", default="ring,allgather,ulysses")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    for name, degree in [("one process", 1), *((method, options.degree) for method in options.methods.split(","))]:
        last = 0.0
        for length in lengths:
            memory, seconds = run(degree, name, length)
            growth = f"x {memory / last:.2f}" if last else ""
            print(f"{name:<12} ranks {degree}  {length:>7,} tokens  {memory:8.1f} MiB {growth:<7} {seconds:7.1f} s", flush=True)
            last = memory


if __name__ == "__main__":
    main()
