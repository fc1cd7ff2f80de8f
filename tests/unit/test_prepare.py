from __future__ import annotations

import importlib
import multiprocessing
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titan.config import Data, Source, Training
from titan.data import corpora, held_out
from titan.data import pieces as pieces_module
from titan.data import prepare as module
from titan.data.dataset import TokenDataset
from titan.data.shard_writer import write_shard
from titan.data.shards import ShardError, TokenShard
from titan.data.splits import open_splits
from titan.data.tokenizer import BytesTokenizer, load_tokenizer

FORK = multiprocessing.get_context("fork")


def silent(line: str) -> None:
    pass


def prepare(
    path: str | Path, tokenizer: str, cache: str | Path, share: float, report: Callable[[str], None], **others: Any
) -> Path:
    own = {key: others.pop(key) for key in ("column", "content") if key in others}
    how = {key: others.pop(key) for key in ("workers", "share") if key in others}
    data = Data(tokenizer=tokenizer, cache=str(cache), validation_share=share, **others)
    return module.prepare(Source(path=str(path), **own), data, report, **how)


def write_texts(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    rng = random.Random(seed)
    texts = {}
    for index in range(count):
        name = f"{rng.choice(['', 'a/', 'b/c/'])}{index:03d}.txt"
        texts[name] = "".join(rng.choices("abc é語\r\n", k=rng.randint(1, 60) if index else 0))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(texts[name].encode())
    return texts


def documents_of(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer("bytes")
    texts = []
    for path in sorted(folder.glob(f"{split}-*.tokens")):
        shard = TokenShard(path)
        shard.verify()
        for ids in np.split(shard.tokens, shard.ends[:-1].astype(int)):
            assert ids[-1] == tokenizer.document_end
            texts.append(tokenizer.decode(ids))
    return texts


def sides(names: list[str], share: float) -> tuple[list[str], list[str]]:
    """(train, held out) of these documents."""
    places = [held_out.place_of(name) for name in names]
    bound = held_out.bound_of(min(places), max(places), share)
    return tuple([name for name, at in zip(names, places, strict=True) if (at < bound) == side] for side in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize("smallest", [1 << 24, 300])
def test_texts_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int) -> None:
    monkeypatch.setattr(pieces_module, "SMALLEST", smallest)
    texts = write_texts(tmp_path / "texts", 60)
    lines: list[str] = []
    folder = prepare(tmp_path / "texts", "bytes", tmp_path / "cache", 0.2, lines.append, workers=1)
    full = [name for name in sorted(texts) if texts[name]]
    train, validation = sides(full, 0.2)
    assert documents_of(folder, "train") == [texts[name] for name in train]
    assert documents_of(folder, "validation") == [texts[name] for name in validation]
    assert TokenDataset(folder, "train").bytes == sum(len(texts[name].encode()) for name in train)
    files = len(list(folder.glob("train-*")))
    assert files > 5 if smallest == 300 else files == 1
    assert any("59 documents (1 empty left out)" in line for line in lines)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_prepared_once_and_again_when_anything_changes(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", 8)
    source, cache = str(tmp_path / "texts"), str(tmp_path / "cache")
    first = prepare(source, "bytes", cache, 0.1, silent)
    stamp = first.stat().st_mtime_ns
    lines: list[str] = []
    assert prepare(source, "bytes", cache, 0.1, lines.append) == first
    assert (lines, first.stat().st_mtime_ns) == ([], stamp)
    assert prepare(str(first), "bytes", cache, 0.9, silent) == first
    folders = {first, prepare(source, "bytes", cache, 0.2, silent)}
    (tmp_path / "texts" / "more.txt").write_text("more")
    folders.add(prepare(source, "bytes", cache, 0.1, silent))
    assert len(folders) == 3


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000.tokens", [(np.array([1]), 1)], vocab_size=9, tokenizer="0123456789abcdef")
    with pytest.raises(ValueError, match=r"data\.tokenizer.*0123456789ab.*'bytes' is " + BytesTokenizer.fingerprint[:12]):
        prepare(str(tmp_path), "bytes", str(tmp_path / "cache"), 0.1, silent)
    (tmp_path / "train-00000.tokens").write_bytes(b"junk")
    with pytest.raises(ShardError, match="train-00000"):
        prepare(str(tmp_path), "bytes", str(tmp_path / "cache"), 0.1, silent)


def test_held_out_share() -> None:
    rng = random.Random(0)
    names = [f"document {index}" for index in range(5000)]
    train, validation = sides(names, 0.1)
    assert len(validation) == pytest.approx(500, rel=0.15)
    assert sorted(train + validation) == sorted(names)
    shuffled = rng.sample(names, len(names))
    assert set(sides(shuffled, 0.1)[1]) == set(validation)
    assert set(sides(names[:2500], 0.1)[1]) <= set(validation)
    for share in (1e-9, 0.5, 1.0):
        for count in (2, 3, 10):
            assert all(sides(rng.sample(names, count), share)), (share, count)
    assert sides(names, 0.0) == (names, [])
    assert sides(["alone"], 1.0) == (["alone"], [])


def test_one_file_holds_nothing_out_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one document")
    lines: list[str] = []
    folder = prepare(str(tmp_path / "one.txt"), "bytes", str(tmp_path / "cache"), 0.1, lines.append)
    assert documents_of(folder, "train") == ["only one document"]
    assert any("nothing is held out" in line for line in lines)
    assert "data: train has 1 document, 18 tokens" in lines


def test_splits_without_a_sample_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 40)
    folder = prepare(str(tmp_path / "one.txt"), "bytes", str(tmp_path / "cache"), 0.1, silent)
    splits = open_splits(Data(path=str(folder)), BytesTokenizer(), Training(seq_len=40), validate=False)
    assert (splits.train.datasets[0].tokens, splits.validation) == (41, None)
    with pytest.raises(ValueError, match=r"^validation\.interval: .*--validation\.interval=0"):
        open_splits(Data(path=str(folder)), BytesTokenizer(), Training(seq_len=40), validate=True)
    with pytest.raises(ValueError, match=r"^training\.seq_len: the train split holds 41 tokens.* = 42 .*more text"):
        open_splits(Data(path=str(folder)), BytesTokenizer(), Training(seq_len=41), validate=False)
    write_texts(tmp_path / "texts", 30)
    folder = prepare(str(tmp_path / "texts"), "bytes", str(tmp_path / "cache"), 0.01, silent)
    with pytest.raises(ValueError, match=r"the validation split holds .*--validation\.interval=0"):
        open_splits(Data(path=str(folder)), BytesTokenizer(), Training(seq_len=150), validate=True)


def test_a_cache_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("text")
    lines: list[str] = []
    for cache in ("/proc/cache", str(tmp_path / "one.txt" / "cache")):
        with pytest.raises(ValueError, match=f"data.cache: {cache} cannot be written"):
            prepare(str(tmp_path / "one.txt"), "bytes", cache, 0.1, lines.append)
    assert not lines


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    def refused(path: Path | str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            prepare(str(path), "bytes", str(tmp_path / "cache"), 0.1, silent)

    refused(tmp_path / "nowhere", ValueError, r"data\.path.*token shards.*builtin:topics")
    refused("builtin:nothing", ValueError, r"builtin:topics or builtin:stdlib")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", ValueError, r"data\.path.*no file whose name ends in \.txt, \.jsonl")
    (tmp_path / "image.png").write_bytes(b"x")
    refused(tmp_path / "image.png", ValueError, r"data\.path.*image\.png.*ends in none of \.txt, \.jsonl")
    (tmp_path / "folder" / "empty.txt").touch()
    refused(tmp_path / "folder", ValueError, "holds no text, only 1 empty")
    (tmp_path / "folder" / "latin.txt").write_bytes(b"caf\xe9")
    refused(tmp_path / "folder", ValueError, r"latin\.txt is not UTF-8")
    assert not list((tmp_path / "cache").iterdir())


def test_builtin_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = corpora.open_corpus("builtin:topics", silent)
    assert list(topics.texts) == sorted(topics.texts)
    assert len(topics.texts) > 50
    for name in ("a.py", "test/b.py", "pkg/tests/c.py", "site-packages/d.py", "pkg/e.py", "idlelib/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    lines: list[str] = []
    assert corpora.stdlib(tmp_path, lines.append).texts == {"a.py": "# a.py\n", "pkg/e.py": "# pkg/e.py\n"}
    assert "1 files" in lines[0]

    def lacking(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", lacking)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert corpora.open_corpus("builtin:topics", lines.append).name == "stdlib"
    assert "lacks pydoc_data.topics" in lines[1]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no sources.*give a \.txt file"):
        corpora.open_corpus("builtin:topics", silent)


def test_two_at_once_end_with_one_folder(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", 150)
    start, results = FORK.Barrier(3), FORK.Queue()

    def run() -> None:
        start.wait(20)
        results.put(prepare(str(tmp_path / "texts"), "bytes", str(tmp_path / "cache"), 0.1, silent))

    processes = [FORK.Process(target=run, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    assert len(folders) == 1
    assert list((tmp_path / "cache").iterdir()) == list(folders)
    assert len(documents_of(folders.pop(), "train")) > 100
