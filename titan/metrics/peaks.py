"""What the hardware could reach: the denominator of MFU.

A known GPU counts with its vendor's figure for dense bfloat16 matrix products, without sparsity, whatever the training
computes in. Vendors print the figure with 2:4 sparsity large and this one, half of it, small. For a CPU, or a GPU that the
table does not know, no such figure can be trusted, and the peak is measured: every rank multiplies square matrices in the
format that the model computes in, all ranks at once, with the threads that they train with.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass

import torch

from titan.ranks import Ranks, total

# A device's name -> (dense bfloat16 peak in TFLOP/s, who says so). The entry with the most words that are all in a name counts.
PEAKS = {
    "A10": (125, "NVIDIA A10 data sheet"),
    "A30": (165, "NVIDIA A30 data sheet"),
    "A40": (149.7, "NVIDIA A40 data sheet"),
    "RTX A6000": (154.8, "NVIDIA GA102 whitepaper, appendix A"),
    "A100": (312, "NVIDIA A100 data sheet"),
    "L4": (121, "NVIDIA L4 data sheet, half of the sparse 242"),
    "L40": (181, "NVIDIA L40 data sheet"),
    "L40S": (362, "NVIDIA L40S data sheet"),
    "RTX 3090": (71, "NVIDIA GA102 whitepaper, appendix A, float32 accumulate"),
    "RTX 4090": (165.2, "NVIDIA Ada whitepaper, appendix A, float32 accumulate"),
    "RTX 5090": (209.5, "NVIDIA RTX Blackwell whitepaper, appendix A, float32 accumulate"),
    "H100": (989, "NVIDIA H100 SXM data sheet, half of the sparse 1,979"),
    "H100 PCIe": (756, "NVIDIA H100 PCIe data sheet, half of the sparse 1,513"),
    "H100 NVL": (835, "NVIDIA H100 NVL data sheet, half of the sparse 1,671"),
    "H200": (989, "NVIDIA H200 SXM data sheet, half of the sparse 1,979"),
    "H200 NVL": (835, "NVIDIA H200 NVL data sheet, half of the sparse 1,671"),
    "GH200": (989, "NVIDIA GH200 data sheet, half of the sparse 1,979"),
    "B200": (2250, "NVIDIA HGX B200 data sheet, half of the sparse 4,500"),
    "GB200": (2500, "NVIDIA GB200 NVL72 data sheet, half of the sparse 5,000"),
    "MI250": (181.05, "AMD Instinct MI250 data sheet, half of the 362.1 of its two dies"),
    "MI250X": (191.5, "AMD Instinct MI250X data sheet, half of the 383 of its two dies"),
    "MI300A": (980.6, "AMD Instinct MI300A data sheet"),
    "MI300X": (1307.4, "AMD Instinct MI300X data sheet"),
    "MI325X": (1307.4, "AMD Instinct MI325X data sheet"),
}
# A part of a GPU, or a slower one of the same name.
OTHERS = {"MIG", "Laptop", "Max-Q", "D"}
ROUNDS, ROUND_SECONDS = 5, 0.06


@dataclass(frozen=True)
class Peak:
    """What all ranks could reach together, in FLOP/s, and how that is known."""

    flops: float
    source: str


def find_peak(ranks: Ranks, dtype: torch.dtype) -> Peak:
    """The sum of the ranks' peaks, by the table or measured in `dtype`. Every rank takes part; it takes half a second."""
    cuda = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if cuda else "CPU"
    known = data_sheet(name)
    (measuring,) = total(ranks, known is None)  # also what makes them begin together
    mine = measured_flops(ranks.device, dtype) if known is None else known[0]
    (flops,) = total(ranks, mine)
    if known is not None and not measuring:
        return Peak(flops, f"bfloat16, dense: {known[1]}")
    why = f"; no data sheet figure known for {name}" if cuda else ""
    return Peak(flops, f"measured: matrix products in {str(dtype).removeprefix('torch.')}, all ranks at once{why}")


def data_sheet(name: str) -> tuple[float, str] | None:
    """A GPU's peak in FLOP/s and its source, by the name that the driver gives it; None where the table does not know it."""
    words = set(re.split(r"[\s/-]+", name)) | set(name.split())
    fits = [key for key in PEAKS if set(key.split()) <= words]
    if not fits or words & OTHERS:
        return None
    teraflops, source = PEAKS[max(fits, key=lambda key: (len(key.split()), len(key)))]
    return teraflops * 1e12, source


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, of a size that takes some milliseconds: the best of a few rounds' medians.

    A median, since a product that runs while another rank rests is not what training meets; the best round, since others may
    use the machine.
    """
    size = 512
    while (seconds := min(_product_seconds(device, dtype, size, 2))) < 4e-3 and size < 8192:
        size *= 2
    count = max(3, int(ROUND_SECONDS / seconds))
    rounds = 1 if seconds > ROUND_SECONDS else ROUNDS
    best = min(statistics.median(_product_seconds(device, dtype, size, count)) for _ in range(rounds))
    return 2 * size**3 / best


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int, count: int) -> list[float]:
    """Seconds that each of `count` products took."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds
