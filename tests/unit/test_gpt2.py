"""GPT-2: published sizes, seams, positions, documents, dropout."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from titan.checkpoint.about import About, refuse_another_model, write_about
from titan.checkpoint.manifest import CheckpointError
from titan.data.prepare import require_room
from titan.data.tokenizer import BytesTokenizer
from titan.generate import Draw, generate
from titan.metrics.flops import Flops, flops_per_token
from titan.models.gpt2.config import SIZES, Config
from titan.models.gpt2.model import Transformer
from titan.models.gpt2.sharding import sharding
from titan.sharding import matching, styles

ROOT = Path(__file__).parents[2]
COUNTS = {"124m": 124_439_808, "355m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}
SMALL = Config(dim=64, n_layers=3, n_heads=4, ffn_dim=96, vocab_size=97, context_length=48)


def make(seed: int = 0, **fields: object) -> Transformer:
    """Weights and biases large enough that each of them shows."""
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, **fields))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    return model


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length))


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes(size: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[size])
        untied = Transformer(replace(SIZES[size], tied_embeddings=False))
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS[size]
    assert sum(p.numel() for p in untied.parameters()) == count + 50257 * SIZES[size].dim


def test_the_summed_loss_is_the_cross_entropy_of_the_logits_without_ignored_labels() -> None:
    for tied in (False, True):
        model = make(tied_embeddings=tied)
        tokens, labels = tokens_of(2, 33), tokens_of(2, 33)
        labels[0, :7] = -100
        chosen = model(tokens).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(model(tokens, labels=labels), -chosen[labels != -100].sum())


def test_attention_is_causal_and_stays_inside_a_document() -> None:
    model = make()
    tokens = tokens_of(1, 24)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4
    documents = torch.tensor([[0] * 9 + [1] * 8 + [2] * 7])
    positions = torch.tensor([[*range(9), *range(8), *range(7)]])
    together = model(tokens, positions=positions, document_ids=documents)
    alone = torch.cat([model(part) for part in tokens.split([9, 8, 7], dim=1)], dim=1)
    torch.testing.assert_close(together, alone)
    assert (together - before)[:, 9:].abs().amax(-1).min() > 1e-3


def test_positions_are_a_table_that_ends() -> None:
    model = make()
    tokens, shift = tokens_of(2, 20), torch.arange(5, 25)
    torch.testing.assert_close(model(tokens, positions=shift), model(tokens, positions=shift.expand(2, -1)))
    torch.testing.assert_close(model(tokens, positions=torch.arange(20)), model(tokens))
    assert (model(tokens, positions=shift) - model(tokens)).abs().max() > 0.1
    model(tokens_of(1, SMALL.context_length))
    with pytest.raises(IndexError):
        model(tokens_of(1, SMALL.context_length + 1))
    with pytest.raises(ValueError, match=r"makes it 49 tokens, more than the 48 .*; ask for fewer"):
        require_room(BytesTokenizer(), ["x", "four"], 44, SMALL)
    require_room(BytesTokenizer(), ["x", "four"], 43, SMALL)
    require_room(BytesTokenizer(), [], 999, SMALL)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_its_parts(tied: bool) -> None:
    """A pipeline stage is the same class with rooms left empty, also where the embedding is tied."""
    whole, first, last = (make(tied_embeddings=tied) for _ in range(3))
    assert not set(last.state_dict()) ^ set(whole.state_dict())
    first.norm = first.head = None
    last.position_embedding = None
    for number in range(SMALL.n_layers):
        del (last if number == 0 else first).layers[str(number)]
    if not tied:
        last.embedding = None
    names = {name for part in (first, last) for name, _ in part.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}
    tokens, labels = tokens_of(2, 16), tokens_of(2, 16)
    documents = torch.tensor([[0] * 6 + [1] * 10] * 2)
    hidden = first(tokens, document_ids=documents)
    assert hidden.shape == (2, 16, SMALL.dim)
    expected = whole(tokens, labels=labels, document_ids=documents)
    torch.testing.assert_close(last(hidden, labels=labels, document_ids=documents), expected)


def test_dropout_acts_on_the_stream_alone_and_only_in_training() -> None:
    model, tokens = make(dropout=0.5), tokens_of(2, 12)
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    layers = [f"layers.{i}.{branch}.dropout" for i in range(SMALL.n_layers) for branch in ("attention", "ffn")]
    assert set(dropouts) == {"dropout", *layers}
    shapes = []
    for module in dropouts.values():
        module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    first, second = model(tokens), model(tokens)
    assert set(shapes) == {(2, 12, SMALL.dim)}
    assert len(shapes) == 2 * len(dropouts)
    assert (first - second).abs().max() > 0.1
    plain = make(dropout=0.0)
    torch.testing.assert_close(model.eval()(tokens), plain(tokens))
    for module in dropouts.values():  # alone, each changes what comes out
        module.train()
        assert (model(tokens) - plain(tokens)).abs().max() > 0.01
        module.eval()


def test_initial_weights_are_openai_s() -> None:
    model = Transformer(replace(SIZES["debug"], dropout=0.1))
    torch.manual_seed(0)
    model.init_weights()
    deviations = {name: (p.mean().item(), p.std().item()) for name, p in model.named_parameters()}
    for name, (mean, std) in deviations.items():
        wanted = 0.005 if name.endswith(("o.weight", "down.weight")) else 0.01 if name.startswith("position") else 0.02
        if name.endswith(("bias", "norm.weight")):
            assert (mean, std) == (0.0 if name.endswith("bias") else 1.0, 0.0), name
        else:
            assert (mean, std) == (pytest.approx(0, abs=1e-3), pytest.approx(wanted, rel=0.05)), name


def test_generation_goes_up_to_the_last_position() -> None:
    model, length = make().eval(), SMALL.context_length
    draw = Draw(temperature=0.0, top_p=1.0, seed=0, vocab_size=SMALL.vocab_size)
    row = [5, 7, 9]
    found = [column[0] for column in generate(model, sharding(SMALL).core, [row], length, draw)]
    assert len(found) == length - 3
    for token in found:
        assert int(model(torch.tensor([row]))[0, -1].argmax()) == token
        row.append(token)


@pytest.mark.parametrize("tied", [False, True])
def test_lookups_cost_nothing(tied: bool) -> None:
    with torch.device("meta"):
        model = Transformer(replace(SIZES["124m"], tied_embeddings=tied))
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert flops_per_token(model, 1024) == Flops(6 * matrices, 6 * 12 * 768 * 1024)


def test_weights_may_be_trained_with_another_dropout_but_not_in_another_shape(tmp_path: Path) -> None:
    about = About("gpt2", SMALL, "bytes", "abc", 0)
    write_about(tmp_path, about, {})
    assert refuse_another_model(tmp_path, "gpt2", replace(SMALL, dropout=0.2), "abc") == about
    for fields, said in ({"norm_eps": 1e-6}, "norm_eps is 1e-05 there"), ({"context_length": 40}, "context_length is 48 there"):
        with pytest.raises(CheckpointError, match=said):
            refuse_another_model(tmp_path, "gpt2", replace(SMALL, **fields), "abc")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"n_heads": 3}, {"dim": 0}, {"context_length": 0}, {"norm_eps": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_impossible_shapes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Config(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_the_sharding_table_is_the_model_s(tied: bool) -> None:
    config = replace(SMALL, tied_embeddings=tied)
    table, words = sharding(config), styles(sharding(config), {})
    with torch.device("meta"):
        modules = dict(Transformer(config).named_modules())
    assert len(matching(table.block, modules)) == table.blocks == config.n_layers
    assert len(matching(table.core, modules)) == config.n_layers
    owners = {name for name, module in modules.items() if list(module.parameters(recurse=False))}
    assert owners <= set(words) <= set(modules)
    top = {name.split(".")[0] for name in owners} - {"layers"}
    assert top == {*table.before, *table.after}


def test_the_model_runs_alone_in_ten_lines() -> None:
    script = """
        import torch
        from titan.models.gpt2.config import Config
        from titan.models.gpt2.model import Transformer
        torch.manual_seed(0)
        model = Transformer(Config(n_layers=2))
        model.init_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens = torch.arange(65).repeat(4, 1) % 7
        for _ in range(30):
            loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 256
            loss.backward(); optimizer.step(); optimizer.zero_grad()
        import sys; assert loss < 0.5, loss; assert not any(m.startswith('titan.') and 'models' not in m for m in sys.modules)
    """
    code = "\n".join(line[8:] for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
