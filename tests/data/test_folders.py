"""Picture folders: layouts, splits, and every kind of fault."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.splits import DataSpec, load_splits
from tests.data.makers import picture, pictures

WHOLE = {f"{split}/{colour}": 4 for split in ("train", "val", "test") for colour in ("red", "green")}


def test_split_folders_are_read_as_they_are(tmp_path: Path) -> None:
    splits = load_splits(DataSpec(str(pictures(tmp_path / "d", WHOLE))))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 8, 8)
    assert splits.classes == ("green", "red")
    assert splits.modality == "vision"
    assert splits.notes == []
    assert splits.skipped == []
    assert all("/val/" in name for name in splits.validation.names)
    example = splits.train[0]
    assert example.value.mode == "RGB"
    assert example.label == 0
    assert "/train/green/" in example.name
    red = np.asarray(splits.train[splits.train.labels.index(1)].value).mean((0, 1))
    assert red[0] > 150 > red[1]


def test_class_folders_are_cut_class_by_class(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {"red": 20, "green": 10, "deep/in/blue": 0})
    pictures(root, {"deep": 10})
    spec = DataSpec(str(root), validation=0.2, test=0.3, seed=3, on_bad="skip")
    splits = load_splits(spec)
    assert splits.classes == ("deep", "green", "red")
    for data, each in ((splits.train, (5, 5, 10)), (splits.validation, (2, 2, 4)), (splits.test, (3, 3, 6))):
        assert tuple(data.labels.count(number) for number in range(3)) == each
    names = [*splits.train.names, *splits.validation.names, *splits.test.names]
    assert len(set(names)) == 40
    again, other = load_splits(spec), load_splits(DataSpec(str(root), validation=0.2, test=0.3, seed=4, on_bad="skip"))
    assert again.train.names == splits.train.names
    assert other.train.names != splits.train.names


def test_files_lie_at_any_depth_below_their_class(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {"train/red/2024/may": 3, "train/green": 3, "val/red": 2, "val/green/x/y": 2})
    pictures(root, {"test/red/a": 1, "test/green": 1})
    splits = load_splits(DataSpec(str(root)))
    assert sorted(splits.train.labels) == [0, 0, 0, 1, 1, 1]
    assert sorted(splits.validation.labels) == [0, 0, 1, 1]


def test_validation_is_cut_from_train_and_never_from_test(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {"train/red": 10, "train/green": 10, "test/red": 6, "test/green": 6})
    splits = load_splits(DataSpec(str(root)))
    assert len(splits.validation) == 2
    assert len(splits.train) == 18
    assert len(splits.test) == 12
    assert all("/train/" in name for name in splits.validation.names)
    assert any("no validation split" in note for note in splits.notes)
    with pytest.raises(EpitaxyError, match=r"data.validation: the split 'test' is the test split already"):
        load_splits(DataSpec(str(root), validation="test"))


def test_splits_may_have_names_of_their_own(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {f"{split}/{c}": 4 for split in ("fit", "held", "spare") for c in ("red", "green")})
    splits = load_splits(DataSpec(str(root), train="fit", validation=0.25, test="held"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 8)
    assert any("not used: spare" in note for note in splits.notes)
    with pytest.raises(FormatError, match=r"no folder is called 'fitt'; did you mean 'fit'"):
        load_splits(DataSpec(str(root), train="fitt"))
    with pytest.raises(FormatError, match=r"no split is called 'heldd'; did you mean 'held'"):
        load_splits(DataSpec(str(root), train="fit", test="heldd"))


def test_a_zip_reads_like_its_folder_and_the_data_can_be_pickled(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    archive = tmp_path / "d.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in root.rglob("*.png"):
            target.write(file, Path("wrapped") / file.relative_to(root))
    plain, packed = load_splits(DataSpec(str(root))), load_splits(DataSpec(str(archive)))
    assert packed.train.labels == plain.train.labels
    copy = pickle.loads(pickle.dumps(packed.train))
    for number in range(len(plain.train)):
        assert copy[number].value.tobytes() == plain.train[number].value.tobytes()


def test_a_damaged_file_in_a_zip_is_named(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    archive = tmp_path / "d.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in sorted(root.rglob("*.png")):
            target.write(file, file.relative_to(root))
        hurt = target.getinfo("train/red/002.png")
    data = bytearray(archive.read_bytes())
    data[hurt.header_offset + 200] ^= 1
    archive.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"1 of 24 .*d.zip/train/red/002.png \(cannot be read \(damaged in the archive"
    ):
        load_splits(DataSpec(str(archive)))


def test_bad_files_are_counted_and_named_or_left_out(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    (root / "train/red/empty.png").write_bytes(b"")
    whole = (root / "train/green/000.png").read_bytes()
    (root / "train/green/torn.png").write_bytes(whole[: len(whole) // 2])
    (root / "test/red/words.jpg").write_text("no picture")
    spec = DataSpec(str(root))
    with pytest.raises(FormatError) as caught:
        load_splits(spec)
    message = str(caught.value)
    assert "3 of 27 examples cannot be read" in message
    assert "empty.png (the file is empty)" in message
    assert "torn.png (" in message
    assert "words.jpg (not a picture in a known format)" in message
    assert "on_bad: skip" in message
    splits = load_splits(DataSpec(str(root), on_bad="skip"))
    assert (len(splits.train), len(splits.test)) == (8, 8)
    assert sorted(Path(name).name for name, _ in splits.skipped) == ["empty.png", "torn.png", "words.jpg"]
    assert any("3 examples were left out" in note for note in splits.notes)


def test_a_torn_jpeg_is_found(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    file = picture(root / "train/red/photo.jpg", side=200)
    load_splits(DataSpec(str(root)))
    file.write_bytes(file.read_bytes()[:-1500])
    with pytest.raises(FormatError, match=r"photo.jpg \(image file is truncated"):
        load_splits(DataSpec(str(root)))


def test_unchecked_files_are_named_when_they_are_read(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    (root / "train/red/000.png").write_bytes(b"")
    splits = load_splits(DataSpec(str(root), check=False))
    bad = next(number for number, name in enumerate(splits.train.names) if name.endswith("red/000.png"))
    with pytest.raises(FormatError, match=r"red/000.png: the file is empty"):
        splits.train[bad]
    (root / "train/red/000.png").unlink()
    with pytest.raises(FormatError, match=r"red/000.png: no such file"):
        splits.train[bad]


def test_many_bad_files_make_a_short_message(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    for number in range(40):
        (root / f"train/red/bad{number}.png").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"40 of 64 examples cannot be read: .* and 35 more; mend"):
        load_splits(DataSpec(str(root)))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train/red": 3, "train/green": 3, "test/red": 3},
            r"class 'green' is missing from test \(it has 2 in",
        ),
        ({"train/red": 3, "test/red": 3, "test/green": 2}, r"class 'green' is missing from train"),
        ({"train/red": 3, "train/green": 0, "test/red": 1}, r"the class folder 'train/green' is empty"),
        ({"red": 5, "green": 0}, r"the class folder 'green' is empty"),
        ({"red": 5, "green": 2}, r"class 'green' has 2 different examples, too few to cut test and validation"),
        ({"red": 5}, r"a classifier needs at least two classes, found red"),
        ({"train": 5, "test": 5}, r"expected one folder per class, found 5 files"),
        ({"val/red": 5, "test/red": 5}, r"found the splits test, val but no folder 'train'"),
        ({"train/red": 0, "train/green": 0, "test/red": 5}, r"the class folder 'train/green' is empty"),
        ({"a/b": 0}, r"no pictures in this folder; it has 2 folders and no file"),
        ({}, r"no pictures in this folder; it is empty"),
    ],
)
def test_each_fault_of_a_layout_has_its_sentence(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    root = tmp_path / "d"
    root.mkdir()
    pictures(root, counts)
    validation = 0.34 if any(key.startswith("train/") for key in counts) else None
    with pytest.raises(FormatError, match=message) as caught:
        load_splits(DataSpec(str(root), validation=validation))
    assert str(root) in str(caught.value)


def test_gaps_are_bridged_when_asked(tmp_path: Path) -> None:
    counts = {"train/red": 4, "train/green": 4, "train/blue": 4, "val/red": 2, "val/green": 2, "test/red": 2}
    root = pictures(tmp_path / "d", {**counts, "test/green": 2, "test/violet": 2, "train/grey": 0})
    splits = load_splits(DataSpec(str(root), on_bad="skip"))
    assert splits.classes == ("blue", "green", "red")
    assert len(splits.test) == 4
    assert [reason for _, reason in splits.skipped] == ["its class 'violet' is not in train"] * 2
    text = "\n".join(splits.notes)
    assert "class 'blue' is missing from validation and test" in text
    assert "the class folder 'train/grey' is empty" in text


def test_pictures_outside_every_class_have_no_label(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    picture(root / "train/stray.png")
    with pytest.raises(FormatError, match=r"1 of 25 examples have no label: .*stray.png"):
        load_splits(DataSpec(str(root)))
    splits = load_splits(DataSpec(str(root), on_bad="skip"))
    assert splits.skipped == [(f"{root}/train/stray.png", "no label")]


def test_files_in_two_splits_are_named(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    copy = root / "test/red/copy.png"
    copy.write_bytes((root / "train/red/001.png").read_bytes())
    with pytest.warns(UserWarning, match=r"share 1 examples .*train/red/001.png and .*test/red/copy.png"):
        splits = load_splits(DataSpec(str(root)))
    assert any("the test score will be too good" in note for note in splits.notes)


def test_copies_of_a_file_are_cut_to_one_side(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    root = pictures(tmp_path / "d", {"red": 12, "green": 12})
    for number in range(12):
        (root / f"red/copy{number}.png").write_bytes((root / f"red/{number:03d}.png").read_bytes())
    for seed in range(5):
        splits = load_splits(DataSpec(str(root), seed=seed))
        assert len(splits.test) >= 6
    assert not recwarn.list


def test_limits_keep_so_many_of_each_class(tmp_path: Path) -> None:
    root = str(pictures(tmp_path / "d", WHOLE))
    splits = load_splits(DataSpec(root, limit_per_class=3, limit_evaluation_per_class=1))
    assert sorted(splits.train.labels) == [0, 0, 0, 1, 1, 1]
    assert sorted(splits.test.labels) == [0, 1]
    drawn = {tuple(load_splits(DataSpec(root, limit_per_class=2, seed=seed)).train.names) for seed in range(6)}
    assert len(drawn) > 1


def test_foreign_files_are_noted_and_hidden_ones_ignored(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    (root / "train/red/readme.txt").write_text("x")
    (root / "train/red/.DS_Store").write_bytes(b"x")
    (root / "train/.cache").mkdir()
    splits = load_splits(DataSpec(str(root)))
    assert splits.notes == [f"{root}: 1 files are no pictures and are left out, the first is train/red/readme.txt"]


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {str(number): 4 for number in range(12)})
    assert load_splits(DataSpec(str(root))).classes == tuple(str(number) for number in range(12))


def test_sixteen_bit_and_rotated_pictures_come_out_right(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", WHOLE)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(root / "train/red/deep.png")
    wide = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = wide.getexif()
    exif[0x0112] = 6
    wide.save(root / "train/red/turned.jpg", exif=exif)
    train = load_splits(DataSpec(str(root))).train
    values = {Path(name).name: train[number].value for number, name in enumerate(train.names)}
    assert np.asarray(values["deep.png"]).mean() == 128
    assert values["turned.jpg"].size == (10, 20)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    pictures(tmp_path / "flowers", WHOLE)
    with pytest.raises(FormatError, match=r"flwers: no such file or folder; did you mean 'flowers'"):
        load_splits(DataSpec(str(tmp_path / "flwers")))
    with pytest.raises(FormatError, match=r"expected a folder, a .zip, or a table"):
        load_splits(DataSpec(str(picture(tmp_path / "one.png"))))
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(FormatError, match=r"not a readable zip archive"):
        load_splits(DataSpec(str(tmp_path / "no.zip")))


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "flowers", WHOLE)
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("red"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FormatError, match=r"flowers/.*red: this folder cannot be read \(Permission denied\)"):
        load_splits(DataSpec(str(tmp_path / "flowers")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation": 1.5}, "data.validation is the name of a split or a fraction"),
        ({"limit_per_class": 0}, "data.limit_per_class must be at least 1"),
        ({"kind": "pictures"}, "data.kind is one of auto, image_folder"),
        ({"on_bad": "ignore"}, "data.on_bad is one of error, skip"),
        ({"seed": -1}, "data.seed must not be negative"),
    ],
)
def test_settings_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(EpitaxyError, match=message):
        DataSpec("d", **fields)  # type: ignore[arg-type]


def test_fractions_that_leave_nothing(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {"red": 9, "green": 9})
    with pytest.raises(EpitaxyError, match=r"validation and test take 110%"):
        load_splits(DataSpec(str(root), validation=0.5, test=0.6))
