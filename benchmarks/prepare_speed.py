"""How fast text becomes token shards, beside the tokenizers' own ways to encode a batch on the same cores.

    python benchmarks/prepare_speed.py [--megabytes 200] [--rounds 2]

The text is the standard library's sources in pieces of 3,000 characters, over and over, as JSONL. A sentencepiece model and a
byte-level BPE for `tokenizers`, both of 8,192 tokens, are trained on it. Their own calls get the texts as a list in memory and
leave Python lists: no reading, no JSON, no arrays, no files. `titan data prepare` does all of that, from its start to the
folder in its place, everything read back and verified.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from titan.data.corpora import open_corpus
from titan.data.encode import refuse
from titan.data.held_out import texts
from titan.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = 8192


def make_text(folder: Path, megabytes: float) -> list[str]:
    """Write rows.jsonl; the texts in it."""
    whole = list(texts(open_corpus("builtin:stdlib", print), "text", 0.0, held_out=False, bad=refuse))
    parts = [text[at : at + 3000] for text in whole for at in range(0, len(text), 3000)]
    draw, size, rows = random.Random(0), 0, []
    while size < megabytes * 1e6:
        rows.append(draw.choice(parts))
        size += len(rows[-1].encode())
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": row, "id": number}) + "\n" for number, row in enumerate(rows))
    return rows


def make_tokenizers(folder: Path, rows: list[str]) -> dict[str, Path]:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    some = rows[:3000]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(some, VOCABULARY))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(some, trainer)
    (folder / "hf").mkdir()
    bpe.save(str(folder / "hf" / "tokenizer.json"))
    return {"sentencepiece": folder / "tokenizer.model", "tokenizers": folder / "hf" / "tokenizer.json"}


def own_calls(name: str, path: Path, rows: list[str]) -> Iterator[tuple[str, Callable[[], int]]]:
    """The ways to call a tokenizer on a list of texts, each giving the number of tokens."""
    cores = len(os.sched_getaffinity(0))
    tokenizer: Any
    if name == "sentencepiece":
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        yield "encode(list)", lambda: sum(map(len, tokenizer.encode(rows)))
        yield f"encode(list, num_threads={cores})", lambda: sum(map(len, tokenizer.encode(rows, num_threads=cores)))
    else:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        for call in ("encode_batch", "encode_batch_fast"):
            yield f"{call}(list)", lambda call=call: in_thousands(getattr(tokenizer, call), rows)  # type: ignore[misc]


def in_thousands(call: Callable[[list[str]], list[Any]], rows: list[str]) -> int:
    """All at once would take tens of gigabytes."""
    return sum(len(one.ids) for at in range(0, len(rows), 1000) for one in call(rows[at : at + 1000]))


def prepare(folder: Path, tokenizer: Path, number: int) -> int:
    command = [sys.executable, "-m", "titan.cli", "data", "prepare", str(ROOT / "train_configs" / "debug.toml")]
    overrides = {
        "data.path": folder / "rows.jsonl",
        "data.tokenizer": tokenizer,
        "data.cache": folder / f"cache-{tokenizer.parent.name}-{number}",
        "model.vocab_size": VOCABULARY,
        "training.seq_len": 64,
    }
    words = [*command, *(f"--{key}={value}" for key, value in overrides.items())]
    subprocess.run(words, check=True, stdout=subprocess.PIPE)
    (made,) = Path(str(overrides["data.cache"])).glob("rows-*/prepared.json")
    return sum(json.loads(made.read_text())["tokens"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="size of the text")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is timed; the best counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_text(folder, options.megabytes)
        for kind, path in make_tokenizers(folder, rows).items():
            ways = list(own_calls(kind, path, rows))
            best: dict[str, float] = {}
            for number in range(options.rounds):
                for way, call in [*ways, ("titan data prepare", lambda: prepare(folder, path, number))]:  # noqa: B023
                    began = time.perf_counter()
                    tokens = call()
                    best[way] = max(best.get(way, 0), tokens / (time.perf_counter() - began))
            fastest = max(best[way] for way, _ in ways)
            for way, speed in best.items():
                print(f"{kind:14} {way:32} {speed / 1e6:6.2f} M tokens/s  {speed / fastest:5.2f}", flush=True)


if __name__ == "__main__":
    main()
