from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from titan.data.sampler import KEY_BYTES, Sampler, permute


def test_permutations_are_bijections() -> None:
    rng = random.Random(0)
    for n in [1, 2, 3, 4, 5, 16, 17, 4096, 4097, *(rng.randint(1, 5000) for _ in range(20))]:
        key = rng.randbytes(KEY_BYTES)
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n)), (n, key)


def test_every_sample_once_an_epoch_in_another_order() -> None:
    n = 300
    orders = set()
    for seed, fingerprint in [(1, "a"), (2, "a"), (1, "b")]:
        sampler = Sampler(seed, fingerprint, n)
        for epoch in range(3):
            order = tuple(sampler.window(i) for i in range(epoch * n, (epoch + 1) * n))
            assert sorted(order) == list(range(n))
            orders.add(order)
    assert len(orders) == 9
    assert Sampler(1, "a", n).window(12345) == Sampler(1, "a", n).window(12345)


def test_order_is_pinned() -> None:
    """A run that resumes under a newer titan reads on where it was: the function may never change."""
    sampler = Sampler(1, "fingerprint", 1000)
    assert [sampler.window(i) for i in (0, 1, 2, 999, 1000, 10**12)] == [211, 64, 320, 49, 636, 430]


def test_each_window_is_as_likely_at_each_place() -> None:
    n, trials = 10, 4000
    counts = Counter((i, permute(i, n, random.Random(seed).randbytes(KEY_BYTES))) for seed in range(trials) for i in (0, 1, 9))
    for place in (0, 1, 9):
        chi_square = sum((counts[place, window] - trials / n) ** 2 / (trials / n) for window in range(n))
        assert chi_square < 40, (place, chi_square)  # 9 degrees of freedom: exceeded once in 10**5


def test_neighbours_are_not_kept_together() -> None:
    n = 100_003
    key = random.Random(1).randbytes(KEY_BYTES)
    images = [permute(i, n, key) for i in range(2001)]
    mean_step = sum(abs(a - b) for a, b in pairwise(images)) / 2000
    assert mean_step == pytest.approx(n / 3, rel=0.05)


def test_large_and_out_of_range() -> None:
    key = bytes(KEY_BYTES)
    assert 0 <= permute(10**15, 10**15 + 3, key) < 10**15 + 3
    assert 0 <= permute(2**64 - 1, 2**64, key) < 2**64
    for i in (-1, 5):
        with pytest.raises(IndexError):
            permute(i, 5, key)
