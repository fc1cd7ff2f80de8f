"""Preparing: text to a folder of token shards, once.

The folder's name holds a hash of all that decides its contents: the text, the tokenizer, the share held out, the format. So a
folder that exists is the right one and is used as it is; the tokenizer's own files lie in it too. It is made under a temporary
name and appears in one rename, whole: an interrupted preparation leaves nothing under that name, and of two processes that
prepare at once, one wins and the other takes the winner's folder.

Whole documents are held out, by a hash of their names: a document stays on its side when others come or go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from titan.data import train_tokenizer
from titan.data.corpora import CHOICES, Corpus, CorpusError, open_corpus
from titan.data.formats import token_files
from titan.data.shards import TokenShard, write_shard
from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.files import publish, temporary_folder, write_bytes_atomically
from titan.progress import ProgressBar
from titan.terminal import plural

VERSION = 1
TRAIN = "train:"
SHARD_TOKENS = 1 << 29  # 1 GiB of uint16


def prepare(path: str, tokenizer_spec: str, cache: str, validation_share: float, report: Callable[[str], None]) -> Path:
    """A folder of token shards for `data.path`, made under `cache` where it is not there yet, the tokenizer's files with it.

    A path that already holds tokens, of titan or of another program, is returned as it is. `report` gets lines for people.
    Raises ValueError (ShardError is one) or FileNotFoundError, naming the key or the file to change; a cache that cannot be
    written is found out before the work begins.
    """
    tokenizer = None if tokenizer_spec.startswith(TRAIN) else load_tokenizer(tokenizer_spec)
    if files := token_files(Path(path)):
        if tokenizer is None:
            raise ValueError(f"data.tokenizer: {path} holds tokens already; give the tokenizer they were made with")
        for shard in (TokenShard(file) for file in files if file.suffix == ".tokens"):
            if shard.tokenizer != tokenizer.fingerprint:
                raise ValueError(
                    f"data.tokenizer: {shard.path} was made with the tokenizer {shard.tokenizer[:12]}, but {tokenizer_spec!r} "
                    f"is {tokenizer.fingerprint[:12]}; give the tokenizer it was made with"
                )
        return Path(path)

    try:
        return _prepare(path, tokenizer, tokenizer_spec, Path(cache), validation_share, report)
    except CorpusError as error:
        raise ValueError(f"data.path: {error}") from error
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise ValueError(f"data.cache: {cache} cannot be written ({why}); name a folder that can") from error


def _prepare(
    path: str,
    tokenizer: Tokenizer | None,
    tokenizer_spec: str,
    cache: Path,
    validation_share: float,
    report: Callable[[str], None],
) -> Path:
    """The folder of the text's shards, found or made. Raises CorpusError, ValueError; OSError where it cannot be written."""
    corpus = open_corpus(path, report, f"a folder of token shards, {CHOICES}")
    made_by = tokenizer.fingerprint if tokenizer else f"{tokenizer_spec} {train_tokenizer.VERSION}"
    identity = json.dumps([VERSION, corpus.fingerprint(), made_by, float(validation_share)])
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", corpus.name).strip("-") or "text"
    folder = cache / f"{plain}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with temporary_folder(folder) as temporary:
        _write(corpus, path, tokenizer, tokenizer_spec, validation_share, temporary, report)
        publish(temporary, folder)
    return folder


def split_documents(names: list[str], validation_share: float) -> tuple[list[str], list[str]]:
    """(train, validation): a document is held out when the hash of its name, as a number in [0, 1), is below the share.

    With a share above 0 and two documents or more, each side gets at least one. Both keep the order of `names`.
    """
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    held_out = {name for name in names if places[name] < validation_share}
    if validation_share > 0 and len(names) > 1:
        held_out.add(min(names, key=places.__getitem__))
    if len(held_out) == len(names):
        held_out.discard(max(names, key=places.__getitem__))
    return [name for name in names if name not in held_out], [name for name in names if name in held_out]


def require_rows(tokenizer: Tokenizer, config: Any) -> None:
    """ValueError where a tokenizer has more tokens than the model has rows."""
    rows = getattr(config, "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        raise ValueError(f"model.vocab_size: {rows} rows are too few for the {tokenizer.vocab_size} tokens of data.tokenizer")


def require_room(tokenizer: Tokenizer, prompts: list[str], tokens: int, config: Any) -> None:
    """ValueError where a sample with its prompt and the token before it is longer than what the model is meant for."""
    longest = max((1 + len(tokenizer.encode(prompt)) + tokens for prompt in prompts), default=0)
    most = getattr(config, "context_length", longest)
    if longest > most:
        said = f"the longest prompt makes it {longest:,} tokens, more than the {most:,} that the model is meant for"
        raise ValueError(f"sample.tokens: {said}; ask for fewer, or raise model.context_length")


def _write(
    corpus: Corpus,
    path: str,
    tokenizer: Tokenizer | None,
    spec: str,
    validation_share: float,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Tokenize the corpus into `folder`, with a tokenizer trained on it where none is given; then read every shard back."""
    names = [name for name in corpus.texts if corpus.size(name)]
    empty = len(corpus.texts) - len(names)
    if not names:
        raise CorpusError(f"{path} holds no text, only {plural(empty, 'empty document')}")
    report(f"data: making tokens of {path}, {plural(len(names), 'document')}" + (f" ({empty} empty left out)" if empty else ""))
    train, validation = split_documents(names, validation_share)
    if validation_share > 0 and not validation:
        report("data: one document cannot be shared out, so nothing is held out for validation; give two or more")
    if tokenizer is None:
        size = int(spec.removeprefix(TRAIN))
        report(f"data: training a tokenizer of {size:,} tokens")
        texts = (text for _, text in corpus.documents(train))
        try:
            write_bytes_atomically(folder / "tokenizer.model", train_tokenizer.train_tokenizer(texts, size))
        except CorpusError:
            raise
        except ValueError as error:
            raise ValueError(f"data.tokenizer: {error}") from error
        tokenizer = load_tokenizer(str(folder / "tokenizer.model"))
    for name, content in tokenizer.files.items():
        write_bytes_atomically(folder / name, content)
    progress = ProgressBar(sum(map(corpus.size, names)), "data", report)
    for split, chosen in (("train", train), ("validation", validation)):
        encoded = _encode(corpus.documents(chosen), tokenizer, progress)
        tokens = 0
        for index, first in enumerate(encoded):
            shard = folder / f"{split}-{index:05d}.tokens"
            documents = _until_full(chain([first], encoded))
            tokens += write_shard(shard, documents, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint).tokens
            TokenShard(shard).verify()
        if chosen:
            progress.say(f"data: {split} has {plural(len(chosen), 'document')}, {tokens:,} tokens")
    progress.close()


def _encode(
    documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, progress: ProgressBar
) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens with the document's end, bytes of text) of each document."""
    for _, text in documents:
        size = len(text.encode())
        yield np.append(tokenizer.encode(text), np.int32(tokenizer.document_end)), size
        progress.add(size)


def _until_full(documents: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """The documents of one shard: the next ones, until it is full."""
    tokens = 0
    for document in documents:
        yield document
        tokens += len(document[0])
        if tokens >= SHARD_TOKENS:
            return
