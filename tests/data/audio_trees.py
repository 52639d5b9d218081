"""Small trees in the official layouts of the published sound sets, with real sounds that all differ."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import soundfile

_number: Iterator[int] = count(1)


def sound(path: Path, rate: int = 8000, samples: int = 160) -> Path:
    """A few milliseconds of noise that no other file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(next(_number)).uniform(-0.5, 0.5, samples)
    soundfile.write(path, noise, rate)
    return path


def write_table(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(lines)
    return path


ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


def esc50(root: Path, classes: int = 2, sources: int = 2, takes: int = 2, rate: int = 8000, samples: int = 160) -> Path:
    """``sources`` recordings with ``takes`` clips each, in every class of every fold; names against the alphabet."""
    lines = []
    for fold in range(1, 6):
        for target in range(classes):
            for source in range(sources):
                for take in range(takes):
                    clip = 1000 * fold + 100 * target + source
                    name = f"{fold}-{clip}-{'ABCDEFGH'[take]}-{target}.wav"
                    sound(root / "audio" / name, rate, samples)
                    lines.append((name, fold, target, f"sound{classes - target}", False, clip, "ABCDEFGH"[take]))
    write_table(root / "meta/esc50.csv", ESC_COLUMNS, lines)
    return root


US_COLUMNS = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
US_NAMES = ("air_conditioner", "car_horn")


def urbansound8k(root: Path) -> Path:
    """Two slices of one recording, in two classes of every fold."""
    lines = []
    for fold in range(1, 11):
        for number, label in enumerate(US_NAMES):
            recording = 100 * fold + number
            for piece in range(2):
                name = f"{recording}-{number}-0-{piece}.wav"
                sound(root / f"audio/fold{fold}" / name, rate=8000 if piece else 11025)
                lines.append((name, recording, 0.0, 0.5, 1, fold, number, label))
    write_table(root / "metadata/UrbanSound8K.csv", US_COLUMNS, lines)
    return root


def speech_commands(root: Path) -> Path:
    """Two words, three speakers for training, one for each list, and background noise."""
    lists: dict[str, list[str]] = {"validation": [], "testing": []}
    for word in ("yes", "no"):
        for speaker, part in (("aa", ""), ("bb", ""), ("cc", ""), ("dd", "validation"), ("ee", "testing")):
            for take in range(2):
                path = f"{word}/{speaker}_nohash_{take}.wav"
                sound(root / path)
                if part:
                    lists[part].append(path)
    sound(root / "_background_noise_/running_tap.wav", samples=4000)
    for part, paths in lists.items():
        (root / f"{part}_list.txt").write_text("\n".join(paths) + "\n")
    return root


FSC_COLUMNS = ("", "path", "speakerId", "transcription", "action", "object", "location")
INTENTS = (
    ("increase", "heat", "none", "Turn up the heat, please"),
    ("activate", "lights", "kitchen", "Lights on, in the kitchen"),
    ("activate", "lights", "none", "Lights, on"),
)


def fluent(root: Path) -> Path:
    """Three intents, one speaker for each split; transcriptions with commas."""
    for part, speaker, each in (("train", "p1", 3), ("valid", "p2", 1), ("test", "p3", 2)):
        lines = []
        for action, thing, place, said in INTENTS:
            for _ in range(each):
                path = f"wavs/speakers/{speaker}/{len(lines)}.wav"
                sound(root / path)
                lines.append((len(lines), path, speaker, said, action, thing, place))
        write_table(root / f"data/{part}_data.csv", FSC_COLUMNS, lines)
    return root


def iemocap(root: Path) -> Path:
    """One dialogue for each session: every used label and one unused, by both speakers, and leftovers of a Mac."""
    for session in range(1, 6):
        dialog = f"Ses{session:02d}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for speaker in "FM":
            for number, label in enumerate(("neu", "hap", "exc", "sad", "ang", "fru")):
                utterance = f"{dialog}_{speaker}{number:03d}"
                lines += [
                    f"[{number}.0000 - {number}.5000]\t{utterance}\t{label}\t[2.5, 2.5, 2.5]",
                    "C-E1:\tNeutral;\t()",
                ]
                sound(root / f"Session{session}/sentences/wav/{dialog}/{utterance}.wav")
        folder = root / f"Session{session}/dialog/EmoEvaluation"
        folder.mkdir(parents=True)
        (folder / f"{dialog}.txt").write_text("\n".join(lines))
        (folder / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")
        (folder / "Categorical").mkdir()
        (folder / f"Categorical/{dialog}_e1.txt").write_text("[0 - 1]\tnot\ta label")
        (root / f"Session{session}/sentences/wav/{dialog}/._{dialog}_F000.wav").write_bytes(b"\x00")
    return root
