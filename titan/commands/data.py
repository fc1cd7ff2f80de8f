"""titan data train-tokenizer PATH OUT.model [--vocab-size N]
titan data prepare CONFIG [--table.key=value ...] [--workers N]
titan data inspect CONFIG [--table.key=value ...] [--held-out] [--sample I ...] [--ranks N] [--verify]

train-tokenizer: a sentencepiece BPE model from text, of any kind that data.path takes: .txt, .jsonl, .parquet, folders,
patterns, builtin:topics. It keeps every character, and gives runs of spaces and line ends tokens of their own, so that code is
not wasted on white space. data.tokenizer = "train:4096" in a TOML does the same at first use.

prepare: makes the token shards that a config asks for, if they are not there yet, so that no machine with GPUs waits for it.
By all cores, in pieces: a run that was killed goes on where it was, and the result is the same for any number of workers. A
row that is no document stops it, with file and line; data.on_bad=skip leaves such rows out, counted and listed. Under srun
the tasks share the pieces out, and the last one to finish puts the folder in its place.

inspect: what a config's data hold: tokens, how long documents are, samples as text with the documents' borders, and in which
step and on which rank a sample is trained. The data are of any format that data.path takes.

  titan data train-tokenizer builtin:stdlib stdlib.model --vocab-size 4096
  titan data train-tokenizer corpus/ corpus.model --vocab-size 32000
  titan data prepare train_configs/stdlib.toml
  titan data prepare CONFIG --data.path='corpus/*.jsonl.zst' --data.on_bad=skip
  srun --nodes=8 --ntasks-per-node=1 titan data prepare CONFIG
  titan data inspect train_configs/debug.toml --sample 0 --sample 1600
  titan data inspect CONFIG --data.path=fineweb/ --data.dtype=uint16 --verify

  --vocab-size N   tokens, 256 bytes and 3 special ones included (4096);
                   a multiple of 128 suits GPUs
  --column NAME    key or column of a row's text (text)
  --workers N      processes (one a core)
  --held-out       the validation split, not the training split
  --sample I       the I-th sample of the run, counted from 0, as text
  --ranks N        how many ranks there would be (as few as the plan needs)
  --verify         read every file whole: checksums, where there are any,
                   tokens outside the vocabulary, document ends
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from titan.arguments import Parser, blame, check_config, did_you_mean, read_config
from titan.check import SMALLEST_TRAINED
from titan.config import least_ranks
from titan.progress import ProgressBar, size_words
from titan.status import Exit
from titan.terminal import beside, columns, plural, showable
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.data.dataset import TokenDataset

MEASURED = 1 << 26
ACTIONS = ("train-tokenizer", "prepare", "inspect")


def run(words: list[str]) -> int:
    """Choose the action."""
    if not words or words[0] not in ACTIONS:
        hint = did_you_mean(words[0], ACTIONS) if words else ""
        said = f"no {words[0]!r}{hint}" if words else "nothing to do"
        raise ConfigError(f"command line: titan data: {said}; there are {', '.join(ACTIONS)}, see titan data --help")
    return {"train-tokenizer": train, "prepare": prepare, "inspect": inspect}[words[0]](words[1:])


def train(words: list[str]) -> int:
    """Train on nineteen documents of twenty, and say how many bytes a token takes on the twentieth."""
    parser = Parser("data train-tokenizer")
    parser.add_argument("path")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--column", default="text")
    asked = parser.parse_args(words)
    if asked.vocab_size <= SMALLEST_TRAINED:
        parser.error(f"--vocab-size {asked.vocab_size}: expected more than {SMALLEST_TRAINED}, of which 256 are bytes")
    if asked.out.exists() or asked.out.suffix != ".model":
        parser.error(f"{asked.out}: " + ("is there already" if asked.out.exists() else "expected a name that ends in .model"))

    from titan.data.corpora import open_corpus
    from titan.data.encode import refuse
    from titan.data.held_out import texts
    from titan.data.tokenizer import load_tokenizer
    from titan.data.train_tokenizer import train_tokenizer
    from titan.files import write_bytes_atomically

    started = time.perf_counter()
    try:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        corpus = open_corpus(asked.path, print)
        size = sum(map(corpus.size, corpus.texts))
        print(f"training on 95% of {plural(len(corpus.texts), 'file')}, {size_words(size)}", flush=True)
        model = train_tokenizer(texts(corpus, asked.column, 0.05, False, refuse), asked.vocab_size)
        write_bytes_atomically(asked.out, model)
    except (ValueError, OSError) as error:
        raise ConfigError(f"command line: {error}") from error
    tokenizer = load_tokenizer(str(asked.out))
    print(f"{asked.out}: {asked.vocab_size:,} tokens, {time.perf_counter() - started:.1f} s")
    for held_out, where in ((True, "text it has not seen"), (False, "what it was trained on")):
        size = count = 0
        for text in texts(corpus, asked.column, 0.05, held_out, refuse):
            size, count = size + len(text.encode()), count + len(tokenizer.encode(text))
            if size > MEASURED:
                break
        if count:
            print(f"{size / count:.2f} bytes a token, over {size_words(size)} of {where}")
            break
    print(f'next: data.tokenizer = "{asked.out}" and model.vocab_size = {asked.vocab_size} or more')
    return 0


def prepare(words: list[str]) -> int:
    """Make a config's token shards, or as one task of several its share of them."""
    parser = Parser("data prepare")
    parser.add_argument("--workers", type=int)
    asked, rest = parser.parse_with_config(words)
    if asked.workers is not None and asked.workers < 1:
        parser.error("--workers is a whole number, 1 or more")
    config = check_config(read_config(rest), None, rest)

    from titan.data.prepare import PieceShare
    from titan.data.splits import open_splits, prepared_tokenizer
    from titan.launch import make_shards

    share = PieceShare(*slurm_task(os.environ))
    try:
        data = make_shards(config, asked.workers, share)
        missing = [source.path for source in data.all_sources if not os.path.exists(source.path)]
        if not missing:
            open_splits(data, prepared_tokenizer(data), config.training, config.validation.interval > 0)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(blame(config, rest, str(error))) from error
    for source in data.all_sources:
        mine = f"share {share.number + 1} of {share.count} is done; the last task to finish puts the folder in its place"
        print(f"{source.path}: {mine if source.path in missing else 'ready'}")
    return 0


