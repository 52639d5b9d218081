"""The data sets that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data import shipped
from epitaxy.data.splits import DataSpec, load_splits


@pytest.mark.parametrize("name", shipped.shipped_names())
def test_each_holds_what_its_card_says(name: str, recwarn: pytest.WarningsRecorder) -> None:
    card = shipped.shipped_card(name)
    splits = load_splits(DataSpec(f"builtin:{name}"))
    assert list(splits.classes) == sorted(card["classes"])
    for part, data in (("train", splits.train), ("val", splits.validation), ("test", splits.test)):
        assert len(data) == sum(card["counts"][part].values())
    assert splits.skipped == []
    assert not recwarn.list, "no example may be in two splits"


def test_an_altered_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shipped.shipped_names()[0]
    source = shipped.shipped_archive(name)
    (tmp_path / "index.json").write_bytes((source.parent / "index.json").read_bytes())
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / source.name).write_bytes(data)
    monkeypatch.setattr(shipped, "_folder", lambda: tmp_path)
    with pytest.raises(FormatError, match=rf"{name}.zip: its sha256 is \w+..., expected \w+..."):
        load_splits(DataSpec(f"builtin:{name}"))
    (tmp_path / source.name).unlink()
    with pytest.raises(FormatError, match="missing from this installation"):
        load_splits(DataSpec(f"builtin:{name}"))


def test_an_unknown_name() -> None:
    name = shipped.shipped_names()[0]
    with pytest.raises(EpitaxyError, match=rf"no shipped data set is called '{name}x'; did you mean '{name}'"):
        load_splits(DataSpec(f"builtin:{name}x"))
