"""A run's data on all ranks: prepared by one, opened by each, the same on every one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan import ranks as between
from titan import zoo
from titan.config import Config
from titan.data.prepare import open_splits, prepare, prepared_tokenizer, require_room, require_rows
from titan.data.tokenizer import Tokenizer
from titan.data.windows import Windows
from titan.ranks import Ranks
from titan.toml import ConfigError


def open_data(config: Config, ranks: Ranks) -> tuple[Windows, Windows | None, Tokenizer]:
    """The training split, the held-out one where validation is on, and the tokenizer. Rank 0 prepares what is not there yet."""
    data = config.data

    def opened(folder: Path) -> tuple[Windows, Windows | None, Tokenizer]:
        with refusals(config):
            tokenizer = prepared_tokenizer(folder, data.tokenizer)
            require_rows(tokenizer, config.model.config)
            require_room(tokenizer, config.sample.prompts, config.sample.tokens, config.model.config)
            return *open_splits(folder, data, tokenizer, config.training.seq_len, config.validation.interval > 0), tokenizer

    def prepared() -> Path:
        with refusals(config):
            folder = prepare(data.path, data.tokenizer, data.cache, data.validation_share, print)
        opened(folder)  # which packs what is to be packed
        return folder

    folder = between.on_first(ranks, prepared)
    with between.same_outcome(ranks):
        train, validation, tokenizer = opened(folder)
    between.require_same(ranks, {f"the data in {folder}": train.fingerprint})
    return train, validation, tokenizer


def identity(config: Config, data: Windows) -> dict[str, Any]:
    """What a resumed run must find as it was, to have the same future."""
    free = zoo.no_matter(config.model.name)
    return {
        "model.name": config.model.name,
        **{f"model.{key}": value for key, value in vars(config.model.config).items() if key not in free},
        "data.path": data.data.fingerprint,
        "data.tokenizer": data.data.tokenizer,
        "data.packing": config.data.packing,
        "training.seq_len": config.training.seq_len,
        "training.seed": config.training.seed,
    }


@contextlib.contextmanager
def refusals(config: Config) -> Iterator[None]:
    """A ValueError, which names the key to change, as a ConfigError, which names the file too."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config.source}: {error}") from error
