"""titan data train-tokenizer PATH OUT.model [--vocab-size N]
titan data prepare CONFIG [--table.key=value ...]

train-tokenizer: a sentencepiece BPE model from text: a .txt file, a folder of them, builtin:topics or builtin:stdlib. It
keeps every character, and gives runs of spaces and line ends tokens of their own, so that code is not wasted on white space.
data.tokenizer = "train:4096" in a TOML does the same at first use.

prepare: makes the token shards that a config asks for, if they are not there yet, so that no machine with GPUs waits for it.

  titan data train-tokenizer builtin:stdlib stdlib.model --vocab-size 4096
  titan data train-tokenizer corpus/ corpus.model --vocab-size 32000
  titan data prepare train_configs/stdlib.toml

  --vocab-size N   tokens, 256 bytes and 3 special ones included (4096);
                   a multiple of 128 suits GPUs
"""

from __future__ import annotations

import time
from pathlib import Path

from titan.arguments import Parser, blame, check_config, did_you_mean, read_config
from titan.check import SMALLEST_TRAINED
from titan.terminal import plural
from titan.toml import ConfigError

ACTIONS = ("train-tokenizer", "prepare")


def run(words: list[str]) -> int:
    """Choose the action."""
    if not words or words[0] not in ACTIONS:
        hint = did_you_mean(words[0], ACTIONS) if words else ""
        said = f"no {words[0]!r}{hint}" if words else "nothing to do"
        raise ConfigError(f"command line: titan data: {said}; there are {' and '.join(ACTIONS)}, see titan data --help")
    return train(words[1:]) if words[0] == "train-tokenizer" else prepare(words[1:])


def train(words: list[str]) -> int:
    """Train on nineteen documents of twenty, and say how many bytes a token takes on the twentieth."""
    parser = Parser("data train-tokenizer")
    parser.add_argument("path")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096)
    asked = parser.parse_args(words)
    if asked.vocab_size <= SMALLEST_TRAINED:
        parser.error(f"--vocab-size {asked.vocab_size}: expected more than {SMALLEST_TRAINED}, of which 256 are bytes")
    if asked.out.exists() or asked.out.suffix != ".model":
        parser.error(f"{asked.out}: " + ("is there already" if asked.out.exists() else "expected a name that ends in .model"))

    from titan.data.corpora import open_corpus
    from titan.data.prepare import split_documents
    from titan.data.tokenizer import load_tokenizer
    from titan.data.train_tokenizer import train_tokenizer
    from titan.files import write_bytes_atomically

    started = time.perf_counter()
    try:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        corpus = open_corpus(asked.path, print)
        names, held_out = split_documents([name for name in corpus.texts if corpus.size(name)], 0.05)
        print(f"training on {plural(len(names), 'document')}, {sum(map(corpus.size, names)) / 1e6:.1f} MB", flush=True)
        model = train_tokenizer((text for _, text in corpus.documents(names)), asked.vocab_size)
        write_bytes_atomically(asked.out, model)
    except (ValueError, OSError) as error:
        raise ConfigError(f"command line: {error}") from error
    tokenizer = load_tokenizer(str(asked.out))
    print(f"{asked.out}: {asked.vocab_size:,} tokens, {time.perf_counter() - started:.1f} s")
    size = count = 0
    for _, text in corpus.documents(held_out or names):
        size, count = size + len(text.encode()), count + len(tokenizer.encode(text))
    where = f"{plural(len(held_out), 'document')} it has not seen" if held_out else "what it was trained on"
    print(f"{size / count:.2f} bytes a token, over {where}")
    print(f'next: data.tokenizer = "{asked.out}" and model.vocab_size = {asked.vocab_size} or more')
    return 0


def prepare(words: list[str]) -> int:
    """Make a config's token shards."""
    from titan.launch import make_shards

    config = check_config(read_config(words), None, words)
    try:
        folder = make_shards(config)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(blame(config, words, str(error))) from error
    print(f"{folder}: ready")
    return 0
