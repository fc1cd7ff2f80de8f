"""Tables: Parquet files and the Arrow files of Hugging Face's `datasets`, read by pyarrow a few rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.data.corpora import CorpusError

BATCH = 256
"""Rows that are held at once."""


@dataclass(frozen=True)
class Table:
    """A file, or some of its row groups, opened."""

    names: list[str]
    """Of all columns."""
    before: int
    """Rows of the file before these."""
    count: int
    batches: Iterator[Any]
    """pyarrow.RecordBatch, of the wanted columns."""

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Rows, some at a time. ValueError or OSError where the file is damaged."""
        return (batch.to_pylist() for batch in self.batches)


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
        batches = file.iter_batches(BATCH, list(groups), [name for name in columns if name in names])
        return Table(names, sum(counts[:begin]), sum(counts[begin:]), batches)
    pyarrow = _import("pyarrow", path)
    try:
        table = _import("pyarrow.ipc", path).open_stream(pyarrow.memory_map(str(path))).read_all()  # maps, and reads nothing
    except (ValueError, OSError) as error:  # pyarrow's own errors are these
        raise CorpusError(f"{path} is no Arrow file of Hugging Face's datasets that can be read ({error})") from error
    wanted = table.select([name for name in columns if name in table.column_names])
    return Table(table.column_names, 0, table.num_rows, iter(wanted.to_batches(max_chunksize=BATCH)))


def _parquet(path: Path) -> Any:
    parquet = _import("pyarrow.parquet", path)
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (ValueError, OSError) as error:
        raise CorpusError(f"{path} is no Parquet file that can be read ({error})") from error


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(f"{path}: to read it, pip install 'titan-pretraining[data]', which brings pyarrow") from error
