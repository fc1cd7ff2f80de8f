"""Preparing in pieces: the same bytes for any number of workers; bad rows told, skipped or fatal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from texts import BAD, ROOT, contents, silent, texts_in, write_bad, write_chats, write_rows

from titan.cli import main
from titan.commands.data import slurm_task
from titan.config import Data, Source
from titan.data.corpora import CorpusError, open_corpus
from titan.data.encode import refuse
from titan.data.held_out import texts
from titan.data.prepare import PieceShare, prepare


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, small_pieces: None) -> None:
    texts = write_rows(tmp_path / "rows", 0)
    found = []
    for workers in (1, 2, 5):
        lines: list[str] = []
        data = Data(cache=str(tmp_path / f"cache{workers}"), validation_share=0.1)
        folder = prepare(Source(path=str(tmp_path / "rows")), data, lines.append, workers)
        found.append(contents(folder))
        assert [file.name for file in folder.parent.iterdir()] == [folder.name]
        empty = f"data: {texts.count('')} empty documents left out, see {folder}/left_out.txt"
        assert empty in lines
        assert (folder / "left_out.txt").read_text().count(" is empty\n") == texts.count("")
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 12
    train, held_out = texts_in(folder, "train"), texts_in(folder, "validation")
    assert sorted(train + held_out) == sorted(text for text in texts if text)
    assert train == [text for text in texts if text in set(train) and text], "in the order of the files"
    assert not set(train) & set(held_out), "copies are on one side"
    assert len(held_out) == pytest.approx(len(texts) / 10, rel=0.4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_with_its_line_or_is_left_out_and_listed(tmp_path: Path, workers: int, small_pieces: None) -> None:
    good = write_bad(tmp_path / "rows")
    source = Source(path=str(tmp_path / "rows" / "a.jsonl"))
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r'^data\.path: .*a\.jsonl:12504 is not UTF-8 \(.*set data\.on_bad = "skip"'):
        prepare(source, Data(cache=str(cache), validation_share=0), silent, workers)
    lines: list[str] = []
    skip = Data(cache=str(cache), validation_share=0, on_bad="skip")
    folder = prepare(source, skip, lines.append, workers)
    assert texts_in(folder, "train") == good
    listed = (folder / "left_out.txt").read_text().splitlines()
    assert len(listed) == len(BAD)
    for line, (number, (_, why)) in zip(listed, sorted(BAD.items()), strict=True):
        assert line.startswith(f"{source.path}:{12_501 + number} {why}")
    warning = next(line for line in lines if "WARNING" in line)
    assert "7 rows left out (1 field missing, 2 no JSON, 1 no Unicode, 1 no object, 1 not UTF-8, 1 wrong type)" in warning
    assert warning.endswith(f"see {folder}/left_out.txt:")
    assert sum(line.startswith("data:   ") for line in lines) == 5
    assert prepare(source, skip, silent, workers) == folder
    with pytest.raises(ValueError, match=r"^data\.on_bad: 7 rows of .* were left out .*left_out\.txt.*mend them"):
        prepare(source, Data(cache=str(cache), validation_share=0), silent, workers)


def test_nothing_but_bad_rows_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"^data\.path: .*holds no text: 1 empty, left out {'field missing': 1}"):
        prepare(Source(path=str(tmp_path / "a.jsonl")), Data(cache=str(tmp_path / "c"), on_bad="skip"), silent)


@pytest.mark.parametrize("share", [1e-6, 0.2, 1 - 1e-9, 1.0])
def test_each_side_gets_a_document(tmp_path: Path, small_pieces: None, share: float) -> None:
    texts = sorted({text for text in write_rows(tmp_path / "rows", 4) if text})
    data = Data(cache=str(tmp_path / "cache"), validation_share=share)
    folder = prepare(Source(path=str(tmp_path / "rows")), data, silent, 1)
    sides = [set(texts_in(folder, split)) for split in ("train", "validation")]
    assert all(sides)
    assert sides[0] | sides[1] == set(texts)
    assert not sides[0] & sides[1]
    if share != 0.2:
        assert min(map(len, sides)) == 1
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n' * 3)
    folder = prepare(Source(path=str(tmp_path / "one.jsonl")), data, silent, 1)
    assert (texts_in(folder, "train"), texts_in(folder, "validation")) == (["alone"] * 3, [])


def test_tasks_share_the_pieces_out(tmp_path: Path, small_pieces: None) -> None:
    write_rows(tmp_path / "rows", 5)
    source = Source(path=str(tmp_path / "rows"))
    wanted = contents(prepare(source, Data(cache=str(tmp_path / "alone"), validation_share=0.1), silent, 1))
    data = Data(cache=str(tmp_path / "shared"), validation_share=0.1)
    for number in (2, 0, 1):
        folder = prepare(source, data, silent, 1, PieceShare(number, 3))
        assert folder.is_dir() == (number == 1), "the last one puts it in its place"
    assert contents(folder) == wanted
    assert [file.name for file in (tmp_path / "shared").iterdir()] == [folder.name]
    assert slurm_task({}) == (0, 1)
    assert slurm_task({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}) == (3, 8)


def test_a_folder_is_read_whole_or_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "elsewhere", 12, files=1)
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "deep" / "a.txt").write_text("a document")
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "deep" / "circle").symlink_to(tmp_path / "rows")
    (tmp_path / "rows" / "README.md").write_text("not this")
    lines: list[str] = []
    corpus = open_corpus(str(tmp_path / "rows"), lines.append)
    assert list(corpus.texts) == ["deep/a.txt", "linked/0.jsonl"]
    assert lines == [f"data: of {tmp_path}/rows, 1 other file is not read"]
    (tmp_path / "rows" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(CorpusError, match=r"gone\.jsonl is no file, or a link that leads nowhere"):
        open_corpus(str(tmp_path / "rows"), silent)


def test_a_tokenizer_learns_from_the_training_side(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 15)
    data = Data(cache=str(tmp_path / "cache"), validation_share=0.3)
    folder = prepare(Source(path=str(tmp_path / "rows")), data, silent)
    corpus = open_corpus(str(tmp_path / "rows"), silent)
    for split, held_out in (("train", False), ("validation", True)):
        assert list(texts(corpus, "text", 0.3, held_out, refuse)) == texts_in(folder, split)
    write_bad(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"^data\.path: .*a\.jsonl:12504 is not UTF-8"):
        prepare(Source(path=str(tmp_path / "bad")), Data(cache=str(tmp_path / "cache"), tokenizer="train:400"), silent)


def test_more_bad_rows_than_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 1500)
    data = Data(cache=str(tmp_path / "cache"), on_bad="skip", validation_share=0)
    folder = prepare(Source(path=str(tmp_path / "a.jsonl")), data, silent)
    listed = (folder / "left_out.txt").read_text().splitlines()
    assert len(listed) == 1001
    assert listed[-1] == "and 500 more rows: of a piece only the first 1,000 are listed"


def test_keys_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 16)
    cache: dict[str, Any] = {"cache": str(tmp_path / "cache")}
    tokens = prepare(Source(path=str(tmp_path / "rows")), Data(**cache), silent)
    write_chats(tmp_path / "chats")
    template: dict[str, Any] = {"chat_template": str(tmp_path / "chats" / "template.jinja")}
    chats = Source(path=str(tmp_path / "chats" / "chat.jsonl"), content="chat")
    masked = prepare(chats, Data(**cache, **template), silent)
    assert prepare(Source(path=str(masked), content="chat"), Data(**cache), silent) == masked
    (tmp_path / "chats" / "LICENSE.txt").write_text("no conversation")
    for source, said in (
        (Source(path=str(tokens), column="x"), r"data\.column: .* holds tokens already, which have no 'x'"),
        (Source(path=str(tokens), content="chat"), r"data\.content: the tokens of .* do not say which of them count"),
        (Source(path="builtin:topics", column="x"), r"data\.column: builtin:topics holds texts, which have no 'x'"),
        (Source(path=str(tmp_path / "chats"), content="chat"), r"data\.path: LICENSE\.txt holds text, not conversations"),
    ):
        with pytest.raises(ValueError, match="^" + said):
            prepare(source, Data(**cache, **template), silent)
    (tmp_path / "rows" / "model.bin").write_bytes(b"not tokens")
    assert prepare(Source(path=str(tmp_path / "rows")), Data(**cache), silent) == tokens, "text, though a .bin lies beside it"


def test_the_command_prepares_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows", 9)
    config = str(ROOT / "train_configs" / "debug.toml")
    words = [f"--data.path={tmp_path}/rows/[0-2].jsonl", "--data.tokenizer=bytes", f"--data.cache={tmp_path}/cache"]
    assert main(["data", "prepare", config, *words, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "3 files" in out
    assert "data: train has 1,1" in out
    assert out.rstrip().endswith(": ready")
    assert main(["data", "prepare", config, *words, "--data.path=nothing/*.jsonl"]) == 2
    assert "no file matches 'nothing/*.jsonl'" in capsys.readouterr().err
    assert main(["data", "prepare", config, *words, "--workers", "0"]) == 2
    (tmp_path / "rows" / "1.jsonl").write_text('{"text": "x"}\nnot json\n')
    assert main(["data", "prepare", config, *words]) == 2
    assert "1.jsonl:2 is no JSON" in capsys.readouterr().err


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    texts = [text for text in write_rows(tmp_path / "rows", 10) if text]
    data = Data(cache=str(tmp_path / "cache"), validation_share=0)
    folder = prepare(Source(path=f"hf:{tmp_path / 'rows'}"), data, silent)
    assert texts_in(folder, "train") == texts
    with pytest.raises(ValueError, match=r"^data\.path: hf:.*cannot be loaded"):
        prepare(Source(path=f"hf:{tmp_path / 'rows'}::nothing"), data, silent)


def test_what_cannot_be_read_is_an_error_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"^data\.path: .*a\.parquet is no Parquet file") as caught:
        prepare(Source(path=str(tmp_path / "a.parquet")), Data(cache=str(tmp_path / "cache")), silent)
    assert isinstance(caught.value.__cause__, CorpusError)
