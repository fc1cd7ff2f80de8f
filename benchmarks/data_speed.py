"""Whether training ever waits for data: tokens a second from a mixture, and how long a terabyte takes to open.

    python benchmarks/data_speed.py [--seconds 4] [--terabytes 1]

One process reads one rank's part (of 8 ranks) of the batches of a mixture of 8 sources, from sample ten billion on, without
workers, for sequences of several lengths; what eight fast GPUs eat is some 120,000 tokens a second together. The sources are
small, so they lie in memory: this is the price of the sampler and the loader, not of a disk. Then: the seconds from nothing to
the first batch over 1,000 sparse shards of that many terabytes, against one shard.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from titan.data.dataset import TokenDataset
from titan.data.loader import loader
from titan.data.mixture import Mixture, Samples, Stage
from titan.data.shard_writer import write_shard
from titan.data.shards import MAGIC, PAGE, TokenShard, dump
from titan.data.windows import Contiguous

VOCABULARY, BILLIONS = 50_304, 10**10


def throughput(root: Path, seconds: float) -> None:
    draw = np.random.default_rng(0)
    for source in range(8):
        (root / str(source)).mkdir()
        tokens = draw.integers(0, VOCABULARY, 2_000_000 * (source + 1))
        documents = ((part, 1) for part in np.array_split(tokens, len(tokens) // 1000))
        write_shard(root / str(source) / "train-00000.tokens", documents, vocab_size=VOCABULARY, tokenizer="t")
    mixture = Mixture([Stage(0, (1, 2, 3, 4, 5, 6, 7, 8))])
    for seq_len, mask in ((1024, False), (4096, False), (8192, False), (4096, True)):
        sources = {str(source): Contiguous(TokenDataset(root / str(source), "train"), seq_len, mask) for source in range(8)}
        samples = Samples(sources, 1, mixture)
        batches = loader(samples, global_batch_size=64, dp_rank=3, dp_degree=8, start_sample=BILLIONS, workers=0)
        next(batches)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            count += next(batches)["tokens"].numel()
        speed = count / (time.perf_counter() - began)
        print(f"seq_len {seq_len:>5}, mask {mask!s:>5}: {speed / 1e6:6.1f} M tokens/s, {speed / 120_000:4.0f} x eight GPUs")


def start_up(root: Path, terabytes: float) -> None:
    """Sparse shards: a header, a hole, and the end of one document."""
    for name, shards in (("one", 1), ("many", 1000)):
        folder = root / name
        folder.mkdir()
        first = folder / "train-00000.tokens"
        write_shard(first, [(np.zeros(4, dtype=int), 4)], vocab_size=VOCABULARY, tokenizer="t")
        tokens = int(terabytes * 1e12 / 2 / 1000) // 4 * 4
        text = dump(replace(TokenShard(first).header, tokens=tokens, bytes=tokens))
        for number in range(shards):
            with (folder / f"train-{number:05d}.tokens").open("wb") as file:
                file.write(MAGIC + len(text).to_bytes(8, "little") + text)
                file.truncate(PAGE + 2 * tokens)
                file.seek(0, 2)
                file.write(tokens.to_bytes(8, "little"))
        began = time.perf_counter()
        samples = Samples({"data": Contiguous(TokenDataset(folder, "train"), 4096)}, 1)
        next(loader(samples, global_batch_size=64, dp_rank=3, dp_degree=8, start_sample=BILLIONS, workers=0))
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e12
        print(f"{shards:>5} shards, {size:.3f} TB: {time.perf_counter() - began:.3f} s to the first batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="how long each length is read")
    parser.add_argument("--terabytes", type=float, default=1, help="size of the sparse shards together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        throughput(Path(folder), options.seconds)
        start_up(Path(folder), options.terabytes)


if __name__ == "__main__":
    main()
