"""What all tests share: the worker pool and a small dataset, made once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit it as ignored
sys.path.insert(0, str(Path(__file__).parent / "parity"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))


@pytest.fixture(scope="session")
def pool() -> Iterator[object]:
    from titan.pool import Pool

    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the text that Python carries, in bytes."""
    from titan.config import Data, Source
    from titan.data.prepare import prepare

    return prepare(Source(path="builtin:topics"), Data(cache=str(tmp_path_factory.mktemp("data"))), print)


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of documents of 1 to 60 bytes, the same each time: several to a sequence."""
    import numpy as np

    from titan.data.shard_writer import write_shard
    from titan.data.tokenizer import BytesTokenizer

    random, tokenizer, folder = np.random.default_rng(1), BytesTokenizer(), tmp_path_factory.mktemp("short")
    end = np.array([tokenizer.document_end])
    documents = [np.concatenate((random.integers(97, 123, size), end)) for size in random.integers(0, 60, 400)]
    write_shard(
        folder / "train-00000.tokens",
        [(ids, len(ids) - 1) for ids in documents],
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
    )
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of conversations, the same each time: of most sequences a part counts in the loss, of some nothing."""
    import numpy as np

    from titan.data.shard_writer import ShardWriter
    from titan.data.tokenizer import BytesTokenizer

    random, tokenizer, folder = np.random.default_rng(2), BytesTokenizer(), tmp_path_factory.mktemp("conversations")
    path, own = folder / "train-00000.tokens", {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    with ShardWriter(path, masked=True, **own) as writer:  # type: ignore[arg-type]
        for _ in range(300):
            for turn in range(2 * random.integers(1, 4)):
                size = int(random.integers(1, 80 if turn % 2 == 0 else 20))
                writer.add(random.integers(97, 123, size), size, np.full(size, turn % 2 == 1))
            writer.add(np.array([tokenizer.document_end]), 0, np.array([False]))
            writer.end_document()
        writer.finish()
    return folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text is many pieces."""
    from titan.data import pieces

    monkeypatch.setattr(pieces, "SMALLEST", 10_000)
