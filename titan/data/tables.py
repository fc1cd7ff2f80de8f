"""Tables: Parquet files and the Arrow files of Hugging Face's `datasets`, read by pyarrow a few rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.data.corpora import CorpusError

BATCH, BATCH_BYTES = 256, 1 << 24
"""Rows that are decoded at once, and bytes, unless a single row has more."""


@dataclass(frozen=True)
class Table:
    """A file, or some of its row groups, opened."""

    names: list[str]
    """Of all columns."""
    before: int
    """Rows of the file before these."""
    count: int
    parts: list[tuple[int, Any]]
    """Of each row group its rows, and a function that gives its pyarrow.RecordBatches of the wanted columns."""

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """(row, counted from 1 in the file; its object, or why there is none). A row group that is damaged ends there."""
        number = self.before
        for count, batches in self.parts:
            end = number + count
            try:
                for batch in batches():
                    for i in range(batch.num_rows):
                        number += 1
                        yield number, _row(batch, i)
            except (ValueError, OSError) as error:
                yield number + 1, error
            number = end


def row_groups(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file. Raises CorpusError."""
    metadata = _parquet(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]


def open_table(path: Path, columns: list[str], begin: int = 0, end: int | None = None) -> Table:
    """A Parquet file's row groups [begin, end), or an Arrow file; of the columns those that it has. Raises CorpusError."""
    if path.suffix == ".parquet":
        file = _parquet(path)
        names, groups = file.schema_arrow.names, range(begin, file.num_row_groups if end is None else end)
        counts = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
        wanted = [name for name in columns if name in names]

        def batches(group: int) -> Iterator[Any]:
            described = file.metadata.row_group(group)
            parts = [described.column(i) for i in range(described.num_columns)]
            size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in wanted)
            rows = BATCH_BYTES * described.num_rows // max(1, size)
            found: Iterator[Any] = file.iter_batches(max(1, min(BATCH, rows)), [group], wanted)
            return found

        parts = [(counts[group], lambda group=group: batches(group)) for group in groups]
        return Table(names, sum(counts[:begin]), sum(counts[begin:]), parts)
    pyarrow = _import("pyarrow", path)
    try:
        table = _import("pyarrow.ipc", path).open_stream(pyarrow.memory_map(str(path))).read_all()  # maps, and reads nothing
    except (ValueError, OSError) as error:  # pyarrow's own errors are these
        raise CorpusError(f"{path} is no Arrow file of Hugging Face's datasets that can be read ({error})") from error
    own = table.select([name for name in columns if name in table.column_names])
    return Table(table.column_names, 0, table.num_rows, [(table.num_rows, own.to_batches)])


def _row(batch: Any, i: int) -> dict[str, Any] | Exception:
    """A row as Python's objects, or what is wrong with it alone."""
    try:
        return {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return error


def _parquet(path: Path) -> Any:
    parquet = _import("pyarrow.parquet", path)
    try:
        return parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (ValueError, OSError) as error:
        raise CorpusError(f"{path} is no Parquet file that can be read ({error})") from error


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(f"{path}: to read it, pip install 'titan-pretraining[data]', which brings pyarrow") from error
