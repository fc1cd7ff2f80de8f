"""Training a tokenizer: nothing is lost, white space is cheap, and data and checkpoints know which one they were made with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from titan.cli import main
from titan.config import Data, Source
from titan.data.dataset import TokenDataset
from titan.data.prepare import prepare
from titan.data.splits import prepared_tokenizer
from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.data.train_tokenizer import train_tokenizer

PARTS = [" ", "  ", "\n", "\t", "\r\n", "ab", "é", "語", "🙂", "ﬁ", "\0", "</s>", "<0x41>"]


def code(rng: random.Random, lines: int) -> str:
    """Text with the white space of code: deep indents, empty lines."""
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    return "".join(
        " " * 4 * rng.randint(0, 6) + " ".join(rng.choices(words, k=rng.randint(1, 6))) + ":\n" * rng.randint(1, 2)
        for _ in range(lines)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "small.model"
    path.write_bytes(train_tokenizer([code(random.Random(seed), 300) for seed in range(5)], 400))
    return load_tokenizer(str(path))


def test_decode_gives_back_any_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    assert tokenizer.vocab_size == 400
    for _ in range(200):
        text = "".join(rng.choices(PARTS, k=60))
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.document_end not in tokens
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b", "sentencepiece's own sign for a space"


def test_indents_and_line_ends_take_few_tokens(tokenizer: Tokenizer) -> None:
    text = code(random.Random(9), 200)
    indents = sum(len(line) - len(line.lstrip(" ")) for line in text.splitlines())
    spaces = sum(len(tokenizer.encode(line[: len(line) - len(line.lstrip(" "))])) for line in text.splitlines())
    assert spaces < indents / 6, "an indent of 4 to 24 spaces is a token or two"
    assert len(tokenizer.encode("a:\n")) < len(tokenizer.encode("a")) + 2, "a line's end goes with what stands before it"


def test_too_little_text_is_refused_with_what_it_has_room_for() -> None:
    with pytest.raises(ValueError, match=r"no vocabulary of 5000 tokens .* at most \d+"):
        train_tokenizer(["abc abd"], 5000)


def test_prepared_tokens_have_their_tokenizer_with_them(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    texts = {f"{i}.txt": code(random.Random(i), 120) for i in range(8)}
    for name, text in texts.items():
        (source / name).write_text(text)
    lines: list[str] = []

    def made(path: Path, tokenizer: str) -> Path:
        data = Data(tokenizer=tokenizer, cache=str(tmp_path / "cache"), validation_share=0.2)
        return prepare(Source(path=str(path)), data, lines.append)

    folder = made(source, "train:400")
    assert made(source, "train:400") == folder
    assert made(source, "train:410") != folder
    tokenizer = prepared_tokenizer(Data(path=str(folder), tokenizer="train:400"))
    data = TokenDataset(folder, "train")
    assert (data.tokenizer, data.vocab_size) == (tokenizer.fingerprint, 400)
    assert sum("training a tokenizer" in line for line in lines) == 2
    with pytest.raises(ValueError, match="holds tokens already"):
        made(folder, "train:400")
    assert made(folder, str(folder / "tokenizer.model")) == folder


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(code(random.Random(3), 500))
    out = tmp_path / "made" / "t.model"
    command = ["data", "train-tokenizer", str(tmp_path / "text.txt"), str(out), "--vocab-size", "350"]
    assert main(command) == 0
    assert "bytes a token" in capsys.readouterr().out
    assert load_tokenizer(str(out)).vocab_size == 350
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    for wrong, said in (
        (["data", "train-tokenizer", "nowhere.txt", str(tmp_path / "x.model")], "no 'nowhere.txt'; give a .txt, .jsonl"),
        (["data", "train-tokenizer", __file__, str(tmp_path / "x.model")], "ends in none of .txt"),
        (["data", "train-tokeniser"], "did you mean 'train-tokenizer'?"),
        ([*command[:3], str(tmp_path / "x.model"), "--vocab-siz", "9"], "did you mean '--vocab-size'?"),
        ([*command[:3], str(tmp_path / "x.model"), "--vocab-size", "9"], "more than 300"),
        ([*command[:3], str(tmp_path / "x.model"), "--vocab-size", "90000"], "at most"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.model").exists()
