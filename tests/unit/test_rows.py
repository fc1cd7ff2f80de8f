"""Documents out of files: the same rows however a file is cut, packed or read; what is no document is told with its line."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from titan.data import lines, long_lines, pieces, rows, tables
from titan.data.corpora import Corpus, CorpusError, open_corpus
from titan.data.lines import BadRow, lines_before, zstd_module
from titan.data.pieces import Segment
from titan.data.rows import Row, in_parts, texts_of

zstd = zstd_module(Path("x.zst"))
ALPHABET = 'ab "\\\n\té語😀\u2028{}[],:'


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes under which short texts are long."""
    for module, name, size in (
        (long_lines, "KEPT", 40),
        (lines, "LONG", 200),
        (rows, "PART", 64),
        (tables, "BATCH", 3),
        (rows, "TELL_BYTES", 100),
        (pieces, "SMALLEST", 1000),
    ):
        monkeypatch.setattr(module, name, size)


def a_text(draw: random.Random, most: int) -> str:
    return "".join(draw.choices(ALPHABET, k=draw.randint(0, most)))


def an_object(draw: random.Random) -> dict[str, Any]:
    others = [lambda: a_text(draw, 10), lambda: a_text(draw, 200), lambda: 3.5, lambda: None]
    others += [lambda: {"text": a_text(draw, 90)}, lambda: [a_text(draw, 90), {"text": "x", "a": [1, 2]}]]
    keys = draw.sample(["text", "id", "meta", 'x"y', "deep"], draw.randint(1, 5))
    return {key: a_text(draw, 300) if key == "text" else draw.choice(others)() for key in keys}


def damaged(line: bytes, draw: random.Random) -> bytes:
    hurt = bytearray(line)
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(hurt))
        hurt[at : at + 1] = b"" if draw.random() < 0.5 else bytes([draw.randrange(256)])
    return bytes(hurt)


