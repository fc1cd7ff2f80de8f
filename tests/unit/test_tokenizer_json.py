"""The files for transformers give transformers' own tokenizer our ids and our text."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.data.tokenizer_json import hf_tokenizer_files, tiktoken_json

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")
transformers = pytest.importorskip("transformers")

CODE = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "add_dummy_prefix": False,
}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "code": {**CODE, "user_defined_symbols": ["\n"]},
    "code_symbols": {**CODE, "user_defined_symbols": ["\n", "for", "<|fim|>", "\u2581\u2581\u2581"]},
    "code_unknown": {**CODE, "byte_fallback": False},
    "llama2": {**CODE, "add_dummy_prefix": True, "user_defined_symbols": ["\n"]},
    "collapsed": {"normalization_rule_name": "identity"},
    "bpe_defaults": {},
    "unigram_defaults": {"model_type": "unigram", "byte_fallback": False, "vocab_size": 120},
    "unigram_bytes": {"model_type": "unigram", "vocab_size": 360, **CODE, "user_defined_symbols": ["\n", "for"]},
}
PIECES = [
    *("a", "abc", "cad", "bede", "fore", "for", "=", "===", "x1", "12345", "A", "don't", "I'LL", "ß", "\u017f", "(", ")"),
    *(" ", "  ", "\n", "\t", "\r\n", "\n\n", " \n", "\u00a0", "\u3000", "\u2028", "\0", "\x07", "\x7f", "\x85", "\ufeff"),
    *("é", "ﬁ", "Å", "각", "語", "日本語", "안녕", "🙂", "👩\u200d👩\u200d👧", "🇫🇷", "١٢٣", "ก็"),
    *("\ufffd", "\u2581", "\U0010fffd"),
    *("</s>", "<s>", "<unk>", "<0x41>", "<|fim|>", "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<end>"),
]
MARKS = ["\u0301", "e\u0301", "\u0300\u0323", "\u0a01", "\u1112\u1161\u11ab"]


def corpus() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdef(){}=_<>/s", k=rng.randint(1, 6))) for _ in range(120)]
    words += ["é", "日本語", "for", "in", "12", "===", "don't"]
    return [" " * rng.choice([0, 0, 1, 2, 4, 8]) + " ".join(rng.choices(words, k=14)) for _ in range(250)]


def sentencepiece_model(**settings: Any) -> bytes:
    written = io.BytesIO()
    chosen = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 500, "hard_vocab_limit": False, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=written, minloglevel=2, **chosen)
    return written.getvalue()


def tiktoken_ranks(seed: int = 0) -> bytes:
    """Ranks of a random byte pair encoding."""
    rng = random.Random(seed)
    words = [word.encode() for word in (*PIECES, *" ".join(corpus()[:20]).split(), "  ", "    ")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 600:
        word = rng.choice(words)
        start = rng.randrange(len(word))
        token = word[start : start + rng.randint(2, 8)]
        if any(token[:cut] in ranks and token[cut:] in ranks for cut in range(1, len(token))):
            ranks.setdefault(token, len(ranks))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def tokenizer_json(kind: str) -> bytes:
    """A tokenizer.json that `tokenizers` has trained."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    special = ["<unk>", "<s>", "<end>"]
    if kind == "metaspace":
        tokenizer.model.byte_fallback, tokenizer.model.fuse_unk = True, True
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="first")]
        tokenizer.decoder, alphabet = tokenizers.decoders.Sequence(steps), []
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special[:3], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=700, pad_id=0, pad_token="<unk>")
    raw = json.loads(tokenizer.to_str())
    for name in special[3:]:  # not as added tokens, whose spelling would be taken out of the text
        raw["model"]["vocab"][name] = len(raw["model"]["vocab"])
    return json.dumps(raw).encode()


