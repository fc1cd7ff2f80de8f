"""Out to a Hugging Face folder and back: the same numbers, to the bit, and transformers computes the same logits from them."""

from __future__ import annotations

import json
import math
import platform
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titan import toml
from titan.checkpoint import blocks, convert
from titan.checkpoint.about import About, read_about, tokenizer_spec, write_about
from titan.checkpoint.blocks import open_file, open_folder, write_blocks
from titan.checkpoint.commit import begin, commit
from titan.checkpoint.convert import export_hf, import_hf, split
from titan.checkpoint.huggingface import load_hf_weights, load_step_weights, read_hf
from titan.checkpoint.index import tensor_names
from titan.checkpoint.manager import weights
from titan.checkpoint.manifest import CheckpointError, Written, verify, write_json
from titan.checkpoint.storage import load_tensors, save_tensors
from titan.cli import main
from titan.data.tokenizer import load_tokenizer
from titan.models.llama3 import hf
from titan.models.llama3.config import SIZES, Config
from titan.models.llama3.model import Transformer

ROOT = Path(__file__).parents[2]
SPM_TOKENS = 400
VOCABULARY = 416  # rows that no token uses
SMALL = Config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCABULARY)
SCALED = replace(SMALL, rope_factor=8.0, rope_original_length=64, context_length=4096)
SHAPES = {
    "grouped": SMALL,
    "tied": replace(SMALL, tied_embeddings=True),
    "one head each": replace(SMALL, n_kv_heads=4, norm_eps=1e-6, rope_theta=10000.0),
    "one shared head": replace(SMALL, n_kv_heads=1),
    "scaled": SCALED,
    "scaled and tied, as 3.2": replace(SCALED, tied_embeddings=True, rope_factor=32.0, rope_original_length=8192),
}

Make = Callable[..., Path]


def quiet(line: str) -> None:
    pass


def transformers() -> Any:
    """The package: seconds to import, and more types than mypy can follow."""
    import transformers

    return transformers


def model_of(config: Config, seed: int = 0) -> Transformer:
    """Weights large enough that attention is far from uniform: a wrong angle shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        nn.init.normal_(parameter, mean, 0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=SPM_TOKENS,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    return path


@pytest.fixture
def step(tmp_path: Path, tokenizer: Path) -> Make:
    """Commits a model's weights as a run would: step(model) -> folder."""

    def make(model: Transformer, start: int = 1) -> Path:
        root = tmp_path / "run" / "checkpoints"
        temp = begin(root, 7, 0, lambda: None)
        save_tensors(weights(model) | {"optimizer.moment": torch.ones(3)}, temp)
        found = load_tokenizer(str(tokenizer))
        write_about(temp, About("llama3", model.config, "tokenizer.model", found.fingerprint, start), found.files)
        return commit(temp)

    return make


@pytest.fixture
def theirs(tmp_path: Path, tokenizer: Path) -> Make:
    """A folder that transformers itself has written: theirs(**LlamaConfig fields) -> folder."""

    def make(shard: str = "1GB", **fields: Any) -> Path:
        torch.manual_seed(1)
        small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
        model = transformers().LlamaForCausalLM(transformers().LlamaConfig(**{**small, **fields}))
        folder = tmp_path / "theirs"
        model.save_pretrained(folder, max_shard_size=shard)
        shutil.copy(tokenizer, folder)
        return folder

    return make


TEXT = "  def f(x):\n\treturn {'naïve': '東京 👩‍👩‍👧'}  # </s> of what"


def their_logits(folder: Path, tokens: Tensor, positions: Tensor) -> Tensor:
    auto = transformers().AutoModelForCausalLM
    model, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return torch.as_tensor(model(tokens, position_ids=positions[None].expand_as(tokens)).logits)


