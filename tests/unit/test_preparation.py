"""Preparing in pieces: the same bytes for any number of workers and after any kill; bad rows told, skipped or fatal."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titan.cli import main
from titan.commands.data import slurm_task
from titan.config import Config, Data, Source, Training
from titan.data import crew, pieces
from titan.data.chat import ChatError, load_chat
from titan.data.corpora import CorpusError, open_corpus
from titan.data.encode import refuse
from titan.data.held_out import texts
from titan.data.inspect import sample, summary
from titan.data.prepare import PieceShare, prepare
from titan.data.shards import TokenShard
from titan.data.splits import open_splits
from titan.data.tokenizer import BytesTokenizer, load_tokenizer
from titan.lock import HeldError, hold
from titan.status import Failed

ROOT = Path(__file__).parents[2]
WORDS = ["the", "of", "and", "to", "in", "é", "語", "😀", "is", "that\n", "for", "it", "as", "was", "with", "be", "by"]


def silent(line: str) -> None:
    pass


def write_rows(folder: Path, seed: int, files: int = 3, rows: int = 400) -> list[str]:
    """JSONL files, and all of their texts."""
    draw, texts = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        own = [" ".join(draw.choices(WORDS, k=draw.randint(0, 60))) for _ in range(rows)]
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(own))
        )
        texts += own
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts_in(folder: Path, split: str) -> list[str]:
    tokenizer, texts = load_tokenizer("bytes"), []
    for path in sorted(folder.glob(f"{split}-*.tokens")):
        shard = TokenShard(path)
        shard.verify()
        texts += [tokenizer.decode(ids) for ids in np.split(shard.tokens, shard.ends[:-1].astype(int))]
    return texts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SMALLEST", 10_000)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, small: None) -> None:
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


PREPARE = """
import sys
from titan.config import Data, Source
from titan.data import pieces
from titan.data.inspect import sample, summary
from titan.data.prepare import prepare
if __name__ == "__main__":
    pieces.SMALLEST = 10_000
    prepare(Source(path=sys.argv[1]), Data(cache=sys.argv[2], validation_share=0.1), lambda line: print(line, flush=True), 2)
