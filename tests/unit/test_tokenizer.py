from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece

from titan.data.tokenizer import load_tokenizer


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


@pytest.mark.parametrize("spelling", ["</s>", "<s>", "<unk>", "ab </s> cd"])
def test_special_spellings_are_text(model: Path, spelling: str) -> None:
    tokenizer = load_tokenizer(str(model))
    tokens = tokenizer.encode(spelling)
    assert not {0, 1, 2} & set(tokens.tolist())
    assert tokenizer.decode(tokens) == spelling


def test_fingerprints_tell_tokenizers_apart(model: Path, tmp_path: Path) -> None:
    same = tmp_path / "other_name.model"
    same.write_bytes(model.read_bytes())
    assert load_tokenizer(str(same)).fingerprint == load_tokenizer(str(model)).fingerprint
    assert load_tokenizer(str(model)).fingerprint != load_tokenizer("bytes").fingerprint


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer.*nowhere\.model"):
        load_tokenizer(str(tmp_path / "nowhere.model"))
    (tmp_path / "foreign.model").write_bytes(b"this is no model")
    with pytest.raises(ValueError, match=r"data\.tokenizer.*foreign\.model"):
        load_tokenizer(str(tmp_path / "foreign.model"))


def test_model_without_document_end_is_refused(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=written, vocab_size=7, model_type="char", eos_id=-1, minloglevel=2
    )
    (tmp_path / "endless.model").write_bytes(written.getvalue())
    with pytest.raises(ValueError, match=r"endless\.model has no end-of-sentence token"):
        load_tokenizer(str(tmp_path / "endless.model"))
