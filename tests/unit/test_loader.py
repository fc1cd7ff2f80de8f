from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan.data.dataset import TokenDataset
from titan.data.loader import RankBatches, WorkerDiedError, loader
from titan.data.mixture import Samples
from titan.data.shard_writer import write_shard
from titan.data.windows import Contiguous

SEQ_LEN, BATCH = 8, 4


def forked_children() -> list[Any]:
    """The loader's workers; the parity pool's, which may be there too, are spawned."""
    return [child for child in multiprocessing.active_children() if "Spawn" not in type(child).__name__]


def make_dataset(folder: Path, tokens: int, split: str = "train", vocab_size: int = 100_000) -> TokenDataset:
    """A stream whose token at position p is p, over three shards."""
    pieces = np.array_split(np.arange(tokens), 3)
    for index, piece in enumerate(pieces):
        write_shard(folder / f"{split}-{index:05d}.tokens", [(piece, 1)], vocab_size=vocab_size, tokenizer="t")
    return TokenDataset(folder, split)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return make_dataset(tmp_path, 50 * SEQ_LEN + 3)  # 50 samples: 12.5 global batches an epoch


def load(dataset: TokenDataset, **changes: Any) -> Iterator[dict[str, torch.Tensor]]:
    options = {"global_batch_size": BATCH, "start_sample": 0, "workers": 0, "dp_rank": 0, "dp_degree": 1}
    windows = Contiguous(dataset, SEQ_LEN, changes.pop("document_mask", False))
    return loader(Samples({"data": windows}, changes.pop("seed", 7)), **(options | changes))


def global_batches(
    dataset: TokenDataset, steps: int, degree: int, keys: tuple[str, ...] = ("tokens", "labels"), **changes: Any
) -> list[torch.Tensor]:
    """The keys' tensors of each step, put together from all ranks."""
    ranks = [islice(load(dataset, dp_rank=rank, dp_degree=degree, **changes), steps) for rank in range(degree)]
    return [torch.stack([torch.cat([part[key] for part in parts]) for key in keys]) for parts in zip(*ranks, strict=True)]


def test_same_batches_whatever_the_ranks_workers_and_start(dataset: TokenDataset) -> None:
    reference = global_batches(dataset, 30, 1)
    assert len(reference) == 30
    assert reference[0].shape == (2, BATCH, SEQ_LEN)
    assert reference[0].dtype == torch.int64
    for degree, workers, start in [(2, 0, 0), (4, 0, 0), (1, 0, 17), (1, 1, 0), (1, 2, 5), (2, 2, 29)]:
        batches = global_batches(dataset, 30 - start, degree, workers=workers, start_sample=start * BATCH)
        assert len(batches) == 30 - start
        assert all(map(torch.equal, batches, reference[start:])), (degree, workers, start)


def test_labels_are_the_next_tokens_and_every_sample_comes_once_an_epoch(dataset: TokenDataset) -> None:
    batches = torch.cat(global_batches(dataset, 25, 1), dim=1)  # two epochs
    assert torch.equal(batches[1], batches[0] + 1)
    firsts = batches[0, :, 0]
    for epoch in (firsts[:50], firsts[50:]):
        assert sorted(epoch.tolist()) == list(range(0, 50 * SEQ_LEN, SEQ_LEN))
    assert firsts[:50].tolist() != firsts[50:].tolist()
    other = torch.cat(global_batches(dataset, 25, 1, seed=8), dim=1)
    assert not torch.equal(other, batches)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_validation_counts_every_sample_once(tmp_path: Path, degree: int) -> None:
    dataset = make_dataset(tmp_path, 9 * SEQ_LEN + 1, "validation")
    batches = torch.cat(global_batches(dataset, 99, degree, once=True), dim=1)
    assert batches.shape == (2, 12, SEQ_LEN)  # nine samples, three to fill up
    assert sorted(batches[0, :9].flatten().tolist()) == list(range(9 * SEQ_LEN))
    assert torch.equal(batches[1, :9], batches[0, :9] + 1)
    assert bool((batches[1, 9:] == -100).all())
    assert len(list(load(dataset, once=True, limit=2))) == 2


def test_a_validation_of_a_few_batches_looks_at_the_whole_split(tmp_path: Path) -> None:
    """Documents lie in the order of their names: the first of them are not like the rest."""
    dataset = make_dataset(tmp_path, 400 * SEQ_LEN + 1, "validation")
    (batch,) = load(dataset, once=True, limit=1)
    firsts = batch["tokens"][:, 0] / SEQ_LEN
    assert firsts.min() < 200 < firsts.max()
    assert len(list(load(dataset, limit=4, start_sample=3 * BATCH))) == 4


def make_documents(folder: Path, rng: np.random.Generator, split: str = "train") -> tuple[TokenDataset, np.ndarray]:
    """A stream whose token at position p is p, of documents of all lengths over four shards; and where each token's one starts.

    Lengths from one token to several windows, some ending where a window does; one shard is one token.
    """
    starts: list[int] = []
    for shard in range(4):
        documents = []
        for length in rng.choice([1, 1, 2, 3, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 5 * SEQ_LEN + 2], 1 if shard == 2 else 12):
            length = 1 if shard == 2 else int(length)
            documents.append((np.arange(len(starts), len(starts) + length), 1))
            starts += [len(starts)] * length
        write_shard(folder / f"{split}-{shard:05d}.tokens", documents, vocab_size=100_000, tokenizer="t")
    return TokenDataset(folder, split), np.array(starts)


