"""Rows of a CSV, TSV, JSONL or Parquet file, each with the words that say where it is."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
Row = dict[str, Any]


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """(`line 7` or `row 7`, the row's values by column) of a table. Values are text in CSV and TSV. UserError for a damaged file."""
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"{path} is no table: it should end in {' '.join(TABLES)}")
    reader = _parquet_rows(path) if suffix == ".parquet" else _json_rows(path) if suffix == ".jsonl" else _csv_rows(path)
    try:
        yield from reader
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or str(error).splitlines()[0]}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} of a block of text; save it as UTF-8") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise UserError(f"{path} line 1: a column is there twice: {', '.join(header)}")
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise UserError(f"{path} line {line}: {len(values)} fields, the header has {len(header)}")
                if values:
                    yield f"line {line}", dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: not a JSON object in braces")
            yield f"line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow, or save the table as CSV or JSONL") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path} is no Parquet file, or damaged after row {number}: {str(error).splitlines()[0][:200]}") from None
