"""CSV, TSV and JSON lines: texts and files, splits, and faults by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epitaxy.core.errors import FormatError
from epitaxy.data.splits import DataSpec, load_splits
from tests.data.makers import picture, tone

TEXTS = [(f"{word} number {number}", word) for word in ("good", "bad") for number in range(10)]


def write_csv(path: Path, rows: list[tuple[str, ...]], header: str, separator: str = ",") -> Path:
    path.write_text("\n".join([header, *(separator.join(row) for row in rows)]) + "\n")
    return path


def test_texts_in_csv_tsv_and_json_lines_are_the_same_data(tmp_path: Path) -> None:
    comma = write_csv(tmp_path / "t.csv", TEXTS, "text,label")
    tab = write_csv(tmp_path / "t.tsv", TEXTS, "text\tlabel", "\t")
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in TEXTS))
    found = []
    for path in (comma, tab, lines):
        splits = load_splits(DataSpec(str(path)))
        assert splits.modality == "text"
        assert splits.classes == ("bad", "good")
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
        found.append({example.value for data in (splits.train, splits.validation, splits.test) for example in data})
    assert found[0] == found[1] == found[2] == {text for text, _ in TEXTS}


def test_quoted_text_keeps_its_commas_lines_and_odd_separators(tmp_path: Path) -> None:
    body = "".join(f'"one, two\nthree \u2028 {number}",{number % 2}\n' for number in range(20))
    (tmp_path / "t.csv").write_text("text,label\n" + body, encoding="utf-8-sig")
    splits = load_splits(DataSpec(str(tmp_path / "t.csv")))
    assert splits.classes == ("0", "1")
    assert all(example.value.startswith("one, two\nthree \u2028") for example in splits.train)


def test_a_split_column_divides(tmp_path: Path) -> None:
    rows = [(f"{label}{split}{n}", label, split) for label in "ab" for split in ("train", "dev", "test") for n in "12"]
    path = write_csv(tmp_path / "t.csv", [*rows, ("x", "a", "other")], "sentence,class,split")
    splits = load_splits(DataSpec(str(path)))
    assert [len(data) for data in (splits.train, splits.validation, splits.test)] == [4, 4, 4]
    assert all("dev" in example.value for example in splits.validation)
    assert any("other (1 rows)" in note for note in splits.notes)


def test_a_folder_of_tables(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write_csv(tmp_path / f"{split}.csv", [(f"{split} {text}", label) for text, label in TEXTS], "text,label")
    splits = load_splits(DataSpec(str(tmp_path)))
    assert [len(data) for data in (splits.train, splits.validation, splits.test)] == [20, 20, 20]


def test_files_are_relative_to_the_table(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        picture(tmp_path / "pics" / f"{number}.png", seed=number)
        rows.append((f"pics/{number}.png", "even" if number % 2 == 0 else "odd"))
    path = write_csv(tmp_path / "t.csv", rows, "file,label")
    splits = load_splits(DataSpec(str(path)))
    assert splits.modality == "vision"
    assert splits.train[0].value.size == (12, 12)
    write_csv(path, [*rows, ("pics/gone.png", "odd"), ("", "odd")], "file,label")
    with pytest.raises(FormatError, match=r"2 of 14 examples cannot .*t.csv:14 \(pics/gone.png\) \(no such file"):
        load_splits(DataSpec(str(path)))


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        tone(tmp_path / f"{number}.wav", 200.0 + 50 * number)
        rows.append((f"{number}.wav", f"text {number}", str(number % 2)))
    path = write_csv(tmp_path / "t.csv", rows, "clip,transcript,speaker")
    heard = load_splits(DataSpec(str(path), file_column="clip", label_column="speaker"))
    read = load_splits(DataSpec(str(path), text_column="transcript", label_column="speaker"))
    assert (heard.modality, read.modality) == ("audio", "text")
    with pytest.raises(FormatError, match=r"none of the columns clip, transcript, speaker is the label"):
        load_splits(DataSpec(str(path)))
    with pytest.raises(FormatError, match=r"no column is called 'speeker'; did you mean 'speaker'"):
        load_splits(DataSpec(str(path), label_column="speeker"))
    with pytest.raises(FormatError, match=r"cannot tell which column holds the text or the file"):
        load_splits(DataSpec(str(path), label_column="speaker"))
    with pytest.raises(FormatError, match=r"give data.file_column or data.text_column, not both"):
        load_splits(DataSpec(str(path), label_column="speaker", file_column="clip", text_column="transcript"))


def test_rows_without_label_or_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [*TEXTS, ("what am I", ""), ("", "good")], "text,label")
    with pytest.raises(FormatError, match=r"1 of 22 examples have no label: .*t.csv:22 \(no label\)"):
        load_splits(DataSpec(str(path)))
    splits = load_splits(DataSpec(str(path), on_bad="skip"))
    assert splits.skipped == [(f"{path}:22", "no label"), (f"{path}:23", "the text is empty")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", r"t.csv: the file is empty"),
        ("t.csv", b"text,label\n", r"t.csv: the table has no rows"),
        ("t.csv", b"text,label\na,b\nc\n", r"t.csv:3: expected 2 columns as in the first line"),
        ("t.csv", b"text,label\na,b,c\n", r"t.csv:2: expected 2 columns"),
        ("t.csv", b"text,text\na,b\n", r"t.csv: two columns of the first line have the same name"),
        ("t.csv", b'text,label\n"a,b\n', r"t.csv:2: unexpected end of data"),
        ("t.csv", b"text,label\n\xff\xfe,b\n", r"t.csv: not a text in UTF-8 \(byte 11\)"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', r"t.jsonl:2: not JSON"),
        (
            "t.jsonl",
            b'{"text": "a", "label": 1}\n[1]\n',
            r"t.jsonl:2: expected an object .* found list",
        ),
        (
            "t.jsonl",
            b'{"text": "a", "label": 1, "label": 2}\n',
            r"t.jsonl:1: not JSON \(the field 'label' is given twice",
        ),
        (
            "t.jsonl",
            b'{"text": "a", "label": ["x"]}\n',
            r"t.jsonl:1: the column 'label' holds a list, expected one value",
        ),
        ("t.jsonl", b'{"text": {"a": 1}, "label": 1}\n', r"t.jsonl:1: the column 'text' holds a dict"),
        ("t.csv", b"file,label\na.png,1\nb.wav,2\n", r"t.csv: names both pictures and sounds"),
        ("t.csv", b"file,label\na.doc,1\nb.doc,2\n", r"t.csv: names neither pictures nor sounds; found .doc"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        load_splits(DataSpec(str(tmp_path / name)))


def test_long_texts_and_loud_suffixes(tmp_path: Path) -> None:
    """A field longer than the csv module's own limit, in a file called as some programs call theirs."""
    rows = "".join(f"{label}{number} {'word ' * 30000},{label}\n" for label in "ab" for number in range(8))
    (tmp_path / "MAILS.CSV").write_text("text,label\n" + rows)
    splits = load_splits(DataSpec(str(tmp_path / "MAILS.CSV")))
    assert len(splits.train[0].value) > 150_000


def test_the_same_text_on_both_sides_is_noticed(tmp_path: Path) -> None:
    rows = [
        (f"{label} {split} {n}", label, split) for label in "ab" for split in ("train", "val", "test") for n in "12"
    ]
    path = write_csv(tmp_path / "t.csv", [*rows, ("a train 1", "a", "test")], "text,label,split")
    with pytest.warns(UserWarning, match="train and test share 1 examples"):
        load_splits(DataSpec(str(path)))