def slow_numbers(start_of: np.ndarray, row: torch.Tensor) -> tuple[list[int], list[int]]:
    """document_ids and positions of a row, token by token; a token's value is its position in the stream."""
    ids, positions = [0], [0]
    for before, token in zip(row.tolist(), row.tolist()[1:], strict=False):
        new = start_of[token] != start_of[before]
        ids.append(ids[-1] + new)
        positions.append(0 if new else positions[-1] + 1)
    return ids, positions


@pytest.mark.parametrize("seed", range(6))
def test_documents_are_numbered_within_their_window(tmp_path: Path, seed: int) -> None:
    dataset, start_of = make_documents(tmp_path, np.random.default_rng(seed))
    plain = list(load(dataset, limit=30))
    masked = list(load(dataset, limit=30, document_mask=True))
    several = cut = 0
    for without, batch in zip(plain, masked, strict=True):
        assert set(without) == {"tokens", "labels"}
        assert all(torch.equal(batch[key], without[key]) for key in without), "the mask changes tokens or labels"
        for key in ("document_ids", "positions"):
            assert (batch[key].shape, batch[key].dtype) == ((BATCH, SEQ_LEN), torch.int64)
        for row, ids, positions in zip(*(batch[key] for key in ("tokens", "document_ids", "positions")), strict=True):
            assert (ids.tolist(), positions.tolist()) == slow_numbers(start_of, row)
            several += int(ids[-1]) > 0
            cut += start_of[row[0]] != row[0]
    assert several
    assert cut


def test_documents_are_the_same_whatever_the_ranks_workers_and_start(tmp_path: Path) -> None:
    dataset, _ = make_documents(tmp_path, np.random.default_rng(7))
    keys = ("tokens", "labels", "document_ids", "positions")
    reference = global_batches(dataset, 12, 1, keys, document_mask=True)
    for degree, workers, start in [(2, 0, 0), (4, 0, 3), (1, 1, 5), (2, 2, 11)]:
        changes = {"workers": workers, "start_sample": start * BATCH, "document_mask": True}
        batches = global_batches(dataset, 12 - start, degree, keys, **changes)
        assert all(map(torch.equal, batches, reference[start:])), (degree, workers, start)


def test_samples_that_fill_up_a_validation_are_one_document(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 9 * SEQ_LEN + 1, "validation")
    last = list(load(dataset, once=True, document_mask=True))[-1]
    assert bool((last["labels"][1:] == -100).all())
    assert bool((last["document_ids"][1:] == 0).all())
    assert torch.equal(last["positions"][1:], torch.arange(SEQ_LEN).repeat(3, 1))


def test_no_random_state_is_moved(dataset: TokenDataset) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(load(dataset, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_data_and_unequal_ranks_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SEQ_LEN, "validation")
    with pytest.raises(ValueError, match=r"validation split holds 8 tokens.*seq_len \+ 1 = 9.*data\.validation_share"):
        load(dataset)
    with pytest.raises(ValueError, match="equal part of a batch of 4"):
        load(make_dataset(tmp_path, 500), dp_degree=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_by_sample(tmp_path: Path, workers: int) -> None:
    make_dataset(tmp_path, 300, vocab_size=300)
    shard = tmp_path / "train-00000.tokens"
    raw = bytearray(shard.read_bytes())
    raw[4096 : 4096 + 200] = b"\xff" * 200
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"(?s)train sample \d+ .*token 65535.*vocabulary of 300") as caught:
        list(load(TokenDataset(tmp_path, "train"), workers=workers, limit=20))
    if workers:
        assert "Traceback" in str(caught.value)
        assert "__getitem__" in str(caught.value)
        assert not forked_children()


def wait_for(condition: Any, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_leaving_ends_the_workers_without_a_collection(dataset: TokenDataset, capfd: pytest.CaptureFixture[str]) -> None:
    gc.disable()
    try:
        for _ in load(dataset, workers=2):
            assert len(forked_children()) == 2
            break
        assert not forked_children()
    finally:
        gc.enable()
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_dies_is_named(dataset: TokenDataset) -> None:
    batches = load(dataset, workers=2)
    next(batches)
    worker = forked_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    time.sleep(0.2)  # no signal's handler interrupts what training does
    with pytest.raises(WorkerDiedError, match=rf"of this rank's 2 workers .* [01] \(pid {worker.pid}, SIGKILL\) died"):
        list(islice(batches, 100))


def test_workers_outlive_signals_meant_for_the_job(dataset: TokenDataset) -> None:
    reference = global_batches(dataset, 30, 1)
    batches = load(dataset, workers=1)
    next(batches)
    (worker,) = forked_children()
    sender = multiprocessing.get_context("fork").Process(target=send_all, args=(worker.pid,), daemon=True)
    sender.start()
    sender.join(10)
    assert sender.exitcode == 0
    for expected in reference[1:]:
        assert torch.equal(next(batches)["tokens"], expected[0])
    assert worker.is_alive()
    worker.terminate()  # from the process that started it
    assert wait_for(lambda: not worker.is_alive())


def send_all(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)


def test_dataset_can_be_sent_to_a_process(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 99_000)
    batches = RankBatches(Samples({"data": Contiguous(dataset, SEQ_LEN)}, 1), 0, BATCH, BATCH, None)
    sent = pickle.dumps(batches)
    assert len(sent) < 25_000  # the paths and the mixture's slots, not the tokens
    assert torch.equal(pickle.loads(sent)[3]["tokens"], batches[3]["tokens"])
