"""Generation: with kept keys as without, prompts that do not disturb one another, draws that follow their distribution."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from titan.data.tokenizer import BytesTokenizer
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


def test_continuations_end_with_the_document_and_leave_random_states_alone() -> None:
    model = Transformer(Config(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=300))
    tokenizer = BytesTokenizer()
    model.init_weights()
    state, training = torch.get_rng_state(), model.training
    said = continuations(model, "layers.*.attention.core", tokenizer, 256, ["a", "bcd"], 9, Draw(1.0, 1.0, 1, 257))
    assert len(said) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert until([5, 256, 7], 256) == [5]
    assert until([5, 7], 256) == [5, 7]
