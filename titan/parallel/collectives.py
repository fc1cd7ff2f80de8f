"""Two collectives over lists of parts, without gradients: collecting everyone's part, and sharing out a sum.

NCCL has both. On a CPU, gloo's reduce-scatter is an all-reduce of every part in turn, and its all-gather a ring; an all-to-all,
which sends the same bytes to where they belong, and an addition here took a fifth to a half of their time for the messages of
a small model. Terms are added in the order of the ranks, on every rank alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's part, all of one shape, in the order of the ranks."""
    degree = group.size()
    if part.device.type == "cpu":
        copies = part[None].expand(degree, *part.shape).contiguous()
        received = torch.empty_like(copies)
        dist.all_to_all_single(received, copies, group=group)
        return list(received)
    received = part.new_empty((degree * part.shape[0], *part.shape[1:]))  # this form torch.compile can trace
    dist.all_gather_into_tensor(received, part.contiguous(), group=group)
    return list(received.chunk(degree))


def reduce_scatter(parts: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sum over all ranks' lists: parts[r] goes to rank r. All of one shape."""
    if parts[0].device.type == "cpu":
        sent = torch.stack(parts)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received.sum(0)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(out, torch.cat(parts), group=group)
    return out
