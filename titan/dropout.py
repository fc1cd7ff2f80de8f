"""Dropout whose mask is a function of where an element stands, so that it is the same under every parallel plan.

Ordinary dropout draws from the device's random state. Two ranks that share a sequence would draw what one rank would not,
another micro batch size would draw in another order, and what is computed again in the backward pass would be dropped anew
unless the state were put back. Here nothing is drawn. An element is dropped, or not, by a hash of

    (seed, step, module name, row in the step's batch, token's index in the sequence, channel)

so whoever holds the element, whenever it is computed, decides alike: over data, context and sequence shards, for every
micro batch size, under a pipeline and in recomputation. No state has to be saved or restored, and a resumed run goes on alike.

The hash is SplitMix64, a counter g = 2^64 / golden ratio times n behind a mixer of two multiplications, in its splittable form:

    mix(z) = z3 ^ (z3 >> 31)    with  z3 = (z2 ^ (z2 >> 27)) * b,  z2 = (z ^ (z >> 30)) * a      on 64-bit words
    key(token)   = mix(mix(mix(seed + g (step + 1)) + g (row + 1)) + g (index + 1))              once a micro batch
    word(n)      = mix(key(token) + hash(module name) + g (n + 1))                               a 64-bit word for 4 channels

A channel is dropped where its 16 bits of the word are below 65536 p; what stays is divided by the share that stays, p rounded
to 2^-16. It is whole-number arithmetic, equal on every device. A CPU core takes about 4 ns an element, and 8 or 9 to draw
in its place; on a GPU it is a dozen passes over a quarter of the elements, which torch.compile makes one.

Sources: Srivastava et al., "Dropout" (JMLR 2014); Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
(OOPSLA 2014); for a counter in place of a state, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # signed 64-bit integers wrap around as unsigned ones do
A, B = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
LANES = 4  # channels to a word
LEVELS = 2**16


class Noise:
    """What all dropouts of a model, or of a pipeline's stages on a rank, share: a key for each token of the micro batch.

    rank, degree: this rank among those that hold equal, consecutive parts of each sequence between the blocks (tensor
    parallelism). A dropout may see a whole local sequence or this rank's part of it.
    """

    def __init__(self, seed: int, rank: int = 0, degree: int = 1) -> None:
        self.seed = seed
        self.rank = rank
        self.degree = degree
        self.dropouts: list[Dropout] = []
        self.keys: Tensor | None = None

    def at(self, step: int, rows: Tensor, indices: Tensor) -> AbstractContextManager[None]:
        """A context for the forward pass of one micro batch.

        step: the optimizer step. rows: int64 [batch], each sample's number in the step's whole batch. indices: int64 [seq],
        each local token's index in its whole sequence (not in its document).
        """
        if not self.dropouts:
            return nullcontext()
        start = _mixed(self.seed + torch.tensor(step + 1) * GAMMA).to(rows.device, non_blocking=True)
        keys = _mixed(_mixed(start + (rows + 1) * GAMMA)[:, None] + (indices.to(rows.device) + 1) * GAMMA)
        for dropout in self.dropouts:
            dropout.name_hash = dropout.name_hash.to(keys.device)
        return self.using(keys)

    @contextmanager
    def using(self, keys: Tensor | None) -> Iterator[None]:
        """A context with these keys: what computes a part again later keeps `keys` and sets them for that long."""
        before, self.keys = self.keys, keys
        try:
            yield
        finally:
            self.keys = before

    def part(self, batch: int, seq: int) -> Tensor:
        """Keys, int64 [batch, seq], of a dropout's input of this shape."""
        keys = self.keys
        if keys is None:
            raise RuntimeError("dropout in training mode needs to know its micro batch: run the model inside Noise.at(...)")
        if keys.shape == (batch, seq * self.degree):
            return keys[:, self.rank * seq : (self.rank + 1) * seq]
        if keys.shape != (batch, seq):
            raise RuntimeError(f"dropout on [{batch}, {seq}] tokens, but the micro batch at hand is {list(keys.shape)}")
        return keys


class Dropout(nn.Module):
    """nn.Dropout by position. Input and output: [batch, seq, channels]. In eval mode the identity."""

    def __init__(self, p: float, name: str, noise: Noise) -> None:
        super().__init__()
        self.p = p
        self.noise = noise
        # A tensor: as a number it would be a constant of the compiled block, and each block compiled anew.
        self.name_hash = torch.tensor(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True))
        noise.dropouts.append(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        levels = min(round(self.p * LEVELS), LEVELS - 1)
        scale = 0.0 if self.p == 1 else LEVELS / (LEVELS - levels)
        keys = self.noise.part(x.shape[0], x.shape[1]) + self.name_hash
        return x * scale * _kept(keys, x.shape[2], levels)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def replace_dropouts(model: nn.Module, noise: Noise) -> None:
    """Put a Dropout in the place, and under the name, of each nn.Dropout with p > 0.

    Names are taken from `model`, so that a part of a model, its rooms emptied, drops what the whole one drops.
    Raises ValueError for the kinds of dropout that drop something else than single channels of the stream.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            if type(module) is not nn.Dropout:
                raise ValueError(f"{name} is {type(module).__name__}; only nn.Dropout is the same under every plan: use that")
            model.set_submodule(name, Dropout(module.p, name, noise).train(module.training))


def _kept(keys: Tensor, channels: int, levels: int) -> Tensor:
    """Which elements stay: keys int64 [batch, seq] -> bool [batch, seq, channels]; a share levels / 2^16 does not."""
    counter = torch.arange(1, 1 + -(-channels // LANES), device=keys.device) * GAMMA
    words = _mixed(keys[..., None] + counter)
    return (words.view(torch.int16) >= levels - LEVELS // 2)[..., :channels]


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's mixer: int64 bit patterns of any shape. Shifts are made unsigned by a mask."""
    z = (z ^ z >> 30 & 2**34 - 1) * A
    z = (z ^ z >> 27 & 2**37 - 1) * B
    return z ^ z >> 31 & 2**33 - 1
