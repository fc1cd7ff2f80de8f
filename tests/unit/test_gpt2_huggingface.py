"""GPT-2 out to a Hugging Face folder and back: q, k and v joined, matrices turned round, and the same numbers to the bit."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titan.checkpoint import blocks
from titan.checkpoint.about import About, write_about
from titan.checkpoint.blocks import joined, open_file, write_blocks
from titan.checkpoint.commit import begin, commit
from titan.checkpoint.convert import export_hf, import_hf
from titan.checkpoint.huggingface import load_hf_weights, load_step_weights
from titan.checkpoint.manager import weights
from titan.checkpoint.manifest import CheckpointError, write_json
from titan.checkpoint.storage import load_tensors, save_tensors
from titan.cli import main
from titan.data.tokenizer import load_tokenizer
from titan.models.gpt2 import hf
from titan.models.gpt2.config import SIZES, Config
from titan.models.gpt2.model import Transformer

ROOT = Path(__file__).parents[2]
VOCABULARY = 416
SMALL = Config(dim=48, n_layers=2, n_heads=3, ffn_dim=80, vocab_size=VOCABULARY, context_length=64)
SHAPES = {
    "tied": SMALL,
    "untied": replace(SMALL, tied_embeddings=False, dropout=0.2),
    "odd heads": replace(SMALL, dim=45, n_heads=9, ffn_dim=180, norm_eps=1e-6),
}

Make = Callable[..., Path]


def quiet(line: str) -> None:
    pass


def transformers() -> Any:
    """The package: seconds to import, and more types than mypy can follow."""
    import transformers

    return transformers


def model_of(config: Config, seed: int = 0) -> Transformer:
    """Weights and biases large enough that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2
        )
    return path


@pytest.fixture
def step(tmp_path: Path, tokenizer: Path) -> Make:
    """Commits a model's weights as a run would: step(model) -> folder."""

    def make(model: Transformer) -> Path:
        temp = begin(tmp_path / "run" / "checkpoints", 7, 0, lambda: None)
        save_tensors(weights(model), temp)
        found = load_tokenizer(str(tokenizer))
        write_about(temp, About("gpt2", model.config, "tokenizer.model", found.fingerprint, 1), found.files)
        return commit(temp)

    return make