def expected(line: bytes) -> Any:
    """What json.loads finds; an exception's class where there is no text."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return ValueError
        return value["text"]
    except (ValueError, KeyError) as error:
        return KeyError if isinstance(error, KeyError) else ValueError


@pytest.mark.parametrize("seed", range(8))
def test_a_line_in_pieces_says_what_it_says_as_a_whole(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(400):
        line = json.dumps(an_object(draw), ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])).encode()
        if draw.random() < 0.4:
            line = damaged(line, draw)
        cuts = sorted({0, len(line), *draw.choices(range(len(line) + 1), k=len(line) // 30)})
        parts = [line[a:b] for a, b in pairwise(cuts)]
        found: Any
        try:
            got = list(long_lines.long_string(parts, "text"))
            found = "".join(got) if len(got) != 1 or isinstance(got[0], str) else got[0]
        except KeyError:
            found = KeyError
        except ValueError:
            found = ValueError
        assert found == expected(line), line


def test_a_field_that_is_there_twice_is_refused() -> None:
    long = json.dumps("y" * 100)
    for line in (f'{{"text": {long}, "text": "a"}}', f'{{"text": {long}, "text": {long}}}'):
        with pytest.raises(ValueError, match="twice"):
            list(long_lines.long_string([line.encode()], "text"))


def read(segments: list[Segment], column: str = "text") -> list[tuple[int, str]]:
    """(line, text, or what is wrong) of all rows."""
    found = []
    for segment in segments:
        told: list[int] = []
        for row in rows.rows(segment, [column], told.append):
            if row.value is None:
                continue
            number = row.number + (lines_before(segment) if str(segment.text).endswith(".jsonl") else 0)
            try:
                found.append((number, "".join(texts_of(row, column))))
            except BadRow as bad:
                found.append((number, f"{bad.kind}!"))
        assert sum(told) == segment.size, "progress adds up"
    return found


def plain_truth(content: bytes) -> list[tuple[int, str]]:
    found = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            value = expected(line)
            bad = "wrong type!" if value not in (KeyError, ValueError) else "field missing!" if value is KeyError else "bad!"
            found.append((number, value if isinstance(value, str) else bad))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_jsonl_is_the_same_rows_however_it_is_cut_and_packed(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    drawn: list[bytes] = []
    for _ in range(draw.randint(1, 60)):
        line = json.dumps(an_object(draw), ensure_ascii=draw.random() < 0.5).encode()
        drawn.append(
            draw.choices([line, damaged(line, draw).replace(b"\n", b""), b"", b"[1]", b'{"text": 7}'], [12, 2, 1, 1, 1])[0]
        )
    content = b"\n".join(drawn) + draw.choice([b"", b"\n"])
    truth = plain_truth(content)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    half = len(content) // 2
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(content[:half]) + zstd.compress(content[half:]))
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst"):
        corpus = open_corpus(str(tmp_path / f"a.{suffix}"), print)
        cut = [segment for piece in pieces.pieces(corpus) for segment in piece]
        assert len(cut) == (max(1, -(-len(content) // 1000)) if suffix == "jsonl" else 1)
        got = [(number, "bad!" if text in ("no JSON!", "not UTF-8!", "no object!") else text) for number, text in read(cut)]
        assert got == truth, suffix


def test_parts_of_a_text_are_cut_at_line_ends_wherever_it_came_from() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = a_text(draw, 500)
        whole = list(in_parts([text]))
        cuts = sorted({0, len(text), *draw.choices(range(len(text) + 1), k=5)})
        assert list(in_parts(text[a:b] for a, b in pairwise(cuts))) == whole
        assert "".join(whole) == text
        for part, after in pairwise(whole):
            ends = part.endswith("\n") and not part[-2:-1].isspace() and not after[0].isspace()
            assert len(part) == 64 or ends or (after[0] == " " and not after[1].isspace() and not part[-1].isspace())
    assert list(in_parts(["x" * 60 + "\n" + "y" * 60])) == ["x" * 60 + "\n", "y" * 60]
    assert list(in_parts(["x" * 60 + " " + "y" * 60])) == ["x" * 60, " " + "y" * 60]
    assert list(in_parts(["x" * 60 + "  " + "y" * 60])) == ["x" * 60 + "  " + "yy", "y" * 58]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_was_cut_short_says_so_and_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(3)
    texts = [a_text(draw, 400) for _ in range(4000)]
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    packed = gzip.compress(content) if suffix == "gz" else zstd.compress(content)
    file = tmp_path / f"a.jsonl.{suffix}"
    for trial in range(12):
        hurt = bytearray(packed)
        if trial % 2:
            hurt = hurt[: draw.randrange(len(packed) // 2, len(packed) - 9)]
        else:
            hurt[draw.randrange(len(packed) // 2, len(packed) - 9)] ^= 1 << draw.randrange(8)
        file.write_bytes(hurt)
        got = [text for _, text in read([Segment(file.name, file, len(hurt))])]
        if trial % 2:
            assert got[-1] == "damaged!"
            assert got[:-1] == texts[: len(got) - 1]
        elif got != texts:  # zstd of this kind has no checksum: a flipped bit may be another text
            assert suffix == "zst" or got[-1] == "damaged!"


def test_parquet_and_arrow(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [None if draw.random() < 0.05 else a_text(draw, 300) for _ in range(100)]
    table = pyarrow.table({"id": range(100), "text": texts})
    truth = [(i, "wrong type!" if text is None else text) for i, text in enumerate(texts, 1)]
    for groups in (7, 1000):
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=groups)
        corpus = open_corpus(str(tmp_path / "a.parquet"), print)
        cut = [segment for piece in pieces.pieces(corpus) for segment in piece]
        assert len(cut) > 3 if groups == 7 else len(cut) == 1
        assert read(cut) == truth
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    assert read([Segment("a.arrow", tmp_path / "a.arrow", 5000)]) == truth
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(CorpusError, match=rf"{name} has no column 'words'; it has 'id', 'text'"):
            read([Segment(name, tmp_path / name, 10)], "words")
        (tmp_path / name).write_bytes(b"PAR1 what is this")
        with pytest.raises(CorpusError, match=rf"{name} is no \w+ file"):
            read([Segment(name, tmp_path / name, 10)])


def test_a_damaged_parquet_file_never_gives_wrong_rows_in_silence(tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = [a_text(draw, 300) for _ in range(200)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=20, write_page_checksum=True)
    whole = file.read_bytes()
    for _ in range(40):
        file.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(CorpusError, match=r"a\.parquet is no Parquet file"):
            read([Segment(file.name, file, len(whole))])
    file.write_bytes(whole)
    last = pyarrow.parquet.ParquetFile(file).metadata.row_group(9).column(0)
    pages_end, told = last.dictionary_page_offset or last.data_page_offset, 0
    for _ in range(60):
        hurt = bytearray(whole)
        hurt[draw.randrange(4, pages_end)] ^= 1 << draw.randrange(8)
        file.write_bytes(hurt)
        got = read([Segment(file.name, file, len(whole))])
        bad = [(number, text) for number, text in got if text == "damaged!"]
        told += bool(bad)
        assert [one for one in got if one not in bad] == [
            (number, text)
            for number, text in enumerate(texts, 1)
            if not any(at <= number <= -(-at // 20) * 20 for at, _ in bad)
        ], "the damaged row group's rest is missing, and nothing else"
    assert told > 40


def test_a_cell_that_is_not_utf_8_is_that_row_alone(tmp_path: Path) -> None:
    cells = [f"text {i}".encode() for i in range(50)]
    cells[20] = b"caf\xe9"
    truth = [(i, "not UTF-8!" if i == 21 else cell.decode()) for i, cell in enumerate(cells, 1) if i != 21 or cell]
    column = pyarrow.array(cells, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert read([Segment(name, tmp_path / name, 5000)]) == [(n, t) for n, t in truth]


def test_a_long_line_that_nobody_reads_is_skipped_whole(tmp_path: Path) -> None:
    draw = random.Random(6)
    texts = [a_text(draw, 60) for _ in range(200)]
    for at in (150, 60, 10):
        texts[at] = "long " * draw.randint(200, 800)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cut = [segment for piece in pieces.pieces(open_corpus(str(file), print)) for segment in piece]
    assert len(cut) > 5
    seen = []
    for segment in cut:
        before = lines_before(segment)
        seen += [before + row.number for row in rows.rows(segment, ["text"], lambda _: None)]
    assert seen == list(range(1, 201))


def test_text_files_in_parts_and_not_in_utf_8(tmp_path: Path) -> None:
    draw = random.Random(4)
    text = a_text(draw, 5000) + "\r\n" + a_text(draw, 5000)
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    segment = Segment("a.txt", file, 10)
    assert read([segment]) == [(0, text)]
    file.write_bytes(text.encode() + b"\xe9")
    assert read([segment]) == [(0, "not UTF-8!")]
    with pytest.raises(CorpusError, match=r"none\.txt cannot be read \(No such file"):
        read([Segment("none.txt", tmp_path / "none.txt", 1)])


def test_pieces_follow_from_names_and_sizes(tmp_path: Path) -> None:
    draw = random.Random(5)
    for _ in range(200):
        texts: dict[str, str | Path] = {}
        for i in range(draw.randint(1, 12)):
            if draw.random() < 0.5:
                texts[f"{i:02d}"] = "x" * draw.choice([0, 10, 500, 3000])
            else:
                file = tmp_path / f"{i:02d}.jsonl"
                file.write_bytes(b"x" * draw.choice([0, 10, 999, 1000, 1001, 7500]))
                texts[file.name] = file
        corpus = Corpus("c", texts)
        cut = pieces.pieces(corpus)
        assert cut == pieces.pieces(corpus)
        flat = [segment for piece in cut for segment in piece]
        for name in texts:
            own = [segment for segment in flat if segment.name == name]
            assert sum(segment.size for segment in own) == corpus.size(name)
            assert [segment.begin for segment in own[1:]] == [segment.end for segment in own[:-1]]
        sizes = [sum(segment.size for segment in piece) for piece in cut]
        assert all(size >= 1000 for size in sizes[:-1]), sizes
        assert all(size < 1000 + 3000 for size in sizes), sizes


def test_a_row_that_is_too_deep_is_no_json() -> None:
    row = Row(1, rows._parsed(b"[" * 100_000))
    with pytest.raises(BadRow, match="is no JSON"):
        list(texts_of(row, "text"))
