from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from titan.data.dataset import TokenDataset, unigram_entropy
from titan.data.shard_writer import ShardWriter, write_shard
from titan.data.shards import ShardError, TokenShard


def random_documents(rng: np.random.Generator, count: int, vocab_size: int) -> list[np.ndarray]:
    return [rng.integers(0, vocab_size, rng.integers(1, 40)) for _ in range(count)]


def write(path: Path, documents: list[np.ndarray], vocab_size: int = 257, tokenizer: str = "t") -> None:
    write_shard(path, ((ids, 2 * len(ids)) for ids in documents), vocab_size=vocab_size, tokenizer=tokenizer)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        documents = [*random_documents(rng, int(rng.integers(0, 30)), vocab_size), np.array([vocab_size - 1])]
        path = tmp_path / f"train-{seed}.tokens"
        write(path, documents, vocab_size)
        shard = TokenShard(path)
        shard.verify()
        stream = np.concatenate(documents)
        assert shard.header.dtype == shard.tokens.dtype.name == dtype
        assert (shard.header.tokens, shard.header.documents) == (len(stream), len(documents))
        assert shard.header.bytes == 2 * len(stream)
        np.testing.assert_array_equal(shard.tokens, stream, f"seed {seed}")
        np.testing.assert_array_equal(shard.ends, np.cumsum([len(ids) for ids in documents]), f"seed {seed}")
    assert not list(tmp_path.glob(".*"))


def test_layout_is_the_documented_one(tmp_path: Path) -> None:
    write(tmp_path / "a.tokens", [np.array([1, 2, 256]), np.array([256])])
    raw = (tmp_path / "a.tokens").read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    assert raw[:8] == b"titan\0tk"
    assert raw[16 + length : 4096] == bytes(4096 - 16 - length)
    assert raw[4096:] == b"\1\0\2\0\0\1\0\1" + (3).to_bytes(8, "little") + (4).to_bytes(8, "little")


def test_shards_read_as_one_stream(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    documents = random_documents(rng, 40, 257)
    for index, start in enumerate(range(0, 40, 10)):
        write(tmp_path / f"train-{index:05d}.tokens", documents[start : start + 10])
    write(tmp_path / "validation-00000.tokens", documents[:1])
    dataset = pickle.loads(pickle.dumps(TokenDataset(tmp_path, "train")))
    stream = np.concatenate(documents)
    assert (dataset.tokens, dataset.documents, dataset.bytes) == (len(stream), 40, 2 * len(stream))
    for _ in range(300):
        start = int(rng.integers(0, len(stream) + 1))
        length = int(rng.integers(0, len(stream) - start + 1))
        read = dataset.read(start, length)
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, stream[start : start + length])
    for start, length in [(-1, 2), (0, len(stream) + 1), (len(stream), 1), (5, -1)]:
        with pytest.raises(IndexError, match="train holds"):
            dataset.read(start, length)
    np.testing.assert_array_equal(dataset.token_counts(), np.bincount(stream, minlength=257))


def test_documents_start_where_their_ends_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    starts, at = [], 0
    for index in range(4):
        documents = random_documents(rng, int(rng.integers(1, 6)), 257)
        write(tmp_path / f"train-{index:05d}.tokens", documents)
        for document in documents:
            starts.append(at)
            at += len(document)
    dataset = TokenDataset(tmp_path, "train")
    assert dataset.tokens == at
    for _ in range(300):
        start = int(rng.integers(0, at))
        length = int(rng.integers(1, at - start + 1))
        expected = sorted({0, *(place - start for place in starts if start <= place < start + length)})
        assert dataset.document_starts(start, length).tolist() == expected, (start, length)


def test_damaged_document_ends_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tokens"
    write(path, [np.arange(10)] * 4)
    raw = bytearray(path.read_bytes())
    raw[-24:-16] = (5).to_bytes(8, "little")  # 10, 5, 30, 40
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=r"train tokens from 0 .*ends that do not rise; the shard is damaged"):
        TokenDataset(tmp_path, "train").document_starts(0, 40)


