"""Attention by products of blocks is attention: against float64, as near as PyTorch's fused operation comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan import toml
from titan.attention_blocks import BlockAttention, fused_is_slow
from titan.build import cut
from titan.config import Config
from titan.models.llama3.model import AttentionCore
from titan.parallel.mesh import Mesh

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def inputs(batch: int, seq: int, heads: int, kv_heads: int, width: int, spread: float) -> list[Tensor]:
    """q, k, v and the gradient of what comes out, bfloat16."""
    torch.manual_seed(seq + heads)
    shapes = [(batch, seq, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [(torch.randn(shape) * spread).to(torch.bfloat16) for shape in shapes]


def through(core: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = core(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("spread", [0.5, 1.5])
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "kv_heads", "width"),
    [(2, 256, 3, 3, 64), (1, 384, 4, 2, 16), (2, 128, 2, 1, 32), (1, 2048, 2, 2, 32)],
)
def test_blocks_are_about_as_exact_as_the_fused_operation(
    batch: int, seq: int, heads: int, kv_heads: int, width: int, spread: float
) -> None:
    given = inputs(batch, seq, heads, kv_heads, width, spread)
    wanted = through(AttentionCore(), *(x.double() for x in given))
    fused = through(AttentionCore(), *given)
    blocks = through(BlockAttention(Refused()).train(), *given)
    for name, truth, a, b in zip(("out", "dq", "dk", "dv"), wanted, fused, blocks, strict=True):
        off_fused, off_blocks = ((x.double() - truth).norm() / truth.norm() for x in (a, b))
        assert b.dtype == torch.bfloat16
        assert off_blocks < 2 * off_fused, f"{name}: {off_blocks:.1e} where the fused operation is off by {off_fused:.1e}"
        assert off_blocks < 6e-3, name


class Refused(torch.nn.Module):
    def forward(self, *_: Tensor, **__: Tensor) -> Tensor:
        raise AssertionError("not the model's own")


class Plain(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        return torch.full_like(q, 7)


def test_what_does_not_fit_is_left_to_the_model_s_own() -> None:
    q, k, v, _ = inputs(1, 128, 2, 2, 16, 1)
    core = BlockAttention(Plain())
    seven = torch.full_like(q, 7)
    assert not torch.equal(core(q, k, v), seven)
    assert torch.equal(core(q, k, v, document_ids=torch.zeros(1, 128, dtype=torch.int64)), seven)
    assert torch.equal(core(q[:, :100], k[:, :100], v[:, :100]), seven[:, :100]), "no whole blocks"
    assert torch.equal(core(q[:, :1], k, v), seven[:, :1]), "a token with kept keys"
    many = torch.empty(2048, 256, 1, 2, dtype=torch.bfloat16)
    assert torch.equal(core(many, many, many), torch.full_like(many, 7)), "too many scores"
    assert torch.equal(core.eval()(q, k, v), seven)


@pytest.mark.parametrize(
    ("words", "used"),
    [
        ("--compile.enable=true --precision.param=bfloat16", True),
        ("--compile.enable=true --precision.param=bfloat16 --recompute.mode=full", True),
        ("--compile.enable=true --precision.param=bfloat16 --recompute.mode=selective", False),  # which names the operation
        ("--compile.enable=true --precision.param=bfloat16 --data.document_mask=true", False),
        ("--compile.enable=true --compile.backend=aot_eager --precision.param=bfloat16", False),
        ("--compile.enable=true", False),
        ("--precision.param=bfloat16", False),
    ],
)
def test_they_are_used_where_they_are_faster(words: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert holds_blocks(toml.load(DEBUG, words.split())) == used
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not holds_blocks(toml.load(DEBUG, words.split()))
    assert not fused_is_slow(torch.device("cuda"), torch.bfloat16)


def holds_blocks(config: Config) -> bool:
    model = cut(config, torch.device("cpu"), Mesh())[1].model
    return any(isinstance(module, BlockAttention) for module in model.modules())


def test_a_compiler_takes_them_whole() -> None:
    """In one piece, forward and backward: what stands between the products is what it is for."""
    given = inputs(1, 256, 2, 2, 16, 1)
    core = BlockAttention(Refused())
    compiled = torch.compile(core, backend="aot_eager", fullgraph=True)
    for a, b in zip(through(compiled, *given), through(core, *given), strict=True):
        assert F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0) > 0.9999
    torch._dynamo.reset()