@cache
def ours(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return load_tokenizer("bytes")
    path = folder / kind / "tokenizer.json"
    path.parent.mkdir()
    if kind in ("bytelevel", "metaspace"):
        path.write_bytes(tokenizer_json(kind))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "clean_up_tokenization_spaces": False}
        path.with_name("tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(str(path))
    path = path.with_name("any.name")
    path.write_bytes(tiktoken_ranks() if kind == "tiktoken" else sentencepiece_model(**SENTENCEPIECE[kind]))
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def theirs(tokenizer: Tokenizer, folder: Path) -> Any:
    for name, content in hf_tokenizer_files(tokenizer, tokenizer.document_end).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as beside an exported model
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def random_text(rng: random.Random, pieces: list[str]) -> str:
    chosen = rng.choices(pieces, k=rng.randint(0, 60))
    if rng.random() < 0.2:
        chosen.insert(rng.randint(0, len(chosen)), rng.choice(" \t\n") * rng.randint(10, 3000))
    return "".join(chosen) + rng.randbytes(rng.randint(0, 5)).decode("utf-8", errors="replace")


KINDS = ["bytes", "tiktoken", "bytelevel", "metaspace", *SENTENCEPIECE]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids_and_our_text(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = ours(kind, folder)
    other = theirs(tokenizer, tmp_path)
    assert (other.eos_token_id, len(other)) == (tokenizer.document_end, tokenizer.vocab_size)
    # sentencepiece_json says what is left out here: marks after characters that a table replaces, and, for a unigram whose
    # pieces have such, runs of a character, which are cut by rounding.
    pieces = PIECES if kind in ("bpe_defaults", "unigram_defaults") else PIECES + MARKS
    for seed in range(120):
        text = random_text(random.Random(seed), pieces)
        if kind == "unigram_bytes":
            text = re.sub(r"(.)\1+", r"\1", text, flags=re.DOTALL)
        ids = tokenizer.encode(text).tolist()
        assert other.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, (kind, seed)
        if kind != "metaspace":  # Metaspace drops the space before each token of bytes, in both
            assert other.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), (kind, seed)
        ended = [tokenizer.document_end, *ids, tokenizer.document_end]
        assert other.decode(ended, skip_special_tokens=True) == tokenizer.decode(ended), (kind, seed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bytelevel", "metaspace")])
def test_nothing_is_put_before_a_text(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = ours(kind, folder)
    assert theirs(tokenizer, tmp_path)("for abc")["input_ids"] == tokenizer.encode("for abc").tolist()


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "bytelevel", "code", "code_symbols", "llama2", "unigram_bytes"])
def test_text_comes_back(kind: str, folder: Path) -> None:
    tokenizer = ours(kind, folder)
    for seed in range(60):
        text = random_text(random.Random(seed), PIECES + MARKS)
        if "\u2581" not in text or kind in ("bytes", "tiktoken", "bytelevel"):  # sentencepiece's sign for a space
            assert tokenizer.decode(tokenizer.encode(text)) == text, (kind, seed)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_kept_files_are_the_same_tokenizer(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = ours(kind, folder)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    for spec in (tmp_path / next(iter(tokenizer.files)), tmp_path):
        again = load_tokenizer(str(spec))
        assert (again.fingerprint, again.files) == (tokenizer.fingerprint, tokenizer.files)
        assert (again.vocab_size, again.document_end) == (tokenizer.vocab_size, tokenizer.document_end)


def test_an_exported_tokenizer_is_ours_again(folder: Path, tmp_path: Path) -> None:
    for kind in ("bytes", "tiktoken", "code"):
        tokenizer = ours(kind, folder)
        for name, content in hf_tokenizer_files(tokenizer, tokenizer.document_end).items():
            (tmp_path / name).write_bytes(content)
        again = load_tokenizer(str(tmp_path))
        assert (again.vocab_size, again.document_end) == (tokenizer.vocab_size, tokenizer.document_end)
        files = hf_tokenizer_files(tokenizer, tokenizer.document_end)
        assert hf_tokenizer_files(again, again.document_end) == files
        for seed in range(20):
            text = random_text(random.Random(seed), PIECES + MARKS)
            assert again.encode(text).tolist() == tokenizer.encode(text).tolist(), (kind, seed)


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "code"])
def test_the_first_token_is_the_one_that_the_model_knows(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = ours(kind, folder)
    assert theirs(tokenizer, tmp_path).bos_token_id == tokenizer.document_end
    if kind == "tiktoken":
        (tmp_path / "started").mkdir()
        for name, content in hf_tokenizer_files(tokenizer, tokenizer.document_end - 1).items():
            (tmp_path / "started" / name).write_bytes(content)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "started")
        assert (again.bos_token, again.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_overlapping_merges_are_taken_in_order() -> None:
    """Pieces that overlap themselves, such as aba in ababa, from few letters."""
    for seed in range(25):
        rng = random.Random(seed)
        ranks = {bytes([byte]): byte for byte in range(256)}
        grown = [b"a", b"b", b"c"]
        while len(ranks) < 256 + 12 + seed:
            token = rng.choice(grown) + rng.choice(grown)
            if token not in ranks and len(token) < 14:
                ranks[token] = len(ranks)
                grown.append(token)
        original = tiktoken.Encoding("small", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={})
        mirrored = tokenizers.Tokenizer.from_str(json.dumps(tiktoken_json(ranks)))
        for _ in range(40):
            text = "".join(rng.choices("aabbc", k=rng.randint(1, 120)))
            assert mirrored.encode(text).ids == original.encode_ordinary(text), (seed, text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "word", "byte_fallback": False}, "another model than bpe and unigram"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"control_symbols": ["~"]}, "control symbol of one character"),
        ({"user_defined_symbols": ["for"]}, "user-defined symbol 'for'; train it with both settings False"),
    ],
)
def test_what_cannot_be_mirrored_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**settings))
    with pytest.raises(ValueError, match=said):
        hf_tokenizer_files(load_tokenizer(str(tmp_path)), 2)