def slurm_task(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number, count) of the tasks that `srun` started beside this one; (0, 1) outside of it."""
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return 0, 1
    count = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    return int(environ["SLURM_PROCID"]), int(count)


def inspect(words: list[str]) -> int:
    """Show a dataset."""
    parser = Parser("data inspect")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--sample", type=int, action="append", default=[])
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--verify", action="store_true")
    asked, rest = parser.parse_with_config(words)
    config = read_config(rest)
    world = asked.ranks or least_ranks(config.parallel)
    if min(asked.sample, default=0) < 0:
        parser.error("--sample is a whole number, 0 or more")
    check_config(config, world, rest)

    from titan.data.inspect import histogram, length_counts, place, sample, summary
    from titan.data.splits import open_splits, prepared_tokenizer
    from titan.launch import make_shards

    try:
        prepared = replace(make_shards(config), document_mask=True)
        tokenizer = prepared_tokenizer(prepared)
        splits = open_splits(prepared, tokenizer, config.training, validate=asked.held_out)
        samples = splits.validation or splits.train
        for source in [part for windows in samples.windows for part in getattr(windows, "parts", [windows])]:
            for data in source.datasets:
                print("\n".join(summary(source, data, config)), flush=True)
                progress = ProgressBar(data.tokens, "documents", print, "tokens")
                counts = length_counts(data, progress.add)
                progress.close()
                print("\n".join(histogram(counts, (sys.stdout.encoding or "").lower().startswith("utf"))), flush=True)
        for number in asked.sample:
            name = f" of {samples.names[samples.place(number)[0]]}" if config.data.sources else ""
            print(f"\nsample {number:,}{name}, {place(number, config, world, asked.held_out)}")
            for i, text in enumerate(sample(samples, tokenizer, number)):
                border = "  --------------------  a document begins\n" if i else ""
                print(border + showable(beside("  | ", text, columns(sys.stdout, 120)), sys.stdout))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(blame(config, rest, str(error))) from error
    return verify(samples.datasets) if asked.verify else Exit.FINISHED


def verify(datasets: list[TokenDataset]) -> int:
    """Read every file of a split."""
    wrong = 0
    for shard in [shard for data in datasets for shard in data.shards]:
        try:
            shard.verify()
        except ValueError as error:
            wrong += 1
            print(f"DAMAGED  {error}", flush=True)
        else:
            print(f"whole    {shard.path}", flush=True)
    return Exit.FAILED if wrong else Exit.FINISHED