def raw_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def random_bits(model: Transformer, seed: int) -> None:
    """Every float32 there is, NaNs with their payloads too: what is copied and not computed with comes back the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        raw = torch.randint(0, 256, (parameter.nbytes,), dtype=torch.uint8, generator=generator)
        parameter.data = raw.view(torch.float32).view_as(parameter)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


def loaded(folder: Path, config: Config) -> Transformer:
    """What checkpoint.load does with a folder."""
    model = Transformer(config)
    state = weights(model)
    assert tensor_names(folder) == set(state)
    load_tensors(state, folder)
    return model


# The same logits


@pytest.mark.parametrize("start", [0, 60, 9_000, 120_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(step: Make, tmp_path: Path, shape: str, start: int) -> None:
    model = model_of(SHAPES[shape])
    export_hf(step(model), tmp_path / "out", torch.float32, quiet)
    tokens, positions = torch.randint(VOCABULARY, (2, 40)), torch.arange(start, start + 40)
    with torch.no_grad():
        ours = model(tokens, positions=positions)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, their_logits(tmp_path / "out", tokens, positions), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_imported(theirs: Make, tmp_path: Path, tied: bool) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 40000.0}
    folder = theirs("20KB", tie_word_embeddings=tied, rope_parameters=rope, max_position_embeddings=512, bos_token_id=3)
    assert (folder / "model.safetensors.index.json").is_file()
    about = import_hf(folder, tmp_path / "ours", quiet)
    expected = replace(SCALED, tied_embeddings=tied, rope_theta=40000.0, norm_eps=1e-6, context_length=512)
    assert about == read_about(tmp_path / "ours")
    assert (about.config, about.document_start) == (expected, 3)
    tokens, positions = torch.randint(VOCABULARY, (2, 40)), torch.arange(50, 90)
    with torch.no_grad():
        ours = loaded(tmp_path / "ours", expected)(tokens, positions=positions)
    torch.testing.assert_close(ours, their_logits(folder, tokens, positions), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_transformers_goes_on_from_a_text(step: Make, tmp_path: Path, kind: str) -> None:
    model, folder = model_of(SMALL), tmp_path / "run/checkpoints/step-00000007"
    step(model)
    if kind == "bytes":
        about = replace(read_about(folder), tokenizer="bytes", document_start=256)
        write_about(folder, about, {})
        write_json(folder / "manifest.json", json.loads((folder / "manifest.json").read_text()) | {"files": {}})
    about = read_about(folder)
    ours = load_tokenizer(tokenizer_spec(folder, about))
    export_hf(folder, tmp_path / "out", torch.float32, quiet)
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer.eos_token_id == ours.document_end == raw_config(tmp_path / "out")["eos_token_id"]
    encoded = tokenizer(TEXT, return_tensors="pt", split_special_tokens=True)
    assert encoded.input_ids[0].tolist() == ours.encode(TEXT).tolist()
    other = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    found = other.generate(**encoded, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    tokens = encoded.input_ids
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert found.tolist() == tokens[0].tolist()


# The same bits


@pytest.mark.parametrize("limit", [10**9, 40_000])
@pytest.mark.parametrize("tied", [False, True])
def test_out_and_in_is_the_same_to_the_bit(
    step: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, limit: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    model = Transformer(replace(SCALED, tied_embeddings=tied))
    random_bits(model, seed=limit)
    export_hf(step(model, start=5), tmp_path / "out", torch.float32, quiet, limit)
    about = import_hf(tmp_path / "out", tmp_path / "back", quiet, limit)
    assert verify(tmp_path / "back").step == 0
    assert (about.config, about.document_start) == (model.config, 5)
    assert load_tokenizer(tokenizer_spec(tmp_path / "back", about)).fingerprint == about.fingerprint
    back = loaded(tmp_path / "back", model.config)
    for (name, one), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert same_bits(one, other), name

    export_hf(tmp_path / "back", tmp_path / "again", torch.float32, quiet, limit)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (len([name for name in files if name.endswith(".safetensors")]) > 1) == (limit < 10**9)
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_bfloat16_out_rounds_and_in_is_exact(step: Make, tmp_path: Path) -> None:
    model = model_of(SMALL)
    export_hf(step(model), tmp_path / "out", torch.bfloat16, quiet)
    assert raw_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    import_hf(tmp_path / "out", tmp_path / "back", quiet)
    back = loaded(tmp_path / "back", SMALL)
    for one, other in zip(model.parameters(), back.parameters(), strict=True):
        assert same_bits(one.bfloat16().float(), other)


def test_weights_go_into_a_model_of_another_dtype(step: Make, tmp_path: Path) -> None:
    model, folder = model_of(SMALL), tmp_path / "out"
    export_hf(step(model), folder, torch.float32, quiet)
    for load, where in ((load_hf_weights, folder), (load_step_weights, tmp_path / "run/checkpoints/step-00000007")):
        other = Transformer(SMALL).bfloat16()
        load(other, where)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert same_bits(one.bfloat16(), two)
        with pytest.raises(CheckpointError, match=r"head\.weight is unknown"):
            load(Transformer(replace(SMALL, tied_embeddings=True)), where)
    about, spec = read_hf(folder)
    assert about.config == SMALL
    assert load_tokenizer(spec).fingerprint == about.fingerprint


# Names and config


@pytest.mark.parametrize("size", SIZES)
def test_the_names_are_the_models(size: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[size])
    names = hf.tensor_names(SIZES[size])
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names)
    assert hf.from_hf(hf.to_hf(SIZES[size])) == SIZES[size]


PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_8B = PUBLISHED | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": ROPE | {"rope_type": "llama3"},
    "tie_word_embeddings": False,
}
LLAMA_1B = PUBLISHED | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": ROPE | {"rope_type": "llama3", "factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
}


def newer(raw: dict[str, Any]) -> dict[str, Any]:
    """The spelling of transformers 5."""
    raw = dict(raw)
    theta = raw.pop("rope_theta", 10000.0)
    return raw | {"rope_parameters": {"rope_type": "default", **(raw.pop("rope_scaling") or {}), "rope_theta": theta}}


@pytest.mark.parametrize("spelling", [dict, newer])
def test_published_configs_are_read(spelling: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    assert hf.from_hf(spelling(LLAMA_8B)) == SIZES["8b"]
    assert hf.from_hf(spelling(LLAMA_1B)) == SIZES["1b"]
    seven = Config(4096, 32, 32, 32, 11008, 32000, rope_theta=10000.0, context_length=4096)
    assert hf.from_hf(spelling(LLAMA_2)) == seven


def test_transformers_reads_the_config_as_it_was_meant() -> None:
    for config in (SMALL, SCALED, *SIZES.values()):
        raw = hf.to_hf(config)
        found = transformers().LlamaConfig(**raw)
        assert hf.from_hf(found.to_dict()) == config
        assert not {key: value for key, value in raw.items() if "rope" not in key and getattr(found, key) != value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias is True; this model has no biases"),
        ({"mlp_bias": True}, "mlp_bias is True; this model has no biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model's is silu"),
        ({"head_dim": 32}, "head_dim is 32; this model's heads are hidden_size / num_attention_heads wide"),
        ({"sliding_window": 4096}, "sliding_window is 4096; this model attends to everything before a token"),
        ({"quantization_config": {"bits": 4}}, "quantised weights; take the model's unquantised folder"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; this model knows default and llama3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": [1]}, "rope_scaling is \\[1\\], expected an object"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None, expected a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this model rotates whole heads"),
        ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, expected a whole number"),
        ({"num_key_value_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; titan has a model for gpt2, llama"),
        ({"bos_token_id": 416}, "bos_token_id is 416, expected one token of the 416"),
        ({"vocab_size": 200}, "vocab_size is 200, fewer than the 400 tokens"),
    ],
)
def test_a_config_that_this_model_cannot_be_is_refused(
    theirs: Make, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = theirs()
    raw = raw_config(folder)
    if "rope_scaling" in change:
        raw.pop("rope_parameters", None)
    write_json(folder / "config.json", raw | change)
    with pytest.raises(CheckpointError, match=f"config.json: .*{said}"):
        import_hf(folder, tmp_path / "ours", quiet)
    assert not (tmp_path / "ours").exists()


# Folders that are not what they should be


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(**places: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        write_json(folder / "model.safetensors.index.json", {"weight_map": places})

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
        (edited(lambda t: t.update({"model.extra": torch.ones(1)})), "model.extra is unknown"),
        (edited(lambda t: t.update({"model.norm.weight": torch.ones(63)})), r"model.norm.weight is \(63,\), expected \(64,\)"),
        (edited(lambda t: t.update({"model.norm.weight": torch.ones(64).char()})), "norm.weight is torch.int8: quantised"),
        (cut_short, "model.safetensors: not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (pickled, "pytorch_model.bin, a pickle, which can run code when it is read"),
        (indexed(x="../run/a.safetensors"), "weight_map .* do not trust it"),
        (indexed(x="/etc/passwd"), "weight_map .* do not trust it"),
        (indexed(x="b.safetensors"), "b.safetensors: cannot be read"),
        (indexed(x="a.safetensors"), "a.safetensors: x should be in it"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "holds neither tokenizer.json nor tokenizer.model"),
        (lambda folder: (folder / "config.json").unlink(), "not a Hugging Face model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    theirs: Make, tmp_path: Path, edit: Callable[[Path], object], said: str
) -> None:
    folder = theirs()
    edit(folder)
    with pytest.raises(CheckpointError, match=said):
        import_hf(folder, tmp_path / "ours", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_what_old_folders_carry_besides_is_left_out(theirs: Make, tmp_path: Path) -> None:
    folder = theirs(tie_word_embeddings=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edited(add)(folder)
    import_hf(folder, tmp_path / "ours", quiet)
    assert "model.head.weight" not in tensor_names(tmp_path / "ours")
    edited(lambda tensors: tensors["lm_head.weight"][415, 63].add_(1e-3))(folder)
    with pytest.raises(CheckpointError, match=r"ties the embeddings, but lm_head\.weight is there and differs"):
        import_hf(folder, tmp_path / "other", quiet)


def test_a_header_with_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    text = f'{{"x": {entry}, "x": {entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(CheckpointError, match="names something twice"):
        open_file(tmp_path / "x.safetensors")


# Whole or not at all


def test_an_interrupted_export_leaves_nothing(step: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = step(model_of(SMALL)), []

    def interrupted(path: Path, *rest: Any) -> Written:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_blocks(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(convert, "write_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_hf(folder, tmp_path / "out", torch.float32, quiet, 20_000)
    assert len(written) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".out.{platform.node()}.{dead.pid}.0a.tmp"
    left.mkdir()  # as a killed process leaves it
    (tmp_path / ".out.tmp").mkdir()  # someone's own
    export_hf(folder, tmp_path / "out", torch.float32, quiet, 20_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "out", "run"]
    with pytest.raises(CheckpointError, match="out is there already"):
        export_hf(folder, tmp_path / "out", torch.float32, quiet)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"MB are needed, 0\.0 MB are free"):
        import_hf(tmp_path / "out", tmp_path / "back", quiet)


def test_a_step_that_was_tampered_with_is_not_exported(step: Make, tmp_path: Path) -> None:
    folder = step(model_of(SMALL))
    (folder / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: 0 bytes"):
        export_hf(folder, tmp_path / "out", torch.float32, quiet)
    assert not (tmp_path / "out").exists()


# Blocks


@pytest.mark.parametrize("seed", range(5))
def test_a_tensor_cut_any_way_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", rng.choice([1, 100, 1000]))
    shape = tuple(rng.randint(1, 12) for _ in range(rng.choice([1, 2, 2, 3])))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts: dict[tuple[int, ...], Tensor] = {(): tensor}
    for dim, size in enumerate(shape):  # cut each dimension at random places
        cuts = sorted({0, *(rng.randrange(size) for _ in range(2)), size})
        parts = {
            (*at, low): part.narrow(dim, low, high - low)
            for at, part in parts.items()
            for low, high in pairwise(cuts)
        }
    chunks, files = [], {}
    for number, (at, part) in enumerate(parts.items()):
        file = f"shard-{number:05d}.safetensors"
        written = write_blocks(tmp_path / file, {"t": (part.dtype, tuple(part.shape))}, lambda _, part=part: [part])  # type: ignore[misc]
        files[file] = {"bytes": written.bytes}
        chunks.append({"offsets": at, "shape": part.shape, "file": file, "key": "t"})
    entry = {"dtype": "F32", "shape": shape, "chunks": chunks}
    write_json(tmp_path / "index.json", {"format": "titan-tensors", "version": 1, "files": files, "tensors": {"t": entry}})
    stored = open_folder(tmp_path)["t"]
    found = list(stored.blocks())
    row = math.prod(shape[1:]) * 4
    assert all(block.nbytes <= max(row, blocks.BLOCK_BYTES) for block in found)
    assert same_bits(torch.cat(found), tensor), (seed, shape)


def test_blocks_that_are_not_what_was_planned_are_refused(tmp_path: Path) -> None:
    for name, given in {"short": [torch.ones(2, 3)], "long": [torch.ones(5, 3)], "wide": [torch.ones(4, 4)]}.items():
        with pytest.raises(CheckpointError, match="planned as"):
            write_blocks(tmp_path / name, {"t": (torch.float32, (4, 3))}, lambda _, given=given: given)  # type: ignore[misc]


def test_files_are_filled_up_to_the_limit() -> None:
    rng = random.Random(3)
    for _ in range(50):
        sizes = {str(i): rng.randint(0, 30) for i in range(rng.randint(1, 40))}
        runs = split(sizes, 40)
        assert [name for run in runs for name in run] == list(sizes)
        totals = [sum(sizes[name] for name in run) for run in runs]
        assert max(totals) <= 40
        assert all(total + sizes[following[0]] > 40 for total, following in zip(totals, runs[1:], strict=False))
    assert split({"a": 1, "large": 99, "b": 1}, 10) == [["a"], ["large"], ["b"]]


# Commands


def test_the_commands_go_out_and_in_and_say_how_to_go_on(
    step: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, tied_embeddings=True, norm_eps=1e-6)
    folder = step(model_of(config))
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["export", "hf", str(folder), str(out), "--dtype", "bfloat16", "--max-shard-gb", "2e-5"]) == 0
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in capsys.readouterr().out
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert main(["import", "hf", str(out), str(back)]) == 0
    said = capsys.readouterr().out
    assert f"--checkpoint.load={back} --data.tokenizer={back}" in said
    words = [word for word in said.split() if word.startswith("--model.")]
    assert toml.load(str(ROOT / "train_configs/debug.toml"), words).model.config == config
    for words in (["import", "hf", str(out), str(back)], ["export", "hf", str(folder), str(out)]):
        assert main(words) == 2
        assert "is there already" in capsys.readouterr().err
    assert main(["export", "hf", str(folder.parents[1]), str(tmp_path / "newest")]) == 0
    assert capsys.readouterr().out.startswith(f"export: {folder}\n")
    assert (tmp_path / "newest" / "config.json").is_file()
    assert main(["export", "hf", str(out), str(tmp_path / "x")]) == 2
    assert "is a Hugging Face folder already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "hf", "{tmp}", "x"], "{tmp} is neither a committed step nor a run's folder with one"),
        (["export", "hf", "{tmp}/run", "/proc/x"], "/proc/x cannot be made: /proc cannot be written"),
        (["export", "hf", "{tmp}/run/checkpoints/step-00000007", "x", "--dtype", "float16"], "--dtype"),
        (["export", "hf", "{tmp}/run/checkpoints/step-00000007", "x", "--max-shard-gb=0"], "expected a number above 0"),
        (["export", "gguf", "{tmp}", "x"], "gguf"),
        (["import", "hf", "{tmp}/none", "x"], "is not a folder"),
        (["import", "hf", "{tmp}/run", "x"], "holds no config.json"),
        (["import", "hf", "{tmp}/run/checkpoints/step-00000007", "x"], "is a checkpoint of titan already"),
        (["import", "hf"], "HF_DIR"),
    ],
)
def test_a_wrong_command_line_is_answered_with_the_right_one(
    step: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    step(Transformer(SMALL))
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    assert said.format(tmp=tmp_path) in capsys.readouterr().err
