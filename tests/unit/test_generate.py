"""Generation: with kept keys as without, prompts that do not disturb one another, draws that follow their distribution."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
import torch

from titan.data.tokenizer import BytesTokenizer, load_tokenizer
from titan.generate import Draw, continuations, generate, until
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.models.llama3.sharding import sharding

GREEDY = Draw(temperature=0.0, top_p=1.0, seed=0, vocab_size=50)


def model_of(seed: int, **fields: object) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Config(dim=32, n_layers=2, n_heads=4, ffn_dim=64, vocab_size=61, **fields))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def without_memory(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, : GREEDY.vocab_size].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_remembering_changes_no_token(kv_heads: int, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan.generate.PREFILL", 7)
    model = model_of(kv_heads, n_kv_heads=kv_heads, tied_embeddings=tied)
    before = dict(model.named_modules())
    random = torch.Generator().manual_seed(kv_heads)
    prompts = [torch.randint(61, (length,), generator=random).tolist() for length in (1, 20, 9, 14)]
    columns = list(islice(generate(model, sharding(model.config).core, prompts, 20 + 12, GREEDY), 12))
    for prompt, row in zip(prompts, zip(*columns, strict=True), strict=True):
        with torch.no_grad():
            assert list(row) == without_memory(model, prompt, 12), prompt
    assert dict(model.named_modules()) == before, "the model's own attention is back"
    assert len(set(zip(*columns, strict=True))) > 1


def test_a_prompt_gives_the_same_alone_and_among_others() -> None:
    model, draw = model_of(3, n_kv_heads=2), Draw(0.9, 0.9, 7, 50)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = list(zip(*generate(model, "layers.*.attention.core", prompts, 15, draw), strict=True))
    alone = [[t for (t,) in islice(generate(model, "layers.*.attention.core", [p], 30, draw), 10)] for p in prompts]
    assert [list(row) for row in together] == alone


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.3)])
def test_draws_follow_temperature_and_top_p(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5, 9.0])
    wanted = (logits[:4] / temperature).softmax(-1)  # the fifth is no token of the tokenizer
    order = wanted.argsort(descending=True).tolist()
    kept, held = [], 0.0
    for token in order:
        if held < top_p:
            kept.append(token)
        held += float(wanted[token])
    wanted = torch.tensor([float(w) if i in kept else 0.0 for i, w in enumerate(wanted)])
    wanted = wanted / wanted.sum()
    draw, n = Draw(temperature, top_p, 11, 4), 4000
    generators = draw.generators(1)
    found = torch.bincount(torch.tensor([draw.choose(logits[None], generators)[0] for _ in range(n)]), minlength=4) / n
    assert set(found.nonzero().flatten().tolist()) <= set(kept)
    assert torch.allclose(found, wanted, atol=5 * (0.25 / n) ** 0.5), (found, wanted)  # five standard deviations


class Script(torch.nn.Module):
    """A model that says what it is told to, token after token, whatever comes in."""

    def __init__(self, said: list[int], vocabulary: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.core = torch.nn.Identity()
        self.said, self.vocabulary = said, vocabulary

    def forward(self, tokens: torch.Tensor, *, positions: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        logits[..., self.said[0]] = 100.0
        if tokens.shape[1] == 1:
            self.said = self.said[1:]
            logits[..., self.said[0]] = 200.0
        return logits


def test_a_continuation_ends_with_its_document_and_moves_no_random_state() -> None:
    said = [*b"xyz", 256, *b"more"]
    state = torch.get_rng_state()
    for temperature in (0.0, 0.7):
        draw = Draw(temperature, 0.9, 1, 257)
        model = Script(list(said), 300)
        (text,) = continuations(model, "core", BytesTokenizer(), 256, ["ab"], 6, draw)
        assert text == "xyz"
    assert torch.equal(torch.get_rng_state(), state)
    assert until([5, 256, 7], 256) == [5]
    assert until([5, 7], 256) == [5, 7]


def test_a_continuation_keeps_the_space_that_begins_it(tmp_path: Path) -> None:
    """A sentencepiece model with its default settings puts a space before a text, and takes it away when it decodes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["return the thing"] * 20), model_writer=model, vocab_size=30, model_type="bpe", minloglevel=2
    )
    (tmp_path / "prefix.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "prefix.model"))
    the = tokenizer.encode("the").tolist()
    draw = Draw(0.0, 1.0, 1, tokenizer.vocab_size)
    (text,) = continuations(Script(the * 2, 30), "core", tokenizer, 2, ["return"], 2 * len(the), draw)
    assert text == " the the"


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("logits", [[[NAN] * 4], [[INFINITE, 0.0, NAN, -INFINITE]], [[3e38, -3e38, 0.0, 1.0]]])
@pytest.mark.parametrize("temperature", [0.0, 1e-39, 1.0, 1e30])
def test_a_model_that_has_diverged_says_something(logits: list[list[float]], temperature: float) -> None:
    draw = Draw(temperature, 0.9, 1, 4)
    assert draw.choose(torch.tensor(logits), draw.generators(1))[0] in range(4)
