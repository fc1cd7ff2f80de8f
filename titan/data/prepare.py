"""Preparing: text to a folder of token shards, once.

The folder's name holds a hash of all that decides its contents: the text, the tokenizer, the share held out, the format. So a
folder that exists is the right one and is used as it is; the tokenizer's own files lie in it too.

`titan.data.preparation` makes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.config import Data, Source
from titan.data import train_tokenizer
from titan.data.corpora import CHOICES, Corpus, CorpusError, is_rows, open_corpus
from titan.data.formats import UNFINISHED, token_files
from titan.data.shards import TokenShard
from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.status import Failed
from titan.terminal import plural

VERSION = 2
TRAIN = "train:"
SUMMARY, LEFT_OUT = "prepared.json", "left_out.txt"
Report = Callable[[str], None]


@dataclass(frozen=True)
class PieceShare:
    """Which of the pieces are this process' own: every `count`-th, from `number` on."""

    number: int = 0
    count: int = 1


ALL = PieceShare()


def prepare(source: Source, data: Data, report: Report, workers: int | None = None, share: PieceShare = ALL) -> Path:
    """The folder of a source's token shards, made under `data.cache` where it is not there yet, the tokenizer's files with it.

    A path that already holds tokens, of titan or of another program, is returned as it is. `report` gets lines for people.
    workers: processes, by default one a core. With a share, the folder is there when the last process has made its own.
    Raises ValueError (ShardError is one) or FileNotFoundError, naming the key or the file to change; a cache that cannot be
    written is found out before the work begins. Raises Failed where a process dies or a disk is full.
    """
    tokenizer = None if data.tokenizer.startswith(TRAIN) else load_tokenizer(data.tokenizer)
    if files := token_files(Path(source.path)):
        if tokenizer is None:
            raise ValueError(f"data.tokenizer: {source.path} holds tokens already; give the tokenizer they were made with")
        for shard in (TokenShard(file) for file in files if file.suffix == ".tokens"):
            if shard.tokenizer != tokenizer.fingerprint:
                raise ValueError(
                    f"data.tokenizer: {shard.path} was made with the tokenizer {shard.tokenizer[:12]}, but {data.tokenizer!r} "
                    f"is {tokenizer.fingerprint[:12]}; give the tokenizer it was made with"
                )
        _require_as_meant(files, source)
        return Path(source.path)
    try:
        corpus = open_corpus(source.path, report, f"a folder of token shards, {CHOICES}")
        plan = _plan(corpus, source, data, tokenizer)
    except (CorpusError, OSError) as error:
        raise ValueError(f"data.path: {error}") from error
    if not plan.folder.is_dir():
        _make(plan, report, workers, share)
    _require_whole(plan)
    return plan.folder


def _make(plan: Plan, report: Report, workers: int | None, share: PieceShare) -> None:
    """Make the folder. Raises ValueError for what the config can mend, Failed for the rest."""
    from titan.data.crew import CrewError
    from titan.data.preparation import Preparation

    try:
        Preparation(plan, report, share).run(workers)
    except CorpusError as error:
        raise ValueError(f"data.path: {error}") from error
    except CrewError as error:
        raise Failed(f"{plan.path}: {error}") from error
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"{plan.folder.parent}: {why}; what is done is kept: make room, and start again") from error
        raise ValueError(f"data.cache: {plan.folder.parent} cannot be written ({why}); name a folder that can") from error


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, and as what."""

    path: str
    corpus: Corpus
    column: str
    """Key or column of a row's text or messages."""
    chat_template: str | None
    """As `load_chat` takes it; None: rows are texts."""
    tokenizer: Tokenizer | None
    """None: to be trained, as `tokenizer_spec` says."""
    tokenizer_spec: str
    validation_share: float
    skip_bad: bool
    folder: Path
    fingerprint: str
    """The corpus' when it was looked at."""

    @property
    def unfinished(self) -> Path:
        """Where the folder is made."""
        return self.folder.with_name(self.folder.name + UNFINISHED)


def _plan(corpus: Corpus, source: Source, data: Data, tokenizer: Tokenizer | None) -> Plan:
    """Raises ValueError where there is no chat template and one is needed."""
    chat = source.content == "chat"
    column = source.column or ("messages" if chat else "text")
    made_by = tokenizer.fingerprint if tokenizer else f"{data.tokenizer} {train_tokenizer.VERSION}"
    texts = [name for name, text in corpus.texts.items() if not is_rows(text)]
    if chat and texts:
        raise CorpusError(f'{texts[0]} holds text, not conversations, as content = "chat" has it; take it out')
    if source.column and len(texts) == len(corpus.texts):
        raise ValueError(f"data.column: {source.path} holds texts, which have no {source.column!r}; leave it out")
    fingerprint = corpus.fingerprint()
    identity: list[Any] = [VERSION, fingerprint, made_by, float(data.validation_share)]
    if len(texts) < len(corpus.texts):
        identity.append(column)
    if chat and tokenizer:
        from titan.data.chat import load_chat

        identity.append(load_chat(data.chat_template, tokenizer).fingerprint)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", corpus.name).strip("-") or "text"
    folder = Path(data.cache) / f"{plain}-{digest[:16]}"
    return Plan(
        path=source.path,
        corpus=corpus,
        column=column,
        chat_template=data.chat_template if chat else None,
        tokenizer=tokenizer,
        tokenizer_spec=data.tokenizer,
        validation_share=data.validation_share,
        skip_bad=data.on_bad == "skip",
        folder=folder,
        fingerprint=fingerprint,
    )


def _require_as_meant(files: list[Path], source: Source) -> None:
    """ValueError where a source's keys are not of tokens."""
    if source.column:
        raise ValueError(f"data.column: {source.path} holds tokens already, which have no {source.column!r}; leave it out")
    masked = all(file.suffix == ".tokens" and TokenShard(file).masked for file in files)
    if source.content == "chat" and not masked:
        raise ValueError(f"data.content: the tokens of {source.path} do not say which of them count; prepare the conversations")


def _require_whole(plan: Plan) -> None:
    """ValueError where rows were left out, and none may be."""
    summary = plan.folder / SUMMARY
    left = json.loads(summary.read_text())["left_out"] if summary.is_file() else {}
    if left and not plan.skip_bad:
        said = f"{plural(sum(left.values()), 'row')} of {plan.path} were left out ({plan.folder / LEFT_OUT})"
        raise ValueError(f'data.on_bad: {said}; mend them, or write "skip" to go on without them')


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
