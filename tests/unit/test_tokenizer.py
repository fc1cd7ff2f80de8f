from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from titan.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(80)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"  ", b"    ", b" ab", b"==", b"\xe8\xaa"]
    path = tmp_path_factory.mktemp("tokenizer") / "ranks.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def hf_json() -> bytes:
    """A byte-level tokenizer.json with two special tokens, of which 257 is called </s>."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50, pad_id=0, pad_token="<s>")
    return str(tokenizer.to_str()).encode()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(hf_json())
    return path


@pytest.fixture(params=["bytes", "model", "ranks", "hf"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind."""
    return load_tokenizer("bytes" if request.param == "bytes" else str(request.getfixturevalue(request.param)))


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(["a", "Z", "\n", "\0", "é", "語", "🙂", " "]) for _ in range(rng.randint(0, 200)))


def test_bytes_round_trip() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.document_end) == (257, 256)
    for seed in range(50):
        text = random_text(random.Random(seed))
        tokens = tokenizer.encode(text)
        assert len(tokens) == len(text.encode()), seed
        assert tokenizer.document_end not in tokens
        assert tokenizer.decode([*tokens, tokenizer.document_end]) == text, seed
    assert tokenizer.decode([0xE8, 0xAA]) == "\ufffd"


def test_sentencepiece_round_trip(model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.vocab_size == 400
    rng = random.Random(1)
    for _ in range(50):
        text = " ".join("".join(rng.choices("abcdefghXYZ語", k=rng.randint(1, 8))) for _ in range(20))
        tokens = tokenizer.encode(text)
        assert tokens.max() < tokenizer.vocab_size
        assert tokenizer.document_end not in tokens
        assert tokenizer.decode([*tokens, tokenizer.document_end]) == text


SPELLINGS = ["</s>", "<s>", "<unk>", "ab </s> cd", "<|end_of_text|>", "<|begin_of_text|>a", "<0x41>"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_special_spellings_are_text(each: Tokenizer, spelling: str) -> None:
    tokens = each.encode(spelling)
    assert each.document_end not in tokens
    assert len(tokens) > 1
    assert each.decode(tokens) == spelling
    assert each.decode([each.document_end, *tokens, each.document_end]) == spelling


def test_tokens_are_int32_and_what_is_none_has_no_text(each: Tokenizer) -> None:
    for text in ("", "ab", "é 語!"):
        tokens = each.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.ndim == 1
        assert each.decode(tokens) == text
        assert each.decode([-1, *tokens, each.vocab_size, each.vocab_size + 1000]) == text
    every = each.decode(np.arange(each.vocab_size))
    assert "\ufffd" in every


def test_half_a_character_is_refused(each: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no valid Unicode: '\\ud83d' at character 2"):
        each.encode("ab\ud83d")


def test_fingerprints_tell_tokenizers_apart(model: Path, ranks: Path, hf: Path, tmp_path: Path) -> None:
    assert load_tokenizer("bytes").fingerprint == hashlib.sha256(b"bytes").hexdigest()
    assert load_tokenizer(str(model)).fingerprint == hashlib.sha256(b"sentencepiece\0" + model.read_bytes()).hexdigest()
    same = tmp_path / "other_name.model"
    same.write_bytes(model.read_bytes())
    assert load_tokenizer(str(same)).fingerprint == load_tokenizer(str(model)).fingerprint
    (tmp_path / "tokenizer.json").write_bytes(hf.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')  # another end, so other shards
    every = ["bytes", *map(str, (model, ranks, hf, tmp_path / "tokenizer.json"))]
    assert len({load_tokenizer(spec).fingerprint for spec in every}) == len(every)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer.*nowhere\.model"):
        load_tokenizer(str(tmp_path / "nowhere.model"))
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither a sentencepiece model"),
        (b"this is no model", "neither a sentencepiece model"),
        (b"\0\1\2", "neither a sentencepiece model"),
        (b'{"a": 1}', "no tokenizer.json that tokenizers can read"),
        (b"YQ== 0\nYg== one\n", "line 2: b'Yg== one' is no base64 and rank"),
        (b"YQ== 0\n????\n", "line 2"),
        (b"YQ== 0\nYg== 2\n", "the ranks of its 2 tokens are not 0, 1, 2"),
        (b"YQ== 0\nYg== 1\n", "254 of the 256 bytes are no tokens, 0 is the first"),
    ],
)
def test_broken_files_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    (tmp_path / "foreign.model").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_tokenizer(str(tmp_path / "foreign.model"))
    assert "data.tokenizer" in str(caught.value)
    assert "foreign.model" in str(caught.value)


def test_model_without_document_end_is_refused(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=written, vocab_size=7, model_type="char", eos_id=-1, minloglevel=2
    )
    (tmp_path / "endless.model").write_bytes(written.getvalue())
    with pytest.raises(ValueError, match=r"endless\.model has no end-of-sentence token"):
        load_tokenizer(str(tmp_path / "endless.model"))


def test_kinds_are_told_by_content(model: Path, ranks: Path, hf: Path, tmp_path: Path) -> None:
    """Whatever the name; in a folder tokenizer.json comes first."""
    for source, size, kept in ((model, 400, "model"), (ranks, 263 + 256, "model"), (hf, 258, "json")):
        (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
        for spec in (tmp_path, tmp_path / "tokenizer.model"):
            tokenizer = load_tokenizer(str(spec))
            assert tokenizer.vocab_size == size
            name, content = next(iter(tokenizer.files.items()))
            assert (name, content) == (f"tokenizer.{kept}", source.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(hf.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    assert load_tokenizer(str(tmp_path)).vocab_size == 258
    assert load_tokenizer("bytes").files == {}


@pytest.mark.parametrize(
    ("beside", "end"),
    [
        ({}, 257),  # by its well-known name
        ({"tokenizer_config.json": {"eos_token": "<s>"}}, 256),
        ({"tokenizer_config.json": {"eos_token": {"content": "<s>", "lstrip": True}}, "config.json": {"eos_token_id": 7}}, 256),
        ({"tokenizer_config.json": {"bos_token": "<s>"}, "config.json": {"eos_token_id": 3}}, 3),
        ({"generation_config.json": {"eos_token_id": [256, 257]}, "config.json": {"eos_token_id": 7}}, 256),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": None}}, 257),
    ],
)
def test_the_files_beside_say_what_ends_a_document(beside: dict[str, Any], end: int, hf: Path, tmp_path: Path) -> None:
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_bytes(hf.read_bytes())
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.document_end == end
    assert list(tokenizer.files) == ["tokenizer.json", "tokenizer_config.json"]
    alone = tmp_path / "kept"  # what is kept says it alone, and leaves the rest as it was
    alone.mkdir()
    for name, kept in tokenizer.files.items():
        (alone / name).write_bytes(kept)
    again = load_tokenizer(str(alone))
    assert (again.document_end, again.fingerprint, again.files) == (end, tokenizer.fingerprint, tokenizer.files)
    config = {key: value for key, value in beside.get("tokenizer_config.json", {}).items() if value is not None}
    assert config.items() <= json.loads(tokenizer.files["tokenizer_config.json"]).items()


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, "has no token '<end>', the eos_token of"),
        ({"config.json": {"eos_token_id": 258}}, r"has no token 258, the eos_token_id of .*config\.json"),
        ({"tokenizer_config.json": []}, "holds no object"),
    ],
)
def test_a_document_end_that_is_no_token_is_refused(beside: dict[str, Any], said: str, hf: Path, tmp_path: Path) -> None:
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_bytes(hf.read_bytes())
    with pytest.raises(ValueError, match=said):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_json_without_document_end_is_refused(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(hf.read_text().replace("</s>", "<other>"))
    with pytest.raises(ValueError, match=r"ends a document; put tokenizer_config\.json beside it with \"eos_token\""):
        load_tokenizer(str(tmp_path))


def test_llama_3s_ids_of_special_tokens(ranks: Path) -> None:
    from titan.data.tokenizer_tiktoken import SPECIALS

    # As in the 128,000 ranks of Llama 3, where the first is 128000.
    published = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}
    assert {name: SPECIALS.index(f"<|{name}|>") for name in published} == published
    assert len(set(SPECIALS)) == 256
    assert load_tokenizer(str(ranks)).document_end == 263 + 1


def test_tiktoken_takes_any_run_of_white_space(ranks: Path) -> None:
    import tiktoken

    from titan.data.tokenizer_tiktoken import PATTERN

    table = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks.read_bytes().splitlines())}
    original = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=table, special_tokens={})
    tokenizer = load_tokenizer(str(ranks))
    for text in (" " * 99_999 + "ab", "\u3000" * 60_000 + "ab" + "\n" * 60_000, "ab" * 200_000, "語" * 150_000 + "  ab "):
        assert tokenizer.encode(text).tolist() == original.encode_ordinary(text)
    for text in (" " * 1_000_000, "ab" + " \n" * 550_000 + "ab", "x" + "\t" * 250_000 + "y" + " " * 1_000_001):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("package", "source"), [("tokenizers", "hf"), ("tiktoken", "ranks")])
def test_a_missing_package_is_named(
    package: str, source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(source)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_tokenizer(str(path))
