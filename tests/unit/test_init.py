"""Initial weights: NumPy's Philox, normal in distribution, and the same elements whoever makes them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from titan.init import fill_block, normals, philox


def test_the_integers_are_numpys() -> None:
    for _ in range(50):
        key, counter = (random.getrandbits(64), random.getrandbits(64)), random.getrandbits(62) + 1
        theirs = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array([counter - 1, 0, 0, 0], dtype=np.uint64))
        ours = philox(torch.tensor([counter, counter + 1]), key).numpy().view(np.uint64).ravel()
        assert (ours == theirs.random_raw(8)).all(), (key, counter)


def test_normals_are_normal() -> None:
    values = torch.cat([normals(torch.arange(i, i + 2048), (7, 9)).flatten() for i in range(0, 2**17, 2048)])
    n = len(values)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * (variance / n) ** 0.5
    pairs = values.view(-1, 8)
    correlation = torch.corrcoef(pairs.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / len(pairs) ** 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_any_block_is_the_same_part_of_the_whole(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = random.Random(threads)
        for _ in range(20):
            shape = [rng.randrange(1, limit) for limit in ([5000], [90, 1100], [9, 20, 30])[rng.randrange(3)]]
            whole = torch.empty(shape)
            fill_block(whole, shape, [0] * len(shape), "some.weight", 5, 0.5, 2.0)
            offset = [rng.randrange(n) for n in shape]
            size = [rng.randrange(1, n - o + 1) for n, o in zip(shape, offset, strict=True)]
            block = torch.empty(size)
            fill_block(block, shape, offset, "some.weight", 5, 0.5, 2.0)
            expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            assert torch.equal(block, expected), (shape, offset, size)
    finally:
        torch.set_num_threads(before)


def test_name_and_seed_choose_the_stream() -> None:
    streams = []
    for seed, name in ((1, "a"), (2, "a"), (1, "b")):
        streams.append(torch.empty(4096))
        fill_block(streams[-1], [4096], [0], name, seed, 0.0, 1.0)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((streams[i] * streams[j]).mean())) < 5 / 64
