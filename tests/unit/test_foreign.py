"""Token files of other programs, built here from their published layouts: read as they lie, refused where damaged."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from titan.data.dataset import TokenDataset
from titan.data.foreign import Unsaid
from titan.data.formats import open_file, token_files
from titan.data.shards import ShardError

VOCABULARY, END = 300, 256
UNSAID = Unsaid(VOCABULARY, "t", END, "uint16")
Documents = list[np.ndarray]


def megatron(path: Path, documents: Documents, draw: np.random.Generator) -> list[Path]:
    """Documents of one or more sequences each."""
    code, dtype = [(8, "<u2"), (4, "<i4"), (5, "<i8")][int(draw.integers(3))]
    sequences: list[np.ndarray] = []
    first = [0]
    for document in documents:
        cuts = sorted(set(draw.integers(1, len(document) + 1, int(draw.integers(0, 3))).tolist()) - {len(document)})
        sequences += np.split(document, cuts)
        first.append(len(sequences))
    lengths = np.array([len(one) for one in sequences])
    starts = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(first))
    index = header + lengths.astype("<i4").tobytes() + starts.astype("<i8").tobytes() + np.array(first).astype("<i8").tobytes()
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(index + bytes(len(sequences) * int(draw.integers(2))))
    return [path.with_suffix(".bin"), path.with_suffix(".idx")]


def datatrove(path: Path, documents: Documents, draw: np.random.Generator) -> list[Path]:
    tokens, index = path.with_suffix(".ds"), path.with_suffix(".ds.index")
    tokens.write_bytes(np.concatenate(documents).astype(["<u2", "<u4"][int(draw.integers(2))]).tobytes())
    index.write_bytes(np.cumsum([len(one) for one in documents]).astype("<u8").tobytes())
    path.with_suffix(".ds.metadata").write_text("gpt2|2\n1\n1 T")
    return [tokens, index]


def llm_c(path: Path, documents: Documents, draw: np.random.Generator, llama: bool = False) -> list[Path]:
    magic, version, dtype = (20240801, 7, "<u4") if llama else (20240520, 1, "<u2")
    tokens = np.concatenate(documents)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.with_suffix(".bin").write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return [path.with_suffix(".bin")]


def nano_gpt(path: Path, documents: Documents, draw: np.random.Generator) -> list[Path]:
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    return [path.with_suffix(".bin")]


WRITERS = [megatron, datatrove, llm_c, nano_gpt]
Writer = Callable[[Path, Documents, np.random.Generator], list[Path]]


def random_documents(draw: np.random.Generator, count: int, writer: object = None) -> Documents:
    """Each ends with END; llm.c's begin with it."""
    documents = [np.append(draw.integers(0, END, draw.integers(0, 30)), END) for _ in range(count)]
    return [np.roll(document, 1) for document in documents] if writer is llm_c else documents


