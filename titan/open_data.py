"""A run's data on all ranks: prepared by one, opened by each, the same on every one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from titan import ranks as between
from titan import zoo
from titan.config import Config, Data
from titan.data.mixture import Samples
from titan.data.prepare import require_room, require_rows
from titan.data.splits import Splits, open_splits, prepare_sources, prepared_tokenizer
from titan.data.tokenizer import Tokenizer
from titan.ranks import Ranks
from titan.toml import ConfigError


def open_data(config: Config, ranks: Ranks) -> tuple[Splits, Tokenizer]:
    """The training split, the held-out one where validation is on, and the tokenizer. Rank 0 prepares what is not there yet."""

    def opened(data: Data) -> tuple[Splits, Tokenizer]:
        with refusals(config):
            tokenizer = prepared_tokenizer(data)
            require_rows(tokenizer, config.model.config)
            require_room(tokenizer, config.sample.prompts, config.sample.tokens, config.model.config)
            return open_splits(data, tokenizer, config.training, config.validation.interval > 0), tokenizer

    def prepared() -> Data:
        with refusals(config):
            data = prepare_sources(config.data, print)
        opened(data)  # which packs what is to be packed
        return data

    data = between.on_first(ranks, prepared)
    with between.same_outcome(ranks):
        splits, tokenizer = opened(data)
    between.require_same(ranks, {"the data": splits.train.fingerprint})
    return splits, tokenizer


def identity(config: Config, data: Samples) -> dict[str, Any]:
    """What a resumed run must find as it was, to have the same future."""
    free = zoo.no_matter(config.model.name)
    return {
        "model.name": config.model.name,
        **{f"model.{key}": value for key, value in vars(config.model.config).items() if key not in free},
        "data.path": data.datasets[0].fingerprint if len(data.datasets) == 1 else data.fingerprint,
        "data.sources": data.mixture.describe(),
        "data.tokenizer": data.tokenizer,
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
