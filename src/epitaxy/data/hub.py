"""Data sets of the ``datasets`` library: by name on the hub, from a local folder, or saved with ``save_to_disk``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.spec import DataSpec, Modality, Pool, Row
from epitaxy.data.table import TEXT_COLUMNS, pick_column

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target")
SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture or sound inside a data set, undecoded."""

    column: Any
    name: str
    index: int

    def read(self) -> bytes:
        """Its encoded bytes."""
        value = self.column[self.index][self.name]
        if value is None:
            return b""
        stored = value.get("bytes")
        return bytes(stored) if stored is not None else Path(value["path"]).read_bytes()


def read_hub(spec: DataSpec) -> Pool:
    """The rows of every split.  Raises ``FormatError`` when the data set cannot be opened or lacks a column."""
    opened = _open(spec)
    pool = Pool([], "text", "hub")
    first = next(iter(opened.values()))
    content, modality = _content(spec, first)
    label = _label_column(spec, first, content)
    names = _label_names(spec.source, first.features[label], label)
    pool.modality, pool.declared = modality, tuple(names or ())
    for split, rows in opened.items():
        for column in (content, label):
            if column not in rows.features:
                raise FormatError(f"{spec.source}: its split {split!r} has no column {column!r}")
        pool.rows += _rows(rows, str(split), content, label, names, modality)
    return pool


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise EpitaxyError("hub data sets need the package datasets: pip install 'epitaxy[data]'") from None
    return datasets


def _open(spec: DataSpec) -> dict[str, Any]:
    datasets = _datasets()
    path = Path(spec.source).expanduser()
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and any((path / name).exists() for name in SAVED):
            opened = datasets.load_from_disk(str(path))
        else:
            where = str(path) if path.exists() else spec.source
            opened = datasets.load_dataset(where, spec.subset, revision=spec.revision)
    except Exception as error:  # the library's errors share no useful class
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FormatError(f"{spec.source}: cannot open this data set: {reason[:300]}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    splits: dict[str, Any] = dict(opened) if isinstance(opened, datasets.DatasetDict) else {spec.train: opened}
    if not any(len(rows) for rows in splits.values()):
        raise FormatError(f"{spec.source}: the data set has no rows")
    return splits


def _content(spec: DataSpec, rows: Any) -> tuple[str, Modality]:
    """The column to learn from, by what its feature is."""
    datasets = _datasets()
    kinds: dict[str, Modality] = {}
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            kinds[name] = "vision"
        elif isinstance(feature, datasets.Audio):
            kinds[name] = "audio"
        elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            kinds[name] = "text"
    asked = spec.text_column or spec.file_column
    if asked is not None:
        column = pick_column(spec.source, list(rows.features), asked, (), "text_column")
        assert column is not None
        if column not in kinds:
            raise FormatError(f"{spec.source}: column {column!r} holds neither pictures nor sounds nor text")
        return column, kinds[column]
    media = [name for name, kind in kinds.items() if kind != "text"]
    texts = [name for name in TEXT_COLUMNS if name in kinds]
    found = media if len(media) == 1 else texts[:1] if not media else []
    if not found:
        raise FormatError(
            f"{spec.source}: cannot tell which column to learn from among {', '.join(rows.features)}; "
            "set data.text_column or data.file_column"
        )
    return found[0], kinds[found[0]]


def _label_column(spec: DataSpec, rows: Any, content: str) -> str:
    if spec.label_column is None:
        datasets = _datasets()
        named = [
            name
            for name, feature in rows.features.items()
            if isinstance(feature, datasets.ClassLabel) and name != content
        ]
        if len(named) == 1:
            return str(named[0])
    found = pick_column(spec.source, list(rows.features), spec.label_column, LABEL_COLUMNS, "label_column")
    assert found is not None
    return found


def _label_names(source: str, feature: Any, column: str) -> list[str] | None:
    """Class names that the data set declares; None for labels that are plain values."""
    datasets = _datasets()
    if isinstance(feature, datasets.ClassLabel):
        return [str(name) for name in feature.names]
    if isinstance(feature, datasets.Value) and not feature.dtype.startswith(("float", "double")):
        return None
    raise FormatError(f"{source}: column {column!r} holds {feature}, expected one label per row")


def _rows(rows: Any, split: str, content: str, label: str, names: list[str] | None, modality: Modality) -> list[Row]:
    datasets = _datasets()
    labels = [_label(value, names) for value in rows[label]]
    if modality == "text":
        texts = ("" if value is None else str(value) for value in rows[content])
        return [
            Row(text, answer, split, f"{split}[{number}]")
            for number, (text, answer) in enumerate(zip(texts, labels, strict=True))
        ]
    undecoded = datasets.Image(decode=False) if modality == "vision" else datasets.Audio(decode=False)
    column = rows.select_columns([content]).cast_column(content, undecoded)
    return [
        Row(Cell(column, content, number), answer, split, f"{split}[{number}]") for number, answer in enumerate(labels)
    ]


def _label(value: Any, names: list[str] | None) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if names is None:
        return str(value)
    return names[int(value)] if 0 <= int(value) < len(names) else None  # unlabelled test splits hold -1