@pytest.mark.parametrize("writer", WRITERS)
def test_every_window_is_what_was_written(tmp_path: Path, writer: Writer) -> None:
    """Random windows over several files: the tokens, and where documents start; also in a copy sent to a worker."""
    for seed in range(6):
        draw = np.random.default_rng(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        documents: Documents = []
        for number in range(int(draw.integers(1, 4))):
            documents += (new := random_documents(draw, int(draw.integers(1, 20)), writer))
            writer(folder / f"part-{number}", new, draw)
        data = pickle.loads(pickle.dumps(TokenDataset(folder, "train", UNSAID)))
        stream = np.concatenate(documents)
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        assert (data.tokens, data.bytes, data.vocab_size, data.tokenizer) == (len(stream), None, VOCABULARY, "t")
        for shard in data.shards:
            shard.verify()
        for _ in range(200):
            start = int(draw.integers(0, len(stream)))
            length = int(draw.integers(1, len(stream) - start + 1))
            read = data.read(start, length)
            assert read.dtype == np.int64
            assert (read == stream[start : start + length]).all()
            expected = starts[(starts > start) & (starts < start + length)] - start
            assert data.document_starts(start, length).tolist() == [0, *expected]


@pytest.mark.parametrize("writer", WRITERS)
def test_damage_is_an_error_or_costs_nothing(tmp_path: Path, writer: Writer) -> None:
    """2,000 truncations and flipped bits: each is an error that names the file, or every token is what stands in the file."""
    draw = np.random.default_rng(0)
    documents = random_documents(draw, 12, writer)
    files = writer(tmp_path / "part", documents, draw)
    whole = {file: file.read_bytes() for file in files}
    plain = np.concatenate(documents)
    width = TokenDataset(files[0], "train", UNSAID).shards[0].tokens.itemsize
    errors: list[str] = []
    for _ in range(2000):
        file = files[int(draw.integers(len(files)))]
        data = bytearray(whole[file])
        in_tokens = False
        if draw.random() < 0.3:
            del data[int(draw.integers(len(data))) :]
        else:
            at = int(draw.integers(len(data)))
            data[at] ^= 1 << int(draw.integers(8))
            in_tokens = file == files[0] and at >= len(data) - width * len(plain)
        file.write_bytes(data)
        try:
            dataset = TokenDataset(files[0], "train", UNSAID)
            if draw.random() < 0.5:  # else as a run reads them
                dataset.shards[0].verify()
            dataset.token_counts()
            read = dataset.read(0, dataset.tokens)
            for start in range(0, dataset.tokens - 7, 7):
                dataset.document_starts(start, 8)
        except ShardError as error:
            errors.append(str(error))
        else:
            if in_tokens:
                stored = np.frombuffer(bytes(data[-width * len(plain) :]), dataset.shards[0].tokens.dtype)
                assert (read == stored).all()
            elif len(read) == len(plain) and dataset.shards[0].tokens.itemsize == width:
                assert (read == plain).all()
            else:  # raw tokens carry no length of their own
                assert writer is nano_gpt
                assert (read == plain[: len(read)]).all()
        file.write_bytes(whole[file])
    assert len(errors) > 500
    assert all(str(tmp_path) in error for error in errors)


def test_a_name_says_the_split_or_the_end_is_held_out(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    names = ("fineweb_train_1", "fineweb_train_2", "fineweb_val_0", "test")
    parts = {name: random_documents(draw, 40, llm_c) for name in names}
    for name, documents in parts.items():
        llm_c(tmp_path / name, documents, draw)
    train = TokenDataset(tmp_path, "train", UNSAID, held_out=0.1)
    expected = np.concatenate(parts["fineweb_train_1"] + parts["fineweb_train_2"])
    assert (train.read(0, train.tokens) == expected).all()
    validation = TokenDataset(tmp_path, "validation", UNSAID, held_out=0.1)
    assert (validation.read(0, validation.tokens) == np.concatenate(parts["fineweb_val_0"])).all()

    alone = tmp_path / "fineweb_train_1.bin"
    stream = np.concatenate(parts["fineweb_train_1"])
    train, validation = (TokenDataset(alone, split, UNSAID, held_out=0.2) for split in ("train", "validation"))
    both = np.concatenate([train.read(0, train.tokens), validation.read(0, validation.tokens)])
    assert (both == stream).all()
    assert validation.read(0, 1) == END, "a document is cut"
    assert 0.8 <= train.tokens / len(stream) < 0.9
    assert len({train.fingerprint, validation.fingerprint, TokenDataset(alone, "train", UNSAID).fingerprint}) == 3
    with pytest.raises(ShardError, match="nothing of it is validation data"):
        TokenDataset(alone, "validation", UNSAID)


def test_a_path_may_be_a_folder_a_file_or_the_common_part_of_two_names(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    files = megatron(tmp_path / "text_document", random_documents(draw, 5), draw)
    for path in (tmp_path, tmp_path / "text_document", *files):
        assert token_files(path) == [tmp_path / "text_document.bin"]
    assert token_files(tmp_path / "nothing") == []
    datatrove(tmp_path / "more", random_documents(draw, 5), draw)
    with pytest.raises(ShardError, match=r"holds datatrove's \.ds and Megatron's"):
        token_files(tmp_path)


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    documents = random_documents(draw, 5)
    (raw,) = nano_gpt(tmp_path / "raw", documents, draw)
    with pytest.raises(ShardError, match=r"raw.bin: does not say of what type.*data.dtype = \"uint16\""):
        open_file(raw, Unsaid(VOCABULARY, "t", END))
    (questions,) = llm_c(tmp_path / "questions", documents, draw)
    questions.write_bytes(np.array([20240522], "<i4").tobytes() + questions.read_bytes()[4:])
    with pytest.raises(ShardError, match="evaluation files"):
        open_file(questions, UNSAID)
    tokens, index = datatrove(tmp_path / "masked", documents, draw)
    (tmp_path / "masked.ds.loss").touch()
    with pytest.raises(ShardError, match="mask of the loss"):
        open_file(tokens, UNSAID)
    (tmp_path / "masked.ds.loss").unlink()
    index.unlink()
    with pytest.raises(ShardError, match=r"masked.ds: masked.ds.index is missing"):
        open_file(tokens, UNSAID)
    small = TokenDataset(raw, "train", Unsaid(200, "t", END, "uint16"))
    with pytest.raises(ShardError, match="holds token 256, outside the vocabulary of 200"):
        small.token_counts()


def test_llama_3_files_of_llm_c_are_divided_by_what_begins_a_document(tmp_path: Path) -> None:
    """Their tokenizer's end, 128001, never stands in them."""
    draw = np.random.default_rng(4)
    documents = [np.insert(draw.integers(0, 1000, draw.integers(0, 30)), 0, 128_000) for _ in range(20)]
    llm_c(tmp_path / "part", documents, draw, llama=True)
    data = TokenDataset(tmp_path, "train", Unsaid(128_256, "t", 128_001))
    assert data.document_starts(0, data.tokens).tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()


def test_another_type_or_end_makes_other_data(tmp_path: Path) -> None:
    """What was packed for the one must not serve the other: the same bytes are then cut elsewhere."""
    draw = np.random.default_rng(5)
    for name in ("train", "val"):
        nano_gpt(tmp_path / name, random_documents(draw, 40), draw)
    prints = {
        TokenDataset(tmp_path, "train", Unsaid(2**32, "t", end, dtype)).fingerprint
        for end, dtype in ((END, "uint16"), (7, "uint16"), (END, "uint8"))
    }
    assert len(prints) == 3


def test_empty_documents_are_no_documents(tmp_path: Path) -> None:
    """At the beginning of a second file, and between others."""
    draw = np.random.default_rng(6)
    for name, lengths in (("a", (3, 2)), ("b", (0, 4, 0, 0, 3))):
        tokens = np.arange(sum(lengths), dtype="<u2")
        starts = np.cumsum([0, *lengths])
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        index += np.array(lengths, "<i4").tobytes() + (2 * starts[:-1]).astype("<i8").tobytes()
        (tmp_path / f"{name}.idx").write_bytes(index + np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        (tmp_path / f"{name}.bin").write_bytes(tokens.tobytes())
    data = TokenDataset(tmp_path, "train", UNSAID)
    assert data.document_starts(0, 12).tolist() == [0, 3, 5, 9]
    (tmp_path / "ds").mkdir()
    tokens_file, index_file = datatrove(tmp_path / "ds" / "a", random_documents(draw, 3), draw)
    ends = np.frombuffer(index_file.read_bytes(), "<u8")
    index_file.write_bytes(np.insert(ends, 1, ends[0]).tobytes())
    (tmp_path / "ds" / "b_unshuffled.ds").touch()  # a task that had nothing to do
    data = TokenDataset(tmp_path / "ds", "train", UNSAID)
    assert [len(part) for part in data.document_lengths()] == [3]
    data.shards[0].verify()
    assert tokens_file.exists()


def test_text_beside_a_bin_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(bytes(8))
    assert token_files(tmp_path) == []
