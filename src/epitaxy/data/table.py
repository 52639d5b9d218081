"""Tables: CSV, TSV or JSON lines with a label and either a text or the path of a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from epitaxy.core.errors import FormatError, nearest
from epitaxy.data.decode import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from epitaxy.data.spec import SPLITS, DataSpec, Modality, Pool, Row
from epitaxy.data.stored import File

SUFFIXES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("file", "path", "file_name", "filename", "image", "audio")
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMNS = ("split",)
LONGEST = 2**31 - 1  # letters of one field; the csv module by itself stops at 131072
Line = tuple[int, dict[str, Any]]


def table_files(folder: Path) -> dict[str | None, Path]:
    """The tables of a folder that are named as splits: ``train.csv``, ``val.csv`` and the like."""
    usual = {alias for aliases in SPLITS.values() for alias in aliases}
    return {path.stem: path for path in sorted(folder.iterdir()) if is_table(path) and path.stem in usual}


def is_table(path: Path) -> bool:
    """Whether a file is a table, by its name."""
    return path.suffix.lower() in SUFFIXES


def read_table(path: Path, spec: DataSpec) -> Pool:
    """The rows of a table, or of a folder with one table per split.

    Paths of files are relative to the table.  Raises ``FormatError`` naming the file and line of what is wrong.
    """
    if path.is_dir():
        tables = table_files(path)
        if not tables:
            raise FormatError(f"{path}: expected train.csv (or .tsv, .jsonl) in this folder")
    else:
        tables = {None: path}
    rows: list[Row] = []
    modalities: dict[Modality, str] = {}
    for split, table in tables.items():
        found, modality = _rows(table, split, spec)
        rows += found
        modalities.setdefault(modality, table.name)
    if len(modalities) > 1:
        raise FormatError(f"{path}: its tables hold different things: {', '.join(modalities.values())}")
    return Pool(rows, next(iter(modalities)), "csv")


def _rows(table: Path, split: str | None, spec: DataSpec) -> tuple[list[Row], Modality]:
    lines = list(_lines(table))
    if not lines:
        raise FormatError(f"{table}: the table has no rows")
    columns = list(lines[0][1])
    label = pick_column(str(table), columns, spec.label_column, LABEL_COLUMNS, "label_column")
    assert label is not None
    source, is_file = content_column(str(table), columns, spec, FILE_COLUMNS)
    group = pick_column(str(table), columns, spec.split_column, SPLIT_COLUMNS, "split_column", needed=False)
    rows = []
    for number, line in lines:
        name = f"{table}:{number}"
        for column in (source, label):
            if isinstance(line.get(column), (dict, list)):
                kind = type(line[column]).__name__
                raise FormatError(f"{name}: the column {column!r} holds a {kind}, expected one value")
        value, answer = _cell(line, source), _cell(line, label)
        content: File | str = value
        if is_file:
            content, name = File(str(table.parent / value)), f"{name} ({value or 'no file named'})"
        rows.append(Row(content, answer or None, (_cell(line, group) or None) if group else split, name))
    return rows, _file_modality(table, [_cell(line, source) for _, line in lines]) if is_file else "text"


def content_column(where: str, columns: Sequence[str], spec: DataSpec, file_columns: Sequence[str]) -> tuple[str, bool]:
    """The column that holds the content, and whether it holds files."""
    if spec.file_column is not None and spec.text_column is not None:
        raise FormatError(f"{where}: give data.file_column or data.text_column, not both")
    if spec.text_column is None:
        found = pick_column(where, columns, spec.file_column, file_columns, "file_column", needed=False)
        if found is not None:
            return found, True
    found = pick_column(where, columns, spec.text_column, TEXT_COLUMNS, "text_column", needed=False)
    if found is None:
        raise FormatError(
            f"{where}: cannot tell which column holds the text or the file among {', '.join(columns)}; "
            "set data.text_column or data.file_column"
        )
    return found, False


def pick_column(
    where: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], setting: str, needed: bool = True
) -> str | None:
    """The column asked for, else the first of the usual names; raises when it is not there."""
    if asked is not None:
        if asked not in columns:
            raise FormatError(f"{where}: no column is called {asked!r}{nearest(asked, columns)}")
        return asked
    found = next((name for name in usual if name in columns), None)
    if found is None and needed:
        raise FormatError(f"{where}: none of the columns {', '.join(columns)} is the label; set data.{setting}")
    return found


def _lines(table: Path) -> Iterator[Line]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{table}: not a text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise FormatError(f"{table}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise FormatError(f"{table}: the file is empty")
    yield from _json_lines(table, text) if table.suffix.lower() == ".jsonl" else separated(table, text)


def separated(table: Path, text: str) -> Iterator[Line]:
    """The lines of a CSV or TSV text as (line number, its cells); ``table`` is what messages call it."""
    separator = "\t" if table.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LONGEST)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names = list(reader.fieldnames or ())
    if len(set(names)) < len(names):
        raise FormatError(f"{table}: two columns of the first line have the same name ({', '.join(names)})")
    try:
        for line in reader:
            if None in line or None in line.values():
                raise FormatError(f"{table}:{reader.line_num}: expected {len(names)} columns as in the first line")
            yield reader.line_num, line
    except csv.Error as error:
        raise FormatError(f"{table}:{reader.reader.line_num}: {error}") from None


def _json_lines(table: Path, text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_fields)
        except ValueError as error:
            raise FormatError(f"{table}:{number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise FormatError(f"{table}:{number}: expected an object with named fields, found {type(value).__name__}")
        yield number, value


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return fields


def _cell(line: dict[str, Any], column: str) -> str:
    value = line.get(column)
    return "" if value is None else str(value).strip()


def _file_modality(table: Path, values: Sequence[str]) -> Modality:
    suffixes = {Path(value).suffix.lower() for value in values if value}
    if suffixes & IMAGE_SUFFIXES and suffixes & AUDIO_SUFFIXES:
        raise FormatError(f"{table}: names both pictures and sounds; a data set holds one kind")
    if suffixes & IMAGE_SUFFIXES:
        return "vision"
    if suffixes & AUDIO_SUFFIXES:
        return "audio"
    raise FormatError(f"{table}: names neither pictures nor sounds; found {', '.join(sorted(suffixes)) or 'no file'}")