def test_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    fingerprints = []
    for name, tokens in [("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [1, 3, 2])]:
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train-00000.tokens", [np.array(tokens)])
        fingerprints.append(TokenDataset(tmp_path / name, "train").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_damage_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    write(tmp_path / "whole.tokens", random_documents(rng, 25, 257))
    whole = (tmp_path / "whole.tokens").read_bytes()
    path = tmp_path / "damaged.tokens"
    header_bytes = 16 + int.from_bytes(whole[8:16], "little")
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[int(rng.integers(0, len(whole))) :]
        else:  # half of the flips hit the header, which is a small part of the file
            damaged[int(rng.integers(0, header_bytes if trial % 3 == 1 else len(whole)))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        print("trial", trial)
        with pytest.raises(ShardError, match=r"damaged\.tokens"):
            TokenShard(path).verify()
    path.write_bytes(whole)
    TokenShard(path).verify()
    path.write_bytes(whole + b"\0")
    with pytest.raises(ShardError, match="header asks for"):
        TokenShard(path)


def test_a_bit_between_tokens_and_ends_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    write(path, [np.array([1, 2, 3])])
    damaged = bytearray(path.read_bytes())
    damaged[4096 + 6] = 1
    path.write_bytes(damaged)
    with pytest.raises(ShardError, match="zeros after its tokens"):
        TokenShard(path).verify()


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (b"", "is not a token shard"),
        (b"PK\3\4" * 2000, "is not a token shard"),
        (b"titan\0tk" + b"\xff" * 5000, "cannot be"),
        (b"titan\0tk" + (2).to_bytes(8, "little") + b"[]" + bytes(4078), "exactly the fields"),
        (b"titan\0tk" + (900).to_bytes(8, "little") + b"[" * 900 + bytes(4078), "not JSON"),
        (b"titan\0tk" + (200_000).to_bytes(8, "little") + b"[" * 200_000, "not JSON"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, foreign: bytes, message: str) -> None:
    (tmp_path / "x.tokens").write_bytes(foreign)
    with pytest.raises(ShardError, match=message):
        TokenShard(tmp_path / "x.tokens")


def test_masked_shards(tmp_path: Path) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        path = tmp_path / f"train-{seed:05d}.tokens"
        documents = random_documents(rng, int(rng.integers(1, 30)), 257)
        masks = [rng.random(len(ids)) < 0.5 for ids in documents]
        with ShardWriter(path, vocab_size=257, tokenizer="t", masked=True) as writer:
            for ids, mask in zip(documents, masks, strict=True):
                cut = int(rng.integers(0, len(ids) + 1))
                place = writer.place()
                writer.add(ids[::-1], 7, ~mask)
                writer.back_to(place)  # as if it had not been
                writer.add(ids[:cut], 1, mask[:cut])
                writer.add(ids[cut:], 1, mask[cut:])
                writer.end_document()
            header = writer.finish()
        assert header is not None
        shard, stream, whole = TokenShard(path), np.concatenate(documents), np.concatenate(masks)
        shard.verify()
        assert (header.version, header.bytes, header.documents) == (2, 2 * len(documents), len(documents))
        np.testing.assert_array_equal(shard.tokens, stream)
        np.testing.assert_array_equal(shard.ends, np.cumsum([len(ids) for ids in documents]))
        for _ in range(20):
            start, end = sorted(rng.integers(0, len(stream) + 1, 2).tolist())
            np.testing.assert_array_equal(shard.counted(start, end), whole[start:end])
        damaged = bytearray(path.read_bytes())
        place_of_bits = 4096 + -(-2 * len(stream) // 8) * 8 + int(rng.integers(0, -(-len(stream) // 8)))
        damaged[place_of_bits] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="checksum"):
            TokenShard(path).verify()


def test_header_is_checked_by_type_and_value(tmp_path: Path) -> None:
    write(tmp_path / "x.tokens", [np.array([1])])
    raw = (tmp_path / "x.tokens").read_bytes()
    changes = [
        (b'"version":1', b'"version":3', "version 3"),
        (b'"version":1', b'"version":2', "header asks for"),
        (b'"documents":1', b'"documents":0', "impossible counts"),
        (b'"documents":1', b'"documents":true', "in their types"),
        (b'"tokens":1,', b'"tokens":1.0,', "in their types"),
        (b'"uint16"', b'"object"', "dtype 'object'"),
        (b'"vocab_size":257', b'"vocab_size":70000', "does not go with 70000"),
    ]
    for old, new, message in changes:
        assert old in raw
        header = raw[16 : 16 + int.from_bytes(raw[8:16], "little")].replace(old, new)
        start = raw[:8] + len(header).to_bytes(8, "little") + header
        (tmp_path / "x.tokens").write_bytes(start.ljust(4096, b"\0") + raw[4096:])
        with pytest.raises(ShardError, match=message):
            TokenShard(tmp_path / "x.tokens")


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    for documents in ([], [np.array([1]), np.array([], dtype=int)], [np.array([257])], [np.array([-1])]):
        with pytest.raises(ValueError, match=r"x\.tokens"):
            write(tmp_path / "x.tokens", documents)
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_of_one_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no train data"):
        TokenDataset(tmp_path, "train")
    write(tmp_path / "train-00000.tokens", [np.array([1])])
    write(tmp_path / "train-00001.tokens", [np.array([1])], tokenizer="another")
    with pytest.raises(ShardError, match=r"train-00001.*another tokenizer"):
        TokenDataset(tmp_path, "train")


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 0, 5, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 7])) == 0
