"""Documents packed whole into windows: each token once, nothing lost, next to no padding, and what a batch of them says."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from titan.config import Data
from titan.data.dataset import TokenDataset
from titan.data.loader import loader
from titan.data.mixture import Samples
from titan.data.packing import best_fit, pieces_of
from titan.data.shard_writer import write_shard
from titan.data.windows import Windows, windows

SEQ_LEN = 16


def make(folder: Path, draw: np.random.Generator, documents: int = 60) -> tuple[TokenDataset, list[list[int]]]:
    """Documents of 1 to 5 windows and their tokens; a token's value is its place in the stream, so each is told apart."""
    lengths = [1, 2, 3, 7, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 2 * SEQ_LEN, 5 * SEQ_LEN - 3]
    texts, at = [], 0
    folder.mkdir()
    for shard in range(3):
        own = []
        for length in draw.choice(lengths, documents // 3):
            own.append((np.arange(at, at + length), 1))
            texts.append(list(range(at, at + length)))
            at += int(length)
        write_shard(folder / f"train-{shard:05d}.tokens", own, vocab_size=100_000, tokenizer="t")
    return TokenDataset(folder, "train"), texts


def packed(data: TokenDataset, cache: Path) -> Windows:
    return windows(data, Data(packing="best_fit", document_mask=True, cache=str(cache)), SEQ_LEN)


def one_by_one(lengths: np.ndarray, seq_len: int) -> list[int]:
    """Best fit decreasing as it is told: each piece into the fullest window that has room. The rooms that are left."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=rooms.__getitem__)] -= length
        else:
            rooms.append(seq_len - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_windows_are_those_of_best_fit_decreasing(seed: int) -> None:
    draw = np.random.default_rng(seed)
    seq_len = int(draw.integers(1, 60))
    lengths = draw.integers(1, seq_len + 1, int(draw.integers(1, 300)))
    window = best_fit(lengths, seq_len)
    assert sorted(set(window.tolist())) == list(range(int(window.max()) + 1))
    filled = np.bincount(window, lengths).astype(int)
    assert sorted((seq_len - filled).tolist()) == one_by_one(lengths, seq_len)


@pytest.mark.parametrize("seed", range(8))
def test_every_document_token_comes_once_an_epoch_and_sees_its_own_document_alone(tmp_path: Path, seed: int) -> None:
    data, texts = make(tmp_path / "data", np.random.default_rng(seed))
    found = pickle.loads(pickle.dumps(packed(data, tmp_path / "cache")))
    document_of = {token: number for number, text in enumerate(texts) for token in text}
    ends = {text[-1] for text in texts}
    seen: list[int] = []
    for number in range(found.count):
        arrays = found.read(number, "")
        filled = found.filled(number)
        tokens, labels, ids, positions = (arrays[key] for key in ("tokens", "labels", "document_ids", "positions"))
        assert (labels[filled:] == -100).all()
        assert not set(ids[:filled]) & set(ids[filled:])
        for i, token in enumerate(tokens[:filled].tolist()):
            begins = i == 0 or ids[i] != ids[i - 1]
            assert positions[i] == (0 if begins else positions[i - 1] + 1)
            assert begins or (token == tokens[i - 1] + 1 and document_of[token] == document_of[int(tokens[i - 1])])
            assert labels[i] == (-100 if token in ends else token + 1)
        seen += tokens[:filled].tolist()
    assert sorted(seen) == list(range(data.tokens))
    whole = sum(len(text) <= SEQ_LEN for text in texts)
    torn = sum(found.read(number, "")["tokens"][0] not in {text[0] for text in texts} for number in range(found.count))
    assert whole
    assert torn <= sum(-(-len(text) // SEQ_LEN) - 1 for text in texts)


def test_padding_is_rare_where_documents_are_short() -> None:
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(6, 1.2, 100_000).astype(int) + 1, 20_000)
    _, sizes = pieces_of([lengths[:40_000], lengths[40_000:]], 4096)
    assert sizes.sum() == lengths.sum()
    used = int(best_fit(sizes, 4096).max()) + 1
    assert 1 - lengths.sum() / (used * 4096) < 0.001


def test_ranks_share_the_batches_and_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    data, _ = make(tmp_path / "data", np.random.default_rng(3))
    found = packed(data, tmp_path / "cache")
    samples = Samples({"data": found}, 1)
    steps = 2 * found.count // 4

    def read(rank: int, degree: int, first: int = 0, workers: int = 0) -> list[dict[str, np.ndarray]]:
        batches = loader(
            samples, global_batch_size=4, dp_rank=rank, dp_degree=degree, start_sample=4 * first, workers=workers,
            limit=steps - first,
        )  # fmt: skip
        return [{name: array.numpy() for name, array in batch.items()} for batch in batches]

    alone = read(0, 1)
    parts = zip(read(0, 2, 3), read(1, 2, 3, workers=1), alone[3:], strict=True)
    for first, second, whole in parts:
        for name, array in whole.items():
            assert (np.concatenate([first[name], second[name]]) == array).all()
    rows = np.concatenate([batch["tokens"] for batch in alone])
    epochs = rows[: found.count].tolist(), rows[found.count : 2 * found.count].tolist()
    assert epochs[0][: len(epochs[1])] != epochs[1]
    assert len({str(row) for row in epochs[0]}) == found.count


def test_it_is_packed_once_and_anew_for_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = make(tmp_path / "data", np.random.default_rng(4))
    first = packed(data, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    before = (folder / "order.npy").stat().st_mtime_ns
    assert packed(data, tmp_path / "cache").fingerprint == first.fingerprint != data.fingerprint
    assert (folder / "order.npy").stat().st_mtime_ns == before
    other, _ = make(tmp_path / "other", np.random.default_rng(5))
    assert packed(other, tmp_path / "cache").fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 2