@pytest.fixture
def theirs(tmp_path: Path, tokenizer: Path) -> Make:
    """A folder that transformers itself has written: theirs(**GPT2Config fields) -> folder."""

    def make(shard: str = "1GB", **fields: Any) -> Path:
        torch.manual_seed(1)
        small: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": VOCABULARY, "n_positions": 64}
        small |= {"initializer_range": 0.15, "bos_token_id": 3}
        model = transformers().GPT2LMHeadModel(transformers().GPT2Config(**{**small, **fields}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.15)
        folder = tmp_path / "theirs"
        model.save_pretrained(folder, max_shard_size=shard)
        shutil.copy(tokenizer, folder)
        return folder

    return make


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    auto = transformers().AutoModelForCausalLM
    model, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        return torch.as_tensor(model.eval()(tokens).logits)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


def random_bits(model: nn.Module, seed: int) -> None:
    """Every float32 there is, NaNs with their payloads too: what is copied and not computed with comes back the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        raw = torch.randint(0, 256, (parameter.nbytes,), dtype=torch.uint8, generator=generator)
        parameter.data = raw.view(torch.float32).view_as(parameter)


def loaded(folder: Path, config: Config) -> Transformer:
    """What checkpoint.load does with a folder."""
    model = Transformer(config)
    load_tensors(weights(model), folder)
    return model.eval()


# The same logits


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(step: Make, tmp_path: Path, shape: str) -> None:
    model = model_of(SHAPES[shape])
    export_hf(step(model), tmp_path / "out", torch.float32, quiet)
    tokens = torch.randint(VOCABULARY, (2, 64))
    with torch.no_grad():
        ours = model(tokens)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, their_logits(tmp_path / "out", tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_imported(theirs: Make, tmp_path: Path, tied: bool) -> None:
    folder = theirs("20KB", tie_word_embeddings=tied, layer_norm_epsilon=1e-6, resid_pdrop=0.25)
    assert (folder / "model.safetensors.index.json").is_file()
    about = import_hf(folder, tmp_path / "ours", quiet)
    expected = replace(SMALL, ffn_dim=192, tied_embeddings=tied, norm_eps=1e-6, dropout=0.25)
    assert (about.config, about.document_start) == (expected, 3)
    tokens = torch.randint(VOCABULARY, (2, 40))
    with torch.no_grad():
        ours = loaded(tmp_path / "ours", expected)(tokens)
    torch.testing.assert_close(ours, their_logits(folder, tokens), rtol=0, atol=1e-5)


def test_a_folder_as_openai_s_models_were_published_is_imported(theirs: Make, tmp_path: Path) -> None:
    """Names without the prefix, the causal masks among the weights, and the head's copy of the embedding."""
    folder = theirs()
    expected = loaded_from(folder)

    def publish(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit(folder, publish)
    for one, other in zip(expected.parameters(), loaded_from(folder).parameters(), strict=True):
        assert same_bits(one, other)
    edit(folder, lambda tensors: tensors["lm_head.weight"][0, 0].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is there and differs from transformer\.wte\.weight"):
        import_hf(folder, tmp_path / "ours", quiet)


def loaded_from(folder: Path) -> Transformer:
    """What `titan generate` does with a Hugging Face folder."""
    model = Transformer(hf.from_hf(json.loads((folder / "config.json").read_text())))
    load_hf_weights(model, folder)
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# The same bits


@pytest.mark.parametrize("limit", [10**9, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_out_and_in_is_the_same_to_the_bit(
    step: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, limit: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    model = Transformer(replace(SMALL, tied_embeddings=tied))
    random_bits(model, seed=limit)
    export_hf(step(model), tmp_path / "out", torch.float32, quiet, limit)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (limit < 10**9)
    assert import_hf(tmp_path / "out", tmp_path / "back", quiet, limit).config == model.config
    others = [loaded(tmp_path / "back", model.config), Transformer(model.config), Transformer(model.config)]
    load_hf_weights(others[1], tmp_path / "out")
    load_step_weights(others[2], tmp_path / "run/checkpoints/step-00000007")
    for other in others:
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            assert same_bits(one, two), name
    export_hf(tmp_path / "back", tmp_path / "again", torch.float32, quiet, limit)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path


def test_their_layout_is_what_ours_becomes(step: Make, tmp_path: Path) -> None:
    model = model_of(SMALL)
    export_hf(step(model), tmp_path / "out", torch.bfloat16, quiet)
    found, own = load_file(tmp_path / "out" / "model.safetensors"), dict(model.named_parameters())
    weight, bias = (torch.cat([own[f"layers.1.attention.{name}.{kind}"] for name in "qkv"]) for kind in ("weight", "bias"))
    assert same_bits(weight.T.contiguous().bfloat16(), found["transformer.h.1.attn.c_attn.weight"])
    assert same_bits(bias.bfloat16(), found["transformer.h.1.attn.c_attn.bias"])
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (48, 80)
    assert same_bits(own["position_embedding.weight"].bfloat16(), found["transformer.wpe.weight"])


@pytest.mark.parametrize("seed", range(6))
def test_views_of_tensors_on_disk_are_read_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", rng.choice([1, 60, 10**6]))
    width, parts = rng.randint(1, 9), {}
    for name in "abc"[: rng.randint(1, 3)]:
        parts[name] = torch.randn(rng.randint(1, 9), width, generator=torch.Generator().manual_seed(seed))
    write_blocks(tmp_path / "x", {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()}, lambda name: [parts[name]])
    stored = open_file(tmp_path / "x")
    view, memory = joined([stored[name] for name in parts]), torch.cat(list(parts.values()))
    for _ in range(4):
        if rng.random() < 0.5:
            view, memory = view.transposed(), memory.T
        low = rng.randrange(memory.shape[0])
        high = rng.randint(low + 1, memory.shape[0])
        view, memory = view.cut(low, high), memory[low:high]
        assert view.shape == memory.shape
        found = list(view.blocks())
        assert all(block.nbytes <= max(math.prod(view.shape[1:]) * 4, blocks.BLOCK_BYTES) for block in found)
        assert torch.equal(torch.cat(found), memory), (seed, memory.shape)


# Names and config


@pytest.mark.parametrize("size", SIZES)
def test_the_names_are_the_models(size: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[size])
        other = transformers().GPT2LMHeadModel(transformers().GPT2Config(**hf.to_hf(SIZES[size])))
    names = hf.tensor_names(SIZES[size])
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert set(names.values()) == {name for name, _ in other.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
    config = replace(SIZES[size], dropout=0.3, tied_embeddings=False)
    assert hf.from_hf(hf.to_hf(config)) == config


PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_a_published_config_is_read() -> None:
    assert hf.from_hf(PUBLISHED) == replace(SIZES["124m"], dropout=0.1)
    assert hf.from_hf({"model_type": "gpt2"}) == hf.from_hf(PUBLISHED), "what is missing is what GPT2Config takes it to be"
    assert hf.from_hf(PUBLISHED | {"n_inner": 1000, "n_embd": 1536}).ffn_dim == 1000
    assert hf.from_hf(PUBLISHED | {"n_inner": None, "n_embd": 1536}).ffn_dim == 4 * 1536


def test_transformers_reads_the_config_as_it_was_meant() -> None:
    for config in (*SHAPES.values(), *SIZES.values()):
        raw = hf.to_hf(config)
        found = transformers().GPT2Config(**raw)
        assert hf.from_hf(found.to_dict()) == config
        assert not {key: value for key, value in raw.items() if getattr(found, key) != value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; this model's is gelu_new"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"add_cross_attention": True}, "add_cross_attention is true; this model is a decoder alone"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"n_head": 5}, "dim 48 must be a multiple of n_heads 5"),
        ({"n_layer": 2.5}, "n_layer is 2.5, expected a whole number"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop is '0.1', expected a number"),
        ({"n_positions": True}, "n_positions is True, expected a whole number"),
    ],
)
def test_a_config_that_this_model_cannot_be_is_refused(
    theirs: Make, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = theirs()
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | change)
    with pytest.raises(CheckpointError, match=f"config.json: .*{said}"):
        import_hf(folder, tmp_path / "ours", quiet)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.bias"), r"h\.1\.attn\.c_attn\.bias is missing"),
        (lambda t: t.update({"transformer.h.0.crossattention.c_attn.bias": torch.ones(1)}), "crossattention.* is unknown"),
        (lambda t: t.update({"wte.weight": torch.ones(1)}), r": wte\.weight is unknown"),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.ones(144, 48)}),
            r"c_attn\.weight is \(144, 48\), expected \(48, 144\)",
        ),
    ],
)
def test_weights_that_are_not_the_model_s_are_refused(
    theirs: Make, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    folder = theirs()
    edit(folder, change)
    with pytest.raises(CheckpointError, match=said):
        import_hf(folder, tmp_path / "ours", quiet)


def test_generate_goes_up_to_the_last_position_and_says_so(
    step: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = step(model_of(SMALL))
    words = ["generate", str(folder), "import", "--temperature=0"]
    assert main([*words, "--tokens=100"]) == 2
    said = capsys.readouterr().err
    room = int(said.split("leaves room for ")[1].split()[0])
    assert "of the 64 that the model is meant for" in said
    assert 40 < room < 64
    assert main([*words, f"--tokens={room + 1}"]) == 2
    assert main([*words, f"--tokens={room}"]) == 0
