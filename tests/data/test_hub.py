"""Data sets of the ``datasets`` library, from disk: pictures, sounds, texts, labels of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from epitaxy.core.errors import FormatError
from epitaxy.data.splits import DataSpec, load_splits
from tests.data.makers import picture, pictures, tone


def saved(path: Path, splits: dict[str, dict[str, list[Any]]], **features: Any) -> Path:
    """Write a data set dictionary with ``save_to_disk``."""
    kinds = datasets.Features(features)
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns, features=kinds) for name, columns in splits.items()}
    ).save_to_disk(str(path))
    return path


def texts(split: str, count: int = 8) -> dict[str, list[Any]]:
    return {"text": [f"{split} {number}" for number in range(count)], "label": [number % 2 for number in range(count)]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


LABELS = datasets.ClassLabel(names=["no", "yes"])


def test_texts_with_declared_classes(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "d",
        {name: texts(name) for name in ("train", "validation", "test")},
        text=datasets.Value("string"),
        label=LABELS,
    )
    splits = load_splits(DataSpec(str(path)))
    assert splits.kind == "hub"
    assert splits.modality == "text"
    assert splits.classes == ("no", "yes")
    assert [len(data) for data in (splits.train, splits.validation, splits.test)] == [8, 8, 8]
    assert {example.value for example in splits.train} == set(texts("train")["text"])


def test_pictures_stay_encoded_until_they_are_read(tmp_path: Path) -> None:
    files = [str(picture(tmp_path / "p" / f"{number}.png", seed=number)) for number in range(16)]
    columns = {"image": files, "label": [number % 2 for number in range(16)]}
    path = saved(tmp_path / "d", {"train": columns}, image=datasets.Image(), label=LABELS)
    splits = load_splits(DataSpec(str(path)))
    assert splits.modality == "vision"
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 16
    assert splits.train[0].value.size == (12, 12)
    assert splits.notes


def test_sounds(tmp_path: Path) -> None:
    files = [str(tone(tmp_path / "s" / f"{number}.wav", 200.0 + 20 * number)) for number in range(16)]
    path = tmp_path / "d"
    columns = {"audio": [{"path": file, "bytes": Path(file).read_bytes()} for file in files], "label": [0, 1] * 8}
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(audio=stored, label=LABELS))
    data.cast_column("audio", datasets.Audio()).save_to_disk(str(path))
    splits = load_splits(DataSpec(str(path), sampling_rate=8000))
    assert splits.modality == "audio"
    assert splits.train[0].value.samples.shape == (2000,)


def test_a_local_picture_folder_through_the_library(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {"train/red": 6, "train/green": 6, "test/red": 3, "test/green": 3})
    splits = load_splits(DataSpec(str(root), kind="hub"))
    assert splits.kind == "hub"
    assert splits.classes == ("green", "red")
    assert len(splits.test) == 6
    red = next(example for example in splits.test if example.label == 1)
    assert np.asarray(red.value).mean((0, 1)).argmax() == 0


def test_unlabelled_splits_matter_only_where_they_are_used(tmp_path: Path) -> None:
    hidden = {"text": ["a", "b"], "label": [-1, -1]}
    path = saved(
        tmp_path / "d",
        {"train": texts("train", 20), "unsupervised": hidden, "test": texts("test")},
        text=datasets.Value("string"),
        label=LABELS,
    )
    splits = load_splits(DataSpec(str(path)))
    assert any("unsupervised (2 rows)" in note for note in splits.notes)
    with pytest.raises(FormatError, match=r"2 of 22 examples have no label: unsupervised\[0\] \(no label\)"):
        load_splits(DataSpec(str(path), validation=0.1, test="unsupervised"))


def test_plain_labels_and_columns_of_other_names(tmp_path: Path) -> None:
    columns = {"words": [f"w{number}" for number in range(20)], "kind": [10 * (number % 2) + 2 for number in range(20)]}
    path = saved(tmp_path / "d", {"train": columns}, words=datasets.Value("string"), kind=datasets.Value("int64"))
    with pytest.raises(FormatError, match=r"cannot tell which column to learn from among words, kind"):
        load_splits(DataSpec(str(path)))
    with pytest.raises(FormatError, match=r"none of the columns words, kind is the label"):
        load_splits(DataSpec(str(path), text_column="words"))
    splits = load_splits(DataSpec(str(path), text_column="words", label_column="kind"))
    assert splits.classes == ("2", "12")
    with pytest.raises(FormatError, match=r"column 'kind' holds neither pictures nor sounds nor text"):
        load_splits(DataSpec(str(path), text_column="kind", label_column="kind"))


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "label": [0.5, 0.7]}
    path = saved(tmp_path / "d", {"train": columns}, text=datasets.Value("string"), label=datasets.Value("float32"))
    with pytest.raises(FormatError, match=r"column 'label' holds Value.*, expected one label per row"):
        load_splits(DataSpec(str(path)))


def test_a_data_set_that_cannot_be_opened() -> None:
    with pytest.raises(FormatError, match=r"^no-such-data-set-here: cannot open this data set: "):
        load_splits(DataSpec("no-such-data-set-here"))
