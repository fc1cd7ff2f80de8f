"""Mixtures: the share of each source at every point of a run, which sample comes when, and the same batches for any ranks."""

from __future__ import annotations

import pickle
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titan.cli import main
from titan.config import Data, Source, Training
from titan.data.dataset import TokenDataset
from titan.data.loader import loader
from titan.data.mixture import PERIOD, Mixture, Samples, Stage, deal, parts
from titan.data.shard_writer import write_shard
from titan.data.splits import open_splits
from titan.data.tokenizer import BytesTokenizer
from titan.data.windows import Contiguous
from titan.toml import load

SEQ_LEN = 8


def random_weights(draw: random.Random, count: int) -> tuple[float, ...]:
    return (*(draw.choice([0.0, 1e-7, 1.0, draw.random(), 100 * draw.random()]) for _ in range(count - 1)), 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_kept_at_every_point(seed: int) -> None:
    """Slots add up, tiny weights are not lost, and no prefix is a whole sample off."""
    draw = random.Random(seed)
    weights = random_weights(draw, draw.randint(1, 30))
    numbers = parts(weights)
    assert sum(numbers) == PERIOD
    assert all((number > 0) == (weight > 0) for number, weight in zip(numbers, weights, strict=True))
    for number, weight in zip(numbers, weights, strict=True):
        assert abs(number - weight / sum(weights) * PERIOD) <= len(weights)
    slots = deal(numbers)
    done = np.cumsum(slots[:, None] == np.arange(len(numbers)), axis=0)
    due = np.arange(1, PERIOD + 1)[:, None] * np.array(numbers) / PERIOD
    assert np.abs(done - due).max() < 1


@pytest.mark.parametrize("seed", range(8))
def test_each_source_is_counted_through_all_stages(seed: int) -> None:
    """Its samples come in order, each once; how many there were is known at any point without counting."""
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    firsts = sorted(draw.sample(range(1, 15_000), draw.randint(0, 3)))
    mixture = Mixture([Stage(first, random_weights(draw, count)) for first in [0, *firsts]])
    done = [0] * count
    for i in range(20_000):
        if i in firsts or i % 997 == 0:
            assert mixture.done(i) == done
        source, number = mixture.place(i)
        assert number == done[source]
        done[source] += 1
    assert mixture.done(20_000) == done


def test_the_end_of_a_long_run_costs_no_more_than_its_beginning() -> None:
    """Ten billion samples: constant time, and as many bytes as for ten thousand."""
    mixture = Mixture([Stage(0, (1, 2, 3, 4, 5, 6, 7, 8)), Stage(5 * 10**9, (8, 7, 6, 5, 4, 3, 2, 1))])
    began = time.perf_counter()
    for i in range(10**10, 10**10 + 20_000):
        mixture.place(i)
    assert time.perf_counter() - began < 2
    assert sum(mixture.done(10**10)) == 10**10
    assert len(pickle.dumps(mixture)) < 2**20


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Three sources of very different size, their tokens apart."""
    found = {}
    for name, first, tokens in (("large", 0, 40_000), ("small", 50_000, 300), ("tiny", 60_000, 20)):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            file = tmp_path / name / f"{split}-00000.tokens"
            documents = [(part, 1) for part in np.array_split(np.arange(first, first + tokens), tokens // 10)]
            write_shard(file, documents, vocab_size=65_000, tokenizer=BytesTokenizer.fingerprint)
        found[name] = tmp_path / name
    return found


def mixed(sources: dict[str, Path], seed: int = 3) -> Samples:
    windows = {name: Contiguous(TokenDataset(path, "train"), SEQ_LEN) for name, path in sources.items()}
    return Samples(windows, seed, Mixture([Stage(0, (0.6, 0.3, 0.1)), Stage(2400, (0.2, 0.2, 0.6))]))


def test_the_same_batches_for_any_ranks_workers_and_start(sources: dict[str, Path]) -> None:
    """300 global batches of a mixture, token for token, at five degrees; and after a start with other batches and workers."""

    def tokens(batch: int, degree: int, workers: int, start: int, limit: int) -> np.ndarray:
        samples = mixed(sources)
        same: dict[str, Any] = {"global_batch_size": batch, "start_sample": start, "workers": workers}
        ranks = [loader(samples, dp_rank=rank, dp_degree=degree, limit=limit, **same) for rank in range(degree)]
        steps = [np.concatenate([part["tokens"].numpy() for part in step]) for step in zip(*ranks, strict=True)]
        return np.concatenate(steps)

    reference = tokens(24, 1, 0, 0, 300)
    assert len(reference) == 300 * 24
    for degree in (2, 3, 4, 8):
        assert (tokens(24, degree, 0, 0, 300) == reference).all()
    assert (tokens(24, 2, 2, 0, 40) == reference[: 40 * 24]).all()
    assert (tokens(12, 4, 1, 100 * 24, 60) == reference[100 * 24 : 130 * 24]).all()
    large = reference.max(axis=1) < 50_000
    assert abs(large[:2400].mean() - 0.6) < 1 / 2400 + 0.5 / PERIOD
    assert abs(large[2400:].mean() - 0.2) < 1 / 2400 + 0.5 / PERIOD
    tiny = reference[reference.min(axis=1) >= 60_000][:, 0] - 60_000
    assert sorted(tiny[:2].tolist()) == [0, SEQ_LEN], "an epoch of two windows"
    assert sorted(tiny[2:4].tolist()) == [0, SEQ_LEN], "and the next"


def test_a_run_opens_its_sources(sources: dict[str, Path]) -> None:
    """Weights and stages from the config, counters by name, all held-out samples once, limits that are kept."""
    listed = [Source(name, str(path), weight=w, later_weights=[v]) for (name, path), w, v in
              zip(sources.items(), (6, 3, 1), (2, 2, 6), strict=True)]  # fmt: skip
    data = Data(sources=listed, stages=[100])
    training = Training(steps=300, seq_len=SEQ_LEN, global_batch_size=24, seed=3)
    splits = open_splits(data, BytesTokenizer(), training, validate=True)
    same = mixed(sources)
    for i in range(0, 7200, 77):
        for name, array in splits.train.read(i).items():
            assert (array == same.read(i)[name]).all()
    counters = splits.train.counters(2400)
    assert counters["data_tokens/large"] == pytest.approx(0.6 * 2400 * SEQ_LEN, abs=1.5 * SEQ_LEN)
    assert counters["data_epochs/tiny"] == pytest.approx(240 / 2, abs=1)
    assert splits.validation is not None
    assert splits.tokens_per_byte == pytest.approx(10, rel=0.1)
    batches = loader(splits.validation, global_batch_size=24, dp_rank=0, dp_degree=1, start_sample=0, workers=0, once=True)
    firsts = np.concatenate([batch["tokens"][:, 0][batch["labels"][:, 0] != -100] for batch in batches])
    assert len(firsts) == len(set(firsts.tolist())) == splits.validation.count == 4999 + 37 + 2
    listed[2] = Source("tiny", str(sources["tiny"]), weight=1, later_weights=[6], max_epochs=1000)
    with pytest.raises(ValueError, match=r"in 300 steps tiny would be read 15\d\d\.\d\d times, and its max_epochs is 1000"):
        open_splits(data, BytesTokenizer(), training, validate=False)


TWO = """
[data]
stages = [5]
[[data.sources]]
name = "a"
path = "builtin:topics"
later_weights = [2]
[[data.sources]]
name = "b"
path = "builtin:stdlib"
weight = 0.5
later_weights = [0]
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[5]", "[5, 5]", "data.stages: [5, 5] do not rise"),
        ("[5]", "[5, 9]", "data.sources: a has 1 later_weights for 2 data.stages; write one for each"),
        ("[2]", "[0]", "data.sources: all weights of stage 2 are 0"),
        ('"b"', '"a"', "data.sources: two sources are named 'a'"),
        ('"b"', '"a b"', "data.sources.name: expected a name of letters, digits, - and _, not \"a b\""),
        ("stdlib", "stdlb", "data.sources: no built-in text 'builtin:stdlb'; did you mean 'builtin:stdlib'?"),
        ("weight = 0.5", "wieght = 0.5", "mix.toml:11: data.sources.wieght: unknown key; did you mean 'weight'?"),
        ("weight = 0.5", "weight = -1", "mix.toml:11: data.sources.weight: expected a number, 0 or more, not -1"),
        ("[data]", '[data]\npath = "."', "data.sources: data.path is set, too"),
        ("[data]", '[data]\ntokenizer = "train:500"', "data.tokenizer: each source would train a tokenizer of its own"),
    ],
)
def test_a_wrong_mixture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    file = tmp_path / "mix.toml"
    file.write_text(TWO)
    assert main(["config", str(file)]) == 0
    printed = tmp_path / "again.toml"
    printed.write_text(capsys.readouterr().out)
    assert load(printed).data == load(file).data, "what is printed is the same config"
    given = '--data.sources=[{name = "c", path = "builtin:topics", weight = 3}]'
    assert load(file, [given]).data.sources == [Source("c", "builtin:topics", weight=3.0)]
    file.write_text(TWO.replace(before, after))
    assert main(["config", str(file)]) == 2
    assert said in capsys.readouterr().err
