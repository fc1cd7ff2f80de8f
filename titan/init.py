"""Initial weights as a pure function of (seed, parameter name, element index).

A rank makes only the elements that it holds, and whoever makes an element makes the same one: no world size, plan or
order of creation enters. The bits come from Philox-4x64-10, a counter-based generator: ten rounds of multiply and xor turn
(key, counter) into four random 64-bit words, so that any position can be computed alone.

    key = (seed, first 8 bytes of SHA-256(name))      counter = element index // 8

Each word gives two uniforms (its halves u, v), and Box and Muller's map makes two normals of them, so that one counter covers
eight elements:  sqrt(-2 ln u) cos(2 pi v),  sqrt(-2 ln u) sin(2 pi v).

The integers are equal on every device. The normals go through float64 logarithms, sines and cosines, so that the float32
weights are equal to the bit within one device type.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); Box and Muller (1958).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan.layout import Cuts, block

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
MASK32, MASK64 = 2**32 - 1, 2**64 - 1
PER_COUNTER = 8
# Counters per batch. On a CPU a batch stays on one thread and in cache, and being a multiple of 64 it has no scalar tail:
# vector and scalar logarithms may differ in the last bit. A GPU wants few, large kernels.
BATCH = {"cpu": 2048, "cuda": 2**19}


def init_weights(
    model: nn.Module,
    rule: Callable[[str], tuple[float, float]],
    seed: int,
    cuts: Cuts | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill every parameter in place, sharded or not, by the model's rule: name -> (mean, standard deviation).

    Names are the model's own, so the parameters of a part of a model get the values that they have in the whole; `cuts` says
    which part of a parameter is here. device: where values are computed, if not where the parameters are.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = rule(name)
            if std == 0:
                parameter.fill_(mean)
            else:
                here = block(parameter, (cuts or {}).get(name))
                fill_block(here.local, list(here.shape), list(here.offset), name, seed, mean, std, device)


def fill_block(
    part: Tensor,
    shape: list[int],
    offset: list[int],
    name: str,
    seed: int,
    mean: float,
    std: float,
    device: torch.device | None = None,
) -> None:
    """Fill the block at `offset` of a tensor of this shape with its elements of the normal stream of (seed, name)."""
    if part.numel() == 0:
        return
    key = (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    starts, width = _runs(part.shape, shape, offset)
    flat = part.view(-1) if part.is_contiguous() else torch.empty(part.numel(), dtype=part.dtype, device=part.device)
    _fill_runs(flat.view(-1, width), starts, key, mean, std, device or part.device)
    if not part.is_contiguous():
        part.copy_(flat.view(part.shape))


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x64-10 of the counters (c, 0, 0, 0): int64 [n] -> the four words as int64 bit patterns [n, 4]."""
    c0, c1, c2, c3 = counter, torch.zeros_like(counter), torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + WEYL[0]) & MASK64, (k1 + WEYL[1]) & MASK64
    return torch.stack((c0, c1, c2, c3), dim=-1)


def normals(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Eight standard normals per counter: int64 [n] -> float64 [n, 8]."""
    words = philox(counter, key)
    # Halves of a word, moved to the middle of their 2^-32 wide cell: never 0, so that the logarithm is finite.
    u = ((words >> 32 & MASK32).double() + 0.5) * 2.0**-32
    v = ((words & MASK32).double() + 0.5) * (2.0**-32 * 2 * math.pi)
    radius = torch.sqrt(-2 * torch.log(u))
    return torch.stack((radius * torch.cos(v), radius * torch.sin(v)), dim=-1).flatten(1)


def _fill_runs(
    out: Tensor, starts: Tensor, key: tuple[int, int], mean: float, std: float, device: torch.device
) -> None:
    """Row r of out [rows, width] gets elements starts[r] .. starts[r] + width of the stream, in batches of bounded size."""
    rows, width = out.shape
    batch = BATCH[device.type]
    span = (batch - 1) * PER_COUNTER  # longest stretch that one batch covers wherever it starts
    for column in range(0, width, span):
        stretch = min(span, width - column)
        per_row = min(batch, (stretch - 1) // PER_COUNTER + 2)
        for row in range(0, rows, batch // per_row):
            first = starts[row : row + batch // per_row].to(device) + column
            counters = (first // PER_COUNTER)[:, None] + torch.arange(per_row, device=device)
            padded = torch.zeros(batch, dtype=torch.int64, device=device)
            padded[: counters.numel()] = counters.flatten()
            values = normals(padded, key)[: counters.numel()].view(len(first), -1)
            lanes = (first % PER_COUNTER)[:, None] + torch.arange(stretch, device=device)
            out[row : row + len(first), column : column + stretch] = values.gather(1, lanes) * std + mean


def _runs(local: torch.Size, whole: list[int], offset: list[int]) -> tuple[Tensor, int]:
    """A block of a row-major array as runs of consecutive elements: the runs' first flat indices (int64) and their length."""
    dims, width = len(local), 1
    while dims > 0:  # dimensions held in full join the run; the first that is cut ends it
        width *= local[dims - 1]
        dims -= 1
        if local[dims] != whole[dims]:
            break
    starts = torch.zeros(1, dtype=torch.int64)
    for d in range(len(local)):
        index = offset[d] + (torch.arange(local[d]) if d < dims else torch.zeros(1, dtype=torch.int64))
        starts = (starts[:, None] * whole[d] + index).flatten()
    return starts, width


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned 128-bit product of a constant and int64 bit patterns, by 32-bit halves."""
    a_high, a_low = a >> 32, a & MASK32
    b_high, b_low = b >> 32 & MASK32, b & MASK32
    carry = (a_low * b_low) >> 32 & MASK32
    middle = a_high * b_low + carry
    carry = (a_low * b_high + (middle & MASK32)) >> 32 & MASK32
    return a_high * b_high + (middle >> 32 & MASK32) + carry, b * _signed(a)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word
