"""The published sound sets in their official layouts: folds, lists, leakage, and what is said of altered copies."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.splits import DataSpec, Examples, Splits, load_splits
from tests.data import audio_trees as trees

SETS = {
    "esc50": (trees.esc50, 1),
    "urbansound8k": (trees.urbansound8k, 1),
    "speech_commands": (trees.speech_commands, None),
    "fluent_speech_commands": (trees.fluent, None),
    "iemocap": (trees.iemocap, 1),
}


def load(root: Path, kind: str, **more: Any) -> Splits:
    return load_splits(DataSpec(str(root), kind=kind, verify=False, **more))  # type: ignore[arg-type]


def stems(part: Examples) -> list[str]:
    return [Path(name).name for name in part.names]


def folds(part: Examples) -> set[int]:
    return {int(name.split("-")[0]) for name in stems(part)}


@pytest.mark.parametrize(("tested", "validation", "train"), [(5, 4, {1, 2, 3}), (1, 5, {2, 3, 4}), (3, 2, {4, 5, 1})])
def test_esc50_folds_are_the_published_cycle(tmp_path: Path, tested: int, validation: int, train: set[int]) -> None:
    splits = load(trees.esc50(tmp_path / "ESC-50"), "esc50", fold=tested)
    assert (folds(splits.train), folds(splits.validation), folds(splits.test)) == (train, {validation}, {tested})
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 8, 8)
    assert splits.classes == ("sound2", "sound1")  # in the order of the targets, not of the alphabet
    assert splits.test[0].value.rate == 8000
    assert all(
        name.endswith(f"-{label}.wav") for name, label in zip(splits.test.names, splits.test.labels, strict=True)
    )


def test_esc50_usual_protocol_keeps_source_recordings_on_one_side(tmp_path: Path) -> None:
    root = trees.esc50(tmp_path / "ESC-50")
    splits = load(root, "esc50", fold=2, protocol="usual")
    assert folds(splits.test) == {2}
    assert folds(splits.train) == {1, 3, 4, 5}
    sources = [{name.split("-")[1] for name in stems(part)} for part in (splits.train, splits.validation)]
    assert not sources[0] & sources[1]
    assert len(splits.train) + len(splits.validation) == 32
    assert len(splits.validation) == 4  # a tenth of 16 clips of each class, in whole recordings of two
    other = load(root, "esc50", fold=2, protocol="usual", seed=5)
    assert stems(other.validation) != stems(splits.validation)


@pytest.mark.parametrize(("kind", "share"), [("esc50", 4 / 5), ("urbansound8k", 9 / 10)])
def test_legacy_protocol_validates_on_the_test_fold_and_says_so(tmp_path: Path, kind: str, share: float) -> None:
    with pytest.warns(UserWarning, match="validation and test share"):
        splits = load(SETS[kind][0](tmp_path / "set"), kind, fold=1, protocol="legacy")
    assert splits.validation.names == splits.test.names
    assert any("doubles as validation" in note for note in splits.notes)
    assert len(splits.train) == pytest.approx(share * (len(splits.train) + len(splits.test)))


@pytest.mark.parametrize("tested", [1, 7])
def test_urbansound8k_never_validates_on_the_test_fold(tmp_path: Path, tested: int) -> None:
    splits = load(trees.urbansound8k(tmp_path / "UrbanSound8K"), "urbansound8k", fold=tested)
    recordings = [{int(name.split("-")[0]) // 100 for name in stems(p)} for p in (splits.train, splits.validation)]
    assert recordings[1] == {tested - 1 or 10}
    assert recordings[0] == set(range(1, 11)) - {tested, tested - 1 or 10}
    assert {int(name.split("-")[0]) // 100 for name in stems(splits.test)} == {tested}
    assert splits.classes == trees.US_NAMES
    assert {example.value.rate for example in splits.test} == {8000, 11025}


def test_speech_commands_follows_both_lists(tmp_path: Path) -> None:
    splits = load(trees.speech_commands(tmp_path / "speech_commands_v0.02"), "speech_commands")
    speakers = [{name.split("_")[0] for name in stems(part)} for part in (splits.train, splits.validation, splits.test)]
    assert speakers == [{"aa", "bb", "cc"}, {"dd"}, {"ee"}]
    assert splits.classes == ("no", "yes")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 4, 4)
    assert not any("background" in name for name in splits.train.names)


def test_fluent_speech_commands_sorts_its_intents(tmp_path: Path) -> None:
    splits = load(trees.fluent(tmp_path / "fluent_speech_commands_dataset"), "fluent_speech_commands")
    assert splits.classes == ("activate-lights-kitchen", "activate-lights-none", "increase-heat-none")
    assert Counter(splits.train.labels) == {0: 3, 1: 3, 2: 3}
    assert (len(splits.validation), len(splits.test)) == (3, 6)


@pytest.mark.parametrize(("fold", "session", "speaker"), [(1, 1, "F"), (2, 1, "M"), (9, 5, "F"), (10, 5, "M")])
def test_iemocap_holds_out_a_session_and_tests_a_speaker(tmp_path: Path, fold: int, session: int, speaker: str) -> None:
    splits = load(trees.iemocap(tmp_path / "IEMOCAP_full_release"), "iemocap", fold=fold)
    held = [{(int(name[3:5]), name.split("_")[-1][0]) for name in stems(p)} for p in (splits.test, splits.validation)]
    assert held == [{(session, speaker)}, {(session, "M" if speaker == "F" else "F")}]
    assert {int(name[3:5]) for name in stems(splits.train)} == set(range(1, 6)) - {session}
    assert splits.classes == ("neu", "hap", "sad", "ang")
    assert Counter(splits.test.labels) == {0: 1, 1: 2, 2: 1, 3: 1}  # excited counts as happy, frustrated not at all
    assert any("10 fru" in note for note in splits.notes)


@pytest.mark.parametrize("kind", SETS)
def test_a_folder_above_and_a_zip_are_found_too(tmp_path: Path, kind: str) -> None:
    make, fold = SETS[kind]
    make(tmp_path / "downloads" / "inner")
    direct = load(tmp_path / "downloads" / "inner", kind, fold=fold)
    above = load(tmp_path / "downloads", kind, fold=fold)
    zipped = load(Path(shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "downloads")), kind, fold=fold)
    assert stems(direct.train) == stems(above.train) == stems(zipped.train)
    assert direct.kind == kind
    assert (zipped.train[0].value.samples == direct.train[0].value.samples).all()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("esc50", "clips of fold 1: expected 400, found 8"),
        ("urbansound8k", "clips of fold 1: expected 873, found 4"),
        ("speech_commands", "words: expected 35, found 2"),
        ("fluent_speech_commands", "data/train_data.csv: expected 23132, found 9"),
        ("iemocap", "utterances of class neu: expected 1708, found 10"),
    ],
)
def test_counts_are_checked_against_the_official_numbers(tmp_path: Path, kind: str, said: str) -> None:
    make, fold = SETS[kind]
    make(tmp_path / "set")
    with pytest.raises(FormatError, match="an incomplete or altered copy: " + said):
        load_splits(DataSpec(str(tmp_path / "set"), kind=kind, fold=fold))  # type: ignore[arg-type]
    assert any(said in note for note in load(tmp_path / "set", kind, fold=fold).notes)


@pytest.mark.parametrize("kind", SETS)
def test_missing_audio_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    make, fold = SETS[kind]
    root = make(tmp_path / "set")
    gone = Path(load(root, kind, fold=fold).test.names[0])
    gone.unlink()
    with pytest.raises(FormatError, match=rf"1 of \d+ examples are missing: .*{gone.name} \(no such file\)"):
        load(root, kind, fold=fold, check=False)
    splits = load(root, kind, fold=fold, on_bad="skip")
    assert splits.skipped[0] == (str(gone), "no such file")
    assert str(gone) not in splits.test.names


def test_esc50_refuses_a_wrong_fold_and_a_recording_in_two(tmp_path: Path) -> None:
    root = trees.esc50(tmp_path / "ESC-50")
    table = root / "meta/esc50.csv"
    whole = table.read_text()
    table.write_text(whole.replace("1-1000-A-0.wav,1,", "1-1000-A-0.wav,2,"))
    with pytest.raises(FormatError, match=r"esc50.csv:2: the name '1-1000-A-0.wav' does not fit fold 2 and target 0"):
        load(root, "esc50", fold=1)
    table.write_text(whole.replace(",2000,", ",1000,"))
    notes = load(root, "esc50", fold=1).notes
    assert any("source recording 1000 is in fold 1 (1-1000-A-0.wav) and in fold 2 (2-2000-A-0.wav)" in n for n in notes)
    table.write_text(whole.replace(",sound2,", ",other,", 1))
    with pytest.raises(FormatError, match=r"csv:2: target 0 is 'sound2' elsewhere and 'other' here"):
        load(root, "esc50", fold=1)


def test_urbansound8k_refuses_a_file_in_another_fold(tmp_path: Path) -> None:
    root = trees.urbansound8k(tmp_path / "UrbanSound8K")
    shutil.move(root / "audio/fold3/300-0-0-0.wav", root / "audio/fold4/300-0-0-0.wav")
    with pytest.raises(FormatError, match=r"300-0-0-0.wav belongs to fold 3, but lies in audio/fold4"):
        load(root, "urbansound8k", fold=1)
    table = root / "metadata/UrbanSound8K.csv"
    table.write_text(table.read_text().replace("0,air_conditioner", "0,air_conditoner", 1))
    with pytest.raises(FormatError, match=r"csv:2: class 0 is 'air_conditioner', found 'air_conditoner'"):
        load(root, "urbansound8k", fold=1)


def test_speech_commands_refuses_what_its_lists_cannot_hold(tmp_path: Path) -> None:
    root = trees.speech_commands(tmp_path / "gsc")
    lists = root / "testing_list.txt"
    whole = lists.read_text()
    lists.write_text(whole + "maybe/ee_nohash_0.wav\n")
    with pytest.raises(
        FormatError, match=r"testing_list.txt:5: expected word/file.wav .* found 'maybe/ee_nohash_0.wav'"
    ):
        load(root, "speech_commands")
    lists.write_text(whole + "yes/dd_nohash_0.wav\n")
    with pytest.raises(FormatError, match=r"yes/dd_nohash_0.wav is in both lists"):
        load(root, "speech_commands")
    lists.write_text(whole + "yes/aa_nohash_0.wav\n")
    assert any("speaker aa is in train" in note for note in load(root, "speech_commands").notes)
    lists.write_text(whole)
    trees.sound(root / "yess/aa_nohash_0.wav")
    with pytest.raises(FormatError, match=r"yess: not one of the 35 words .*did you mean 'yes'"):
        load(root, "speech_commands")


def test_iemocap_refuses_an_unknown_emotion_and_a_foreign_session(tmp_path: Path) -> None:
    root = trees.iemocap(tmp_path / "IEMOCAP")
    file = root / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"
    whole = file.read_text()
    file.write_text(whole.replace("\tsad\t", "\tsadd\t", 1))
    with pytest.raises(FormatError, match=r"Ses02F_impro01.txt:9: no emotion is called 'sadd'"):
        load(root, "iemocap", fold=1)
    file.write_text(whole.replace("Ses02F_impro01_F000", "Ses03F_impro01_F000"))
    with pytest.raises(FormatError, match="Ses03F_impro01_F000 is no utterance of session 2"):
        load(root, "iemocap", fold=1)
    shutil.rmtree(root / "Session4/dialog")
    file.write_text(whole)
    with pytest.raises(FormatError, match=r"Session4/dialog/EmoEvaluation/ holds no .txt file"):
        load(root, "iemocap", fold=1)


def test_fluent_refuses_a_speaker_on_two_sides(tmp_path: Path) -> None:
    root = trees.fluent(tmp_path / "fsc")
    table = root / "data/test_data.csv"
    table.write_text(table.read_text().replace(",p3,", ",p1,"))
    assert any("speaker p1 is in train" in note for note in load(root, "fluent_speech_commands").notes)
    table.write_text(table.read_text().replace("action", "verb", 1))
    with pytest.raises(FormatError, match="no column is called 'action'"):
        load(root, "fluent_speech_commands")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "esc50"}, r"data.fold: ESC-50 has 5 folds; say which one is tested, 1 to 5"),
        ({"kind": "esc50", "fold": 6}, r"ESC-50 has folds 1 to 5, got 6"),
        ({"kind": "esc50", "fold": 1, "protocol": "ususal"}, r"no protocol 'ususal'; did you mean 'usual'"),
        ({"kind": "esc50", "fold": 1, "validation": 0.1}, r"data.validation: the splits of ESC-50 are those"),
        ({"fold": 1}, r"data.fold chooses within a published data set"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    trees.esc50(tmp_path / "ESC-50")
    with pytest.raises(EpitaxyError, match=said):
        load_splits(DataSpec(str(tmp_path / "ESC-50"), **values))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    trees.urbansound8k(tmp_path / "set")
    with pytest.raises(
        FormatError, match=r"not the layout of ESC-50: meta/esc50.csv is missing; found audio, metadata"
    ):
        load(tmp_path / "set", "esc50", fold=1)


ALTERED: dict[str, tuple[str, str, str, str, str]] = {  # kind: file, what is there, what comes instead, where, why
    "esc50": ("meta/esc50.csv", "1-1000-A-0.wav,1,", "1-1000-A-0.wav,2,", "esc50.csv:2", "does not fit fold 2"),
    "esc50 fold": ("meta/esc50.csv", "1-1000-A-0.wav,1,", "1-1000-A-0.wav,9,", "esc50.csv:2", "found '9'"),
    "esc50 label": ("meta/esc50.csv", "0,sound2", "0,sonud2", "esc50.csv:2", "'sound2' elsewhere and 'sonud2' here"),
    "urbansound8k": (
        "metadata/UrbanSound8K.csv",
        "1,1,0,air",
        "1,3,0,air",
        "8K.csv:2",
        "belongs to fold 3, but lies in",
    ),
    "urbansound8k label": (
        "metadata/UrbanSound8K.csv",
        "0,air_co",
        "0,hair_co",
        "8K.csv:2",
        "found 'hair_conditioner'",
    ),
    "speech_commands": ("testing_list.txt", "yes/ee_nohash_0", "yes!/ee_nohash_0", "list.txt:1", "one of the 35 words"),
    "fluent_speech_commands": ("data/test_data.csv", ",none", ",", "test_data.csv:2", "expected an action, an object"),
    "iemocap": ("Session2/dialog/EmoEvaluation/Ses02F_impro01.txt", "\tsad\t", "\tsadd\t", "01.txt:9", "called 'sadd'"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_a_wrong_line_stops_the_reading_or_is_left_out(tmp_path: Path, case: str) -> None:
    kind = case.split()[0]
    make, fold = SETS[kind]
    root = make(tmp_path / "set")
    whole = load(root, kind, fold=fold)
    file, old, new, where, why = ALTERED[case]
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(FormatError, match=re.escape(why)) as caught:
        load(root, kind, fold=fold)
    assert f"{where}: " in str(caught.value)
    splits = load(root, kind, fold=fold, on_bad="skip")
    assert splits.classes == whole.classes
    assert splits.skipped[0][0].endswith(where)
    assert why in splits.skipped[0][1]
    assert f"{where}: " not in splits.skipped[0][1]
    rows = [len(s.train) + len(s.validation) + len(s.test) for s in (whole, splits)]
    assert rows[1] == rows[0] - (0 if kind == "speech_commands" else 1)  # there the clip itself trains then
    assert any("1 examples were left out" in note for note in splits.notes)


def test_a_folder_of_no_word_is_left_out(tmp_path: Path) -> None:
    root = trees.speech_commands(tmp_path / "gsc")
    trees.sound(root / "yess/aa_nohash_0.wav")
    splits = load(root, "speech_commands", on_bad="skip")
    assert [Path(name).name for name, _ in splits.skipped] == ["yess"]
    assert splits.skipped[0][1].startswith("not one of the 35 words")
    assert splits.classes == ("no", "yes")
