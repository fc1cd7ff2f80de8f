"""The order of the samples, as a function: no index is stored, no state is kept.

Global sample i of a run is read from window `Sampler.window(i)` of the data, a pure function of (seed, data fingerprint, i).
Each epoch visits every window once, in an order of its own. The position in the data is thus one integer, and any
rank or worker can find any sample by itself, whatever their number.

A shuffle that needs no memory is a keyed permutation of [0, n), which is what a block cipher is. Luby and Rackoff (1988, "How
to construct pseudorandom permutations from pseudorandom functions") showed how to build one from a function F that
need not be invertible: split x into halves (L, R) of b bits and repeat

    (L, R) <- (R, L xor F_round(R))

Each round can be undone, so the whole is a bijection of [0, 2**2b), and a few rounds with good F mix it well (we take 8).
For n that is no such power, Black and Rogaway (2002, "Ciphers with arbitrary finite domains") walk the cycle: apply the
permutation again until the result is below n. That stays a bijection of [0, n), because following a cycle from a
number below n leads to the next number below n, and different starts lead to different ones. With the smallest
2**2b >= n, less than 4n, it takes below four turns on average.
"""

from __future__ import annotations

import hashlib
import struct

ROUNDS = 8
KEY_BYTES = 8 * ROUNDS
MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """Spread 64 bits: every bit of x changes about half of the result's (multiply, shift and xor, as splitmix64 ends)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permute(i: int, n: int, key: bytes) -> int:
    """Where the permutation of [0, n) with this key (64 bytes, a word a round) takes i, for 0 <= i < n <= 2**64."""
    if not 0 <= i < n:
        raise IndexError(f"{i} is not in [0, {n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    words = struct.unpack(f"<{ROUNDS}Q", key)
    while True:
        left, right = i >> half, i & low
        for word in words:
            left, right = right, left ^ (mix(right ^ word) & low)
        i = left << half | right
        if i < n:
            return i


class Sampler:
    """The shuffled order of `samples_per_epoch` windows, epoch after epoch without end."""

    def __init__(self, seed: int, fingerprint: str, samples_per_epoch: int) -> None:
        self.seed, self.fingerprint, self.samples_per_epoch = seed, fingerprint, samples_per_epoch

    def window(self, i: int) -> int:
        """The window, in [0, samples_per_epoch), that global sample i reads."""
        epoch, position = divmod(i, self.samples_per_epoch)
        name = f"{self.seed} {self.fingerprint} {epoch}".encode()
        return permute(position, self.samples_per_epoch, hashlib.blake2b(name, digest_size=KEY_BYTES).digest())
