"""The published picture sets in the layouts people have: splits, protocols, shares, and what is said of bad copies."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.image_sets.fgvc import SETS
from epitaxy.data.image_sets.vtab import TASKS
from epitaxy.data.splits import DataSpec, Examples, Splits, load_splits
from tests.data import image_trees as trees


def load(root: Path, kind: str, **more: Any) -> Splits:
    return load_splits(DataSpec(str(root), kind=kind, verify=False, **more))  # type: ignore[arg-type]


def paths(part: Examples, root: Path) -> list[str]:
    return [str(Path(name).relative_to(root)) for name in part.names]


def test_the_official_numbers() -> None:
    groups = Counter(task.group for task in TASKS.values())
    assert groups == {"Natural": 7, "Specialized": 4, "Structured": 8}
    assert sum(one.classes for one in SETS.values()) == 1173
    assert list(SETS) == ["cars", "cub", "dogs", "flowers", "nabirds"]


@pytest.mark.parametrize("inside", [False, True])
def test_vtab_select_and_final(tmp_path: Path, inside: bool) -> None:
    root = trees.vtab(tmp_path / "vtab")
    trees.vtab(root, "dtd")
    source = root / "cifar" if inside else root
    splits = load(source, "vtab", task="cifar")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4, 2, 6)
    assert {name.split("/")[1] for name in paths(splits.train, root / "cifar")} == {"train800"}
    assert {name.split("/")[1] for name in paths(splits.validation, root / "cifar")} == {"val200"}
    assert splits.classes == ("0", "1", "2")
    assert Counter(splits.test.labels) == {0: 2, 1: 2, 2: 2}  # the class no training picture has counts in the test
    assert any("1 of 3 classes have no training example, the first is '2'" in note for note in splits.notes)
    assert splits.test[0].value.size == (12, 9)
    final = load(source, "vtab", task="cifar", protocol="final")
    assert (len(final.train), len(final.validation), len(final.test)) == (6, 0, 6)
    assert {name.split("/")[1] for name in paths(final.train, root / "cifar")} == {"train800val200"}
    assert final.classes == splits.classes


def test_vtab_reads_a_zip_and_sorts_labels_as_numbers(tmp_path: Path) -> None:
    trees.vtab(tmp_path / "vtab", classes=12)
    archive = shutil.make_archive(str(tmp_path / "vtab"), "zip", tmp_path / "vtab")
    splits = load(Path(archive), "vtab", task="cifar")
    assert splits.classes == tuple(str(number) for number in range(12))
    assert splits.test.labels[-1] == 11


def test_vtab_from_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = {}
    for part, each in (("train800", 2), ("val200", 1), ("test", 3)):
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for label in (0, 1, 2, 10):
            for number in range(each):
                rows["image"].append(str(trees.picture(tmp_path / f"{part}{label}{number}.png")))
                rows["label"].append(label)
        made[part] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    splits = load(tmp_path / "saved", "vtab", task="cifar")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 4, 12)
    assert splits.classes == ("0", "1", "2", "10")
    final = load(tmp_path / "saved", "vtab", task="cifar", protocol="final")
    assert (len(final.train), len(final.validation), len(final.test)) == (12, 0, 12)
    with pytest.raises(FormatError, match=r"classes: expected 100, found 4"):
        load_splits(DataSpec(str(tmp_path / "saved"), kind="vtab", task="cifar"))


def _change(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "val200.txt").unlink(), r"cifar/val200.txt: no such file"),
        (lambda f: (f / "images/train800/000001.jpg").unlink(), r"1 of 12 examples are missing: .*000001.jpg"),
        (
            lambda f: _change(f, "test.txt", ".jpg 0", ".jpg"),
            r"test.txt:1: expected a path, a blank and a whole number",
        ),
        (lambda f: _change(f, "test.txt", " 000001", " 000000"), r"test.txt:2: .*000000.jpg is named already in .*:1"),
        (lambda f: (f / "test.txt").write_bytes(b"\xff\xfe\xff"), r"test.txt: not a text in UTF-8"),
    ],
)
def test_faults_of_a_task_are_named(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    root = trees.vtab(tmp_path / "vtab")
    spoil(root / "cifar")
    with pytest.raises(FormatError, match=said):
        load(root, "vtab", task="cifar")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, r"data.task: VTAB-1k holds 19 sets; name one: cifar, caltech101"),
        ({"task": "cifr"}, r"data.task: VTAB-1k has no set 'cifr'; did you mean 'cifar'"),
        (
            {"task": "cifar", "protocol": "finale"},
            r"data.protocol: VTAB-1k has no protocol 'finale'; did you mean 'final'",
        ),
        ({"task": "cifar", "validation": "test"}, r"data.validation: the splits of VTAB-1k are those of its authors"),
        ({"task": "cifar", "fraction": 1.5}, r"data.fraction lies between 0 and 1, got 1.5"),
        ({"task": "cifar", "fraction": 0.5, "shots": 1}, r"data.shots and data.fraction both bound"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    root = trees.vtab(tmp_path / "vtab")
    with pytest.raises(EpitaxyError, match=said):
        load(root, "vtab", **more)


def test_tasks_belong_to_their_kinds(tmp_path: Path) -> None:
    with pytest.raises(
        EpitaxyError, match=r"data.task chooses within a published data set: set data.kind to one of vtab"
    ):
        DataSpec(str(tmp_path), kind="cifar100", task="cifar")
    root = trees.vtab(tmp_path / "vtab")
    with pytest.raises(FormatError, match=r"the folder of the task 'cifar', but data.task is 'dtd'"):
        load(root / "cifar", "vtab", task="dtd")


def test_altered_copies_are_refused_unless_accepted(tmp_path: Path) -> None:
    root = trees.vtab(tmp_path / "vtab")
    with pytest.raises(FormatError, match=r"lines of train800.txt: expected 800, found 4; .* data.verify: false"):
        load_splits(DataSpec(str(root), kind="vtab", task="cifar"))
    notes = load(root, "vtab", task="cifar").notes
    assert any("classes: expected 100, found 3" in note for note in notes)
    assert any("lines of test.txt: expected 10000, found 6" in note for note in notes)
    _change(root / "cifar", "train800val200.txt", ".jpg 0", ".jpg 1")
    notes = load(root, "vtab", task="cifar").notes
    assert any("labels that train800.txt and val200.txt have" in note for note in notes)


def test_fgvc_counts_classes_over_all_splits(tmp_path: Path) -> None:
    splits = load(trees.fgvc(tmp_path / "cub"), "fgvc", task="cub")
    assert splits.classes == ("1", "5", "30")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 3, 6)
    for name, label in zip(splits.test.names, splits.test.labels, strict=True):
        assert int(Path(name).parent.name) == (1, 5, 30)[label]
    assert all("/images/" in name for name in splits.train.names)
    final = load(tmp_path / "cub", "fgvc", task="cub", protocol="final")
    assert (len(final.train), len(final.validation), len(final.test)) == (33, 0, 6)


def test_fgvc_finds_its_set_below_a_root(tmp_path: Path) -> None:
    trees.union(tmp_path / "all")
    splits = load(tmp_path / "all", "fgvc", task="dogs")
    assert all("FGVC-dogs/Images/" in name for name in splits.train.names)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            {"val": {"x.jpg": 5}},
            r"val.json: 2 classes are missing that other splits have, the first is 1 \(in train.json\)",
        ),
        ({"val": {"x.jpg": "five"}}, r"val.json: 'x.jpg': expected a class number, found 'five'"),
        ({"val": {"x.jpg": True}}, r"val.json: 'x.jpg': expected a class number, found True"),
        ({"val": {}}, r"val.json: expected a mapping of file names"),
    ],
)
def test_splits_that_disagree_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: dict[str, Any], said: str
) -> None:
    root = trees.fgvc(tmp_path / "cub")
    for part, entries in spoil.items():
        trees.write(root / f"{part}.json", entries)
    monkeypatch.setattr("epitaxy.data.image_sets.fgvc.verify", lambda *_: None)  # of the counts, which differ anyway
    with pytest.raises(FormatError, match=said):
        load_splits(DataSpec(str(root), kind="fgvc", task="cub"))


def test_an_entry_given_twice_and_a_picture_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.fgvc(tmp_path / "cub")
    monkeypatch.setattr("epitaxy.data.image_sets.fgvc.verify", lambda *_: None)
    train, test = (json.loads((root / f"{part}.json").read_text()) for part in ("train", "test"))
    name = next(iter(train))
    trees.write(root / "test.json", {**test, name: train[name]})
    with pytest.raises(FormatError, match=rf"picture {name} is in train.json .* and in test.json"):
        load_splits(DataSpec(str(root), kind="fgvc", task="cub"))
    (root / "test.json").write_text('{"a.jpg": 1, "a.jpg": 5}')
    with pytest.raises(FormatError, match=r"test.json: 'a.jpg' is there twice"):
        load(root, "fgvc", task="cub")


def test_a_share_by_its_file_or_drawn(tmp_path: Path) -> None:
    root = trees.fgvc(tmp_path / "cub")
    drawn = [
        load(root, "fgvc", task="cub", fraction=share, seed=seed) for share, seed in ((0.2, 0), (0.5, 0), (0.2, 1))
    ]
    assert [Counter(one.train.labels) for one in drawn] == [dict.fromkeys(range(3), each) for each in (2, 5, 2)]
    small, large, other = (set(one.train.names) for one in drawn)
    assert small < large
    assert small != other
    assert {len(one.validation) for one in drawn} == {3}
    train = json.loads((root / "train.json").read_text())
    kept = dict(list(train.items())[:7])
    trees.write(root / "train_0.2.json", kept)
    own = load(root, "fgvc", task="cub", fraction=0.2)
    assert sorted(paths(own.train, root / "images")) == sorted(kept)
    assert any("trains on the 7 pictures of train_0.2.json" in note for note in own.notes)
    trees.write(root / "train_0.2.json", {**kept, "foreign.jpg": 5})
    with pytest.raises(FormatError, match=r"train_0.2.json: 'foreign.jpg' of class 5 is not in train.json"):
        load(root, "fgvc", task="cub", fraction=0.2)


def test_a_share_of_any_data(tmp_path: Path) -> None:
    trees.vtab(tmp_path / "vtab")
    assert len(load(tmp_path / "vtab", "vtab", task="cifar", fraction=0.5).train) == 2


def test_the_union_counts_classes_set_after_set(tmp_path: Path) -> None:
    splits = load(trees.union(tmp_path / "all"), "fgvc_union")
    assert splits.classes == tuple(
        f"{name}/{n}" for name in ("cars", "cub", "dogs", "flowers", "nabirds") for n in (1, 5, 30)
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (150, 15, 30)
    for name, label in zip(splits.train.names, splits.train.labels, strict=True):
        assert splits.groups[splits.classes[label]] == Path(name).relative_to(tmp_path / "all").parts[0].removeprefix(
            "FGVC-"
        )
    shutil.rmtree(tmp_path / "all/FGVC-dogs")
    with pytest.raises(FormatError, match=r"not the layout of the union of FGVC: FGVC-dogs/test.json is missing"):
        load(tmp_path / "all", "fgvc_union")


def test_cifar100_from_the_binary_version(tmp_path: Path) -> None:
    pixels = trees.cifar100(tmp_path / "cifar-100-binary")
    splits = load(tmp_path, "cifar100")
    assert splits.classes == ("name3", "name2", "name1")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54, 6, 6)
    assert splits.test.labels == [0, 1, 2, 0, 1, 2]
    for example, expected in zip(splits.test, pixels, strict=True):
        assert np.array_equal(np.asarray(example.value), expected)
    assert Counter(splits.validation.labels) == {0: 2, 1: 2, 2: 2}
    final = load(tmp_path, "cifar100", protocol="final")
    assert (len(final.train), len(final.validation), len(final.test)) == (60, 0, 6)
    zipped = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "cifar-100-binary")
    again = load(Path(zipped), "cifar100")
    assert np.array_equal(np.asarray(again.test[4].value), pixels[4])


def test_cifar100_faults(tmp_path: Path) -> None:
    root = tmp_path / "cifar-100-binary"
    trees.cifar100(root)
    with pytest.raises(FormatError, match=r"classes: expected 100, found 3"):
        load_splits(DataSpec(str(root), kind="cifar100"))
    data = (root / "test.bin").read_bytes()
    (root / "test.bin").write_bytes(data[:-5])
    with pytest.raises(FormatError, match=r"test.bin: expected records of 3074 bytes, found 18439 bytes"):
        load(root, "cifar100")
    (root / "test.bin").write_bytes(b"\x00\x07" + data[2:])
    with pytest.raises(FormatError, match=r"test.bin: picture 0 has class 7, fine_label_names.txt names 3"):
        load(root, "cifar100")
    pickled = tmp_path / "cifar-100-python"
    pickled.mkdir()
    for name in ("train", "test", "meta"):
        (pickled / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(FormatError, match=r"the pickled version of CIFAR-100, which is never opened"):
        load(pickled, "cifar100")


def test_cifar100_from_folders(tmp_path: Path) -> None:
    for part, each in (("train", 10), ("test", 2)):
        for name in ("apple", "bear"):
            for number in range(each):
                trees.picture(tmp_path / f"{part}/{name}/{number}.png", 32, 32)
    splits = load(tmp_path, "cifar100")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 4)
    assert splits.classes == ("apple", "bear")


def test_aircraft(tmp_path: Path) -> None:
    root = trees.aircraft(tmp_path / "fgvc-aircraft-2013b")
    splits = load(root, "aircraft")
    assert splits.classes == ("Boeing 717 200", "F/A-18")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 4, 4)
    final = load(root, "aircraft", protocol="final")
    assert (len(final.train), len(final.validation), len(final.test)) == (10, 0, 4)
    with pytest.raises(FormatError, match=r"classes: expected 100, found 2"):
        load_splits(DataSpec(str(root), kind="aircraft"))
    _change(root / "data", "images_variant_val.txt", " ", "-")
    with pytest.raises(FormatError, match=r"images_variant_val.txt:1: expected an id, a blank and a variant"):
        load(root, "aircraft")


def test_aircraft_lists_that_disagree(tmp_path: Path) -> None:
    root = trees.aircraft(tmp_path / "aircraft")
    test = (root / "data/images_variant_test.txt").read_text()
    with (root / "data/images_variant_trainval.txt").open("a") as stream:
        stream.write(test.splitlines()[0] + "\n")
    with pytest.raises(FormatError, match=r"trainval.txt:11: .* is neither in images_variant_train.txt nor in"):
        load(root, "aircraft")


@pytest.mark.parametrize("form", ["txt", "json"])
def test_food101(tmp_path: Path, form: str) -> None:
    root = trees.food101(tmp_path / "food-101", form)
    splits = load(root, "food101")
    assert splits.classes == ("apple_pie", "pho")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 4)
    assert not set(splits.validation.names) & set(splits.train.names)
    assert all("/test" in name for name in splits.test.names)
    (root / "images/pho/test0.jpg").unlink()
    with pytest.raises(FormatError, match=r"1 of 44 examples are missing: .*images/pho/test0.jpg"):
        load(root, "food101")


def test_a_mirror_that_calls_the_test_split_validation(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["pho", "apple_pie"])})
    made = {}
    for part, each in (("train", 10), ("validation", 2)):
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for label in (0, 1):
            for number in range(each):
                rows["image"].append(str(trees.picture(tmp_path / f"{part}{label}{number}.png")))
                rows["label"].append(label)
        made[part] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    splits = load(tmp_path / "saved", "food101")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 4)
    assert splits.classes == ("pho", "apple_pie")
    with pytest.raises(EpitaxyError, match=r"data.source: fgvc is read from a folder"):
        load(tmp_path / "saved", "fgvc", task="cub")


@pytest.mark.parametrize(
    ("make", "kind", "file", "more"),
    [
        (trees.vtab, "vtab", "cifar/test.txt", {"task": "cifar"}),
        (trees.aircraft, "aircraft", "data/images_variant_test.txt", {}),
        (trees.food101, "food101", "meta/test.txt", {}),
        (trees.fgvc, "fgvc", "test.json", {"task": "cub"}),
    ],
)
def test_a_wrong_line_can_be_left_out(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, file: str, more: dict[str, Any]
) -> None:
    root = make(tmp_path / "set")
    whole = len(load(root, kind, **more).test)
    text = (root / file).read_text()
    if file.endswith(".json"):
        (root / file).write_text(text.replace("}", ', "odd.jpg": "no number"}'))
    else:
        (root / file).write_text(text + "nonsense\n")
    with pytest.raises(FormatError, match=r"nonsense|odd.jpg"):
        load(root, kind, **more)
    splits = load(root, kind, on_bad="skip", **more)
    assert len(splits.test) == whole
    assert len(splits.skipped) == 1
    assert file in splits.skipped[0][0]