"""


def kills(tmp_path: Path, count: int, seed: int) -> None:
    """Kill a preparation at random instants, `count` times, then let it end: the same bytes as undisturbed."""
    draw = random.Random(seed)
    write_rows(tmp_path / "rows", seed, rows=3000)
    script = tmp_path / "prepare.py"
    script.write_text(PREPARE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(cache: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / "rows"), str(tmp_path / cache)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    begun = time.monotonic()
    undisturbed = start("undisturbed")
    undisturbed.communicate(timeout=120)
    whole = time.monotonic() - begun
    assert undisturbed.returncode == 0
    (wanted,) = (tmp_path / "undisturbed").iterdir()
    killed = went_on = 0
    while killed < count:
        process = start("killed")
        try:
            process.wait(draw.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        went_on += "are there from an earlier start" in process.communicate(timeout=60)[0]
        for made in (tmp_path / "killed").glob("rows-????????????????"):  # it was done before it was killed
            assert contents(made) == contents(wanted)
            made.rename(tmp_path / f"made{killed}-{time.monotonic()}")
    last = start("killed")
    went_on += "are there from an earlier start" in last.communicate(timeout=120)[0]
    assert last.returncode == 0
    (made,) = (tmp_path / "killed").iterdir()
    assert contents(made) == contents(wanted)
    print(f"{killed} kills, {went_on} starts went on with pieces that were there")


def test_kill_9_leaves_what_the_next_start_goes_on_from(tmp_path: Path) -> None:
    kills(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_kill_9_ten_times(tmp_path: Path) -> None:
    kills(tmp_path, 10, seed=1)


def test_a_finished_piece_is_not_made_again(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows", 2)
    source, encode, calls = Source(path=str(tmp_path / "rows")), BytesTokenizer.encode, 0
    data = Data(cache=str(tmp_path / "cache"), validation_share=0.1)
    whole = contents(prepare(source, Data(cache=str(tmp_path / "whole"), validation_share=0.1), silent, 1))

    def limited(self: BytesTokenizer, text: str) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 700:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(BytesTokenizer, "encode", limited)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, data, silent, 1)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    done = len(list(unfinished.glob("piece-*.json")))
    assert 0 < done < len(whole) // 2
    with pytest.raises(ValueError, match="was not finished; give the text again"):
        prepare(Source(path=str(unfinished)), data, silent)
    lines: list[str] = []
    folder = prepare(source, data, lines.append, 1)
    assert any(f"{done} of " in line and "earlier start" in line for line in lines)
    assert calls < 1400, "of 1,200 texts, what was done is not done again"
    assert contents(folder) == whole
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [folder.name]


BAD = {
    3: (b'{"text": "caf\xe9"}', "is not UTF-8"),
    5: (b'{"text": "half', "is no JSON"),
    8: (b'{"content": "other"}', "has no 'text'; it has 'content'"),
    9: (b'{"text": 7}', "has a int as 'text', not a string"),
    11: (b'["text"]', "holds a list, not an object"),
    12: (rb'{"text": "\ud800"}', "cannot be made into tokens"),
    14: (b'{"text": "' + b"x" * 5_000_000 + b'", }', "is no JSON"),  # known to be bad when most of it is written
}


def write_bad(folder: Path) -> list[str]:
    folder.mkdir()
    good = [f"document {i}" for i in range(600)]
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines[400:400] = [b""] * 12_000  # blank lines count, too, also at the end of a piece
    for number in sorted(BAD):
        lines.insert(12_500 + number, BAD[number][0])
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return good


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_with_its_line_or_is_left_out_counted_and_listed(tmp_path: Path, workers: int, small: None) -> None:
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
def test_each_side_gets_a_document(tmp_path: Path, small: None, share: float) -> None:
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


def test_tasks_share_the_pieces_out(tmp_path: Path, small: None) -> None:
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


def test_a_worker_that_dies_is_named_and_what_is_done_stays(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows", 6, files=4, rows=1500)
    monkeypatch.setattr(crew.ProcessPoolExecutor, "submit", die_at_the_third(crew.ProcessPoolExecutor.submit))
    with pytest.raises(Failed, match=r"rows: a process that made tokens died .* near .*\.jsonl.*start again"):
        prepare(Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache")), silent, 2)
    monkeypatch.undo()
    monkeypatch.setattr(pieces, "SMALLEST", 10_000)
    lines: list[str] = []
    prepare(Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache")), lines.append, 2)
    assert any("earlier start" in line for line in lines)


def die_at_the_third(submit: Any) -> Any:
    def submitted(self: Any, function: Any, task: Any) -> Any:
        return submit(self, os._exit, 9) if task.number == 8 else submit(self, function, task)

    return submitted


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small disk needs root and mount")
    try:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(4000)))
        with pytest.raises(Failed, match=r"disk/cache: No space left on device; what is done is kept: make room"):
            prepare(Source(path=str(tmp_path / "a.jsonl")), Data(cache=str(disk / "cache")), silent)
        assert not list((disk / "cache").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_text_that_changes_meanwhile_is_refused(tmp_path: Path, small: None) -> None:
    write_rows(tmp_path / "rows", 11)
    data = Data(cache=str(tmp_path / "cache"))

    def change(line: str) -> None:
        if "making tokens" in line:
            (tmp_path / "rows" / "2.jsonl").write_text('{"text": "other"}\n')

    with pytest.raises(ValueError, match=r"^data\.path: .*rows was changed while it was made into tokens; start again"):
        prepare(Source(path=str(tmp_path / "rows")), data, change, 1)
    assert not list((tmp_path / "cache").iterdir())
    folder = prepare(Source(path=str(tmp_path / "rows")), data, silent, 1)
    assert "other" in texts_in(folder, "train") + texts_in(folder, "validation")


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


def test_whoever_waited_for_a_lock_keeps_it(tmp_path: Path) -> None:
    code = "import sys, pathlib, titan.lock as l; f = l.hold(pathlib.Path(sys.argv[1]), 0); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]

    def another() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = another()
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    said = ""
    try:
        hold(tmp_path / "lock", 0)
    except HeldError as error:
        said = str(error)
        first.communicate("", timeout=20)
        mine = hold(tmp_path / "lock", 10)
    assert f"pid {first.pid}" in said
    assert "HeldError" in another().communicate("", timeout=20)[1], "though that error and its file are gone by now"
    assert mine is not None
    mine.close()
    assert another().communicate("", timeout=20)[0] == "held\n"


def test_several_that_finish_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 13)
    code = PREPARE.replace(", 2)", ", 1, PieceShare(int(sys.argv[3]), 3))").replace(
        "import prepare", "import PieceShare, prepare"
    )
    (tmp_path / "share.py").write_text(code)
    for _ in range(3):
        command = [sys.executable, str(tmp_path / "share.py"), str(tmp_path / "rows"), str(tmp_path / "cache")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        tasks = [
            subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(3)
        ]
        for task in tasks:
            _, said = task.communicate(timeout=60)
            assert task.returncode == 0, said
        (folder,) = (tmp_path / "cache").iterdir()
        shutil.rmtree(folder)


def test_what_killed_processes_left_goes_at_the_next_start(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", 14)
    source, data = Source(path=str(tmp_path / "rows")), Data(cache=str(tmp_path / "cache"))
    folder = prepare(source, data, silent)
    unfinished = folder.rename(folder.with_name(folder.name + ".unfinished"))
    for file in unfinished.iterdir():
        file.unlink()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, own = (unfinished / f".train-00000.tokens.{platform.node()}.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    left.touch()
    own.touch()
    seen: list[bool] = []
    prepare(source, data, lambda line: seen.append(left.exists()) or seen.append(own.exists()) if "making" in line else None)  # type: ignore[func-returns-value]
    assert seen == [False, True]


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


TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def write_chats(folder: Path, count: int = 200) -> list[list[dict[str, str]]]:
    draw, chats = random.Random(7), []
    for i in range(count):
        turns = []
        for k in range(draw.randint(1, 3)):
            turns += [
                {"role": "user", "content": f"question {i}.{k}"},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=5))},
            ]
        chats.append(turns)
    folder.mkdir()
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    (folder / "template.jinja").write_text(TEMPLATE)
    return chats


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_only_the_assistants_turns_of_a_chat_are_labels(tmp_path: Path, packing: Any) -> None:
    chats = write_chats(tmp_path / "chats")
    write_rows(tmp_path / "rows", 8)
    sources = [
        Source("chat", str(tmp_path / "chats" / "chat.jsonl"), content="chat", weight=1.0),
        Source("text", str(tmp_path / "rows"), weight=1.0),
    ]
    data = Data(
        sources=sources,
        cache=str(tmp_path / "cache"),
        chat_template=str(tmp_path / "chats" / "template.jinja"),
        packing=packing,
        document_mask=True,
    )
    folders = [prepare(source, data, silent) for source in sources]
    prepared = Data(**{**vars(data), "sources": [Source(s.name, str(f)) for s, f in zip(sources, folders, strict=True)]})
    splits = open_splits(prepared, BytesTokenizer(), Training(seq_len=512), validate=True)
    read: dict[str, list[int]] = {"chat": [], "text": []}
    for name, windows in zip(splits.train.names, splits.train.windows, strict=True):
        for window in range(windows.count):
            arrays = windows.read(window, "")
            labels = arrays["labels"]
            read[name] += labels[labels >= 0].tolist()
            if packing == "contiguous":
                following = windows.datasets[0].read(window * 512 + 1, 512)
                assert (labels == np.where(labels >= 0, following, -100)).all()
    decode = BytesTokenizer().decode
    said = decode(read["chat"])
    assert "question" not in said
    assert "user" not in said
    assert said.count("</assistant>\n") > 0.8 * 0.95 * sum(len(chat) // 2 for chat in chats), "95% are for training"
    some = {turn["content"] for chat in chats for turn in chat if turn["role"] == "assistant"}
    assert set(said.split("</assistant>\n")[1:-1]) <= some | {one[i:] for one in some for i in range(len(one))}
    shown = sample(splits.train, BytesTokenizer(), next(i for i in range(99) if splits.train.place(i)[0] == 0))
    for text in (text for text in shown if text):
        marked = re.findall(r"<assistant>(\[\[)?(.*?)</assistant>(\s*\]\])?", text, re.DOTALL)
        assert all(begin and end for begin, _, end in marked[1:-1]), text
        assert not re.search(r"\[\[[^\]]*<user>", text)
    lines = "\n".join(summary(splits.train.windows[0], splits.train.datasets[0], Config()))
    assert re.search(r"counted     [34]\d\.\d% of the tokens", lines)
    assert splits.tokens_per_byte is None
    assert len(read["text"]) > 0.5 * splits.train.windows[1].count * 512, "of texts everything counts"


def test_bad_chats(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": "hello"},
        {"text": "hello"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    template = str(tmp_path / "t.jinja")
    data = Data(cache=str(tmp_path / "cache"), chat_template=template, validation_share=0, on_bad="skip")
    folder = prepare(Source(path=str(file), content="chat"), data, silent)
    assert len((folder / "left_out.txt").read_text().splitlines()) == 3
    assert TokenShard(folder / "train-00000.tokens").documents == 1
    with pytest.raises(ChatError):
        load_chat(template, BytesTokenizer()).encode(rows[0])
    with pytest.raises(ValueError, match=r"^data\.chat_template: "):
        prepare(Source(path=str(file), content="chat"), Data(cache=str(tmp_path / "cache")), silent)


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
