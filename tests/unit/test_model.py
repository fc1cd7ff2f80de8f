"""Llama 3: published sizes, rotary scaling, seams, documents."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from titan.models.llama3.config import SIZES, Config
from titan.models.llama3.model import Rotation, Transformer, rope_tables
from titan.models.llama3.sharding import sharding
from titan.sharding import matching

COUNTS = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}


def make(**fields: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Config(**{"n_layers": 3, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, **fields}))  # type: ignore[arg-type]
    model.init_weights()
    return model


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes(size: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]


def test_the_summed_loss_is_the_cross_entropy_of_the_logits_without_ignored_labels() -> None:
    model = make()
    tokens, labels = torch.randint(512, (2, 33)), torch.randint(512, (2, 33))
    labels[0, :7] = -100
    chosen = model(tokens).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, labels=labels), -chosen[labels != -100].sum())


def test_attention_is_causal_and_stays_inside_a_document() -> None:
    model = make()
    tokens = torch.randint(512, (1, 24))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 512
    torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(tokens)[:, 12:], model(changed)[:, 12:])

    documents = torch.tensor([[0] * 10 + [1] * 14])
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    together = model(tokens, document_ids=documents, positions=positions)
    apart = torch.cat((model(tokens[:, :10]), model(tokens[:, 10:])), dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_grouped_heads_are_repeated_heads() -> None:
    few, many = make(n_kv_heads=2), make(n_kv_heads=4)
    weights = few.state_dict()
    for name in list(weights):
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            weights[name] = weights[name].view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(weights)
    tokens = torch.randint(512, (2, 16))
    torch.testing.assert_close(few(tokens), many(tokens), rtol=1e-4, atol=1e-5)


def test_a_model_is_its_parts() -> None:
    """A pipeline stage is the same class with rooms left empty, also where the embedding is tied."""
    for tied in (False, True):
        whole, first, last = (make(tied_embeddings=tied) for _ in range(3))
        first.load_state_dict(whole.state_dict())
        last.load_state_dict(whole.state_dict())
        first.norm = first.head = None
        first.layers = nn.ModuleDict({"0": first.layers["0"]})
        last.layers = nn.ModuleDict({"1": last.layers["1"], "2": last.layers["2"]})
        if not tied:
            last.embedding = None
        tokens, labels = torch.randint(512, (2, 16)), torch.randint(512, (2, 16))
        torch.testing.assert_close(last(first(tokens), labels=labels), whole(tokens, labels=labels))


def test_rotation_depends_on_distance_alone() -> None:
    config = SIZES["8b"]
    q, k = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 1, 128)

    def score(i: int, j: int) -> float:
        at = [rope_tables(torch.tensor([p]), config) for p in (i, j)]
        rotate = Rotation()
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    for _ in range(5):
        distance, start = random.randrange(50), random.randrange(1000)
        assert score(start + distance, start) == pytest.approx(score(distance, 0), abs=2e-3)


def test_rope_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    scaled, plain = SIZES["8b"], Config(4096, 32, 32, 8, 14336, 128256)
    (_, sin), (_, base) = (rope_tables(torch.tensor([1]), c) for c in (scaled, plain))
    ratio = (base.asin() / sin.asin()).flatten()
    waves = 2 * math.pi * plain.rope_theta ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(ratio[waves < 8192 / 4], torch.ones(1), rtol=1e-4)
    assert torch.allclose(ratio[waves > 8192], torch.full((1,), 8.0), rtol=1e-4)
    between = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(
    "fields",
    [{"n_heads": 3}, {"n_kv_heads": 3}, {"dim": 0}, {"rope_factor": 0.5}, {"norm_eps": 0.0}, {"dim": 72, "n_heads": 8}],
)
def test_impossible_shapes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Config(**fields)  # type: ignore[arg-type]


def test_the_sharding_table_names_modules_that_exist() -> None:
    for tied in (False, True):
        table = sharding(Config(tied_embeddings=tied))
        with torch.device("meta"):
            names = [name for name, _ in Transformer(Config(tied_embeddings=tied)).named_modules()]
        assert len(matching(table.block, names)) == Config().n_layers
        assert all(matching(pattern, names) for pattern in table.before)
    with pytest.raises(ValueError, match="matches no module"):
        matching("layer.*", names)
