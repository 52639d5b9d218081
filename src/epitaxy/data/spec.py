"""What a user says about the data, and what every reader hands on: rows that know where their content lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.image.spec import ImageSpec

Modality = Literal["vision", "audio", "text"]
AudioSet = Literal["esc50", "urbansound8k", "speech_commands", "fluent_speech_commands", "iemocap"]
ImageSet = Literal["vtab", "fgvc", "fgvc_union", "cifar100", "aircraft", "food101"]
Kind = Literal["auto", "image_folder", "audio_folder", "csv", "hub", AudioSet, ImageSet]
PUBLISHED_SETS = (*get_args(AudioSet), *get_args(ImageSet))
SELECT, FINAL = (
    "select",
    "final",
)  # protocols of picture sets: part of the training data validates, or all of them train
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "on_bad": ("error", "skip"),
    "shots_lacking": ("error", "all"),
}
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class DataSpec:
    """Where the data are and how they become three splits.

    ``source`` is a folder, a zip of one, a CSV, TSV or JSONL table, the name of a data set on the hub, or
    ``builtin:NAME``.  ``validation`` and ``test`` name a split, or give a fraction of the training data, or are left
    to be found by the usual names; what is not found is cut from the training data, class by class (10 % and 20 %).
    ``on_bad`` says what happens to unreadable files and unlabelled rows; ``check=False`` leaves unreadable files to
    be met during training.  ``limit_per_class`` keeps so many training examples of each class,
    ``limit_evaluation_per_class`` so many for validation and test.

    The kinds ``esc50``, ``urbansound8k``, ``speech_commands``, ``fluent_speech_commands`` and ``iemocap`` read those
    data sets in their official layout: ``fold`` is the fold that is tested, ``protocol`` how the others are used, and
    ``verify=False`` accepts a copy whose counts are not the official ones.  The kinds ``vtab``, ``fgvc``,
    ``fgvc_union``, ``cifar100``, ``aircraft`` and ``food101`` do so for pictures; ``task`` names one of the sets that
    VTAB-1k and FGVC hold, and ``protocol`` is "select" or "final".

    ``shots`` is the few-shot protocol: so many training examples of every class, the first of the source, or drawn by
    ``shots_seed``; ``shots_lacking="all"`` goes on where a class has fewer.  ``fraction`` keeps that share of the
    training examples of every class, drawn by ``seed``.

    The columns are those of tables and hub data sets; ``sampling_rate`` in Hz (default: as stored); ``subset`` and
    ``revision`` choose within the hub.  ``audio`` and ``image`` say how sounds and pictures become a model's input;
    without ``image`` the model's own processor prepares pictures.
    """

    source: str
    kind: Kind = "auto"
    fold: int | None = None
    protocol: str | None = None
    task: str | None = None
    verify: bool = True
    train: str = "train"
    validation: str | float | None = None
    test: str | float | None = None
    seed: int = 0
    on_bad: Literal["error", "skip"] = "error"
    check: bool = True
    limit_per_class: int | None = None
    limit_evaluation_per_class: int | None = None
    fraction: float | None = None
    shots: int | None = None
    shots_seed: int | None = None
    shots_lacking: Literal["error", "all"] = "error"
    text_column: str | None = None
    label_column: str | None = None
    file_column: str | None = None
    split_column: str | None = None
    sampling_rate: int | None = None
    subset: str | None = None
    revision: str | None = None
    audio: AudioSpec | None = None
    image: ImageSpec | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not 0.0 < value < 1.0:
                raise EpitaxyError(f"data.{name} is the name of a split or a fraction between 0 and 1, got {value!r}")
        for name in ("limit_per_class", "limit_evaluation_per_class", "shots", "fold", "sampling_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EpitaxyError(f"data.{name} must be at least 1, got {value!r}")
        for name in ("seed", "shots_seed"):
            if (getattr(self, name) or 0) < 0:
                raise EpitaxyError(f"data.{name} must not be negative, got {getattr(self, name)}")
        if self.fraction is not None and not 0.0 < self.fraction < 1.0:
            raise EpitaxyError(f"data.fraction lies between 0 and 1, got {self.fraction!r}")
        bounds = [name for name in ("shots", "limit_per_class", "fraction") if getattr(self, name) is not None]
        if len(bounds) > 1:
            raise EpitaxyError(
                f"data.{bounds[0]} and data.{bounds[1]} both bound the training examples; give one of them"
            )
        holders = {"fold": get_args(AudioSet), "protocol": PUBLISHED_SETS, "task": ("vtab", "fgvc")}
        for name, kinds in holders.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise EpitaxyError(
                    f"data.{name} chooses within a published data set: set data.kind to one of "
                    f"{', '.join(kinds)}, got {self.kind!r}"
                )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise EpitaxyError(f"data.{name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.kind in ("audio_folder", *get_args(AudioSet)) and self.audio is None:
            object.__setattr__(self, "audio", AudioSpec())  # written out, so that the recipe of a run shows it


class Stored(Protocol):
    """Content that is read when it is needed."""

    def read(self) -> bytes: ...


@dataclass(slots=True)
class Row:
    """One example before decoding: its content (text is held as it is), class and split as the source calls them."""

    content: Stored | str
    label: str | None
    split: str | None
    name: str


@dataclass
class Pool:
    """Everything one source holds.

    ``declared`` are the classes the source lists itself, in its order; ``empty`` the class folders without a file;
    ``missing`` (name, reason) of files that the source names and does not hold, and of lines to be left out.  With
    ``settled`` the splits and the classes are exactly those of the rows and of ``declared``: no validation data are
    cut where there are none, and classes stay that a small training split lacks.  ``thinned``: the source itself gave
    the rows of ``data.fraction``.  ``groups`` names for each class the set it came from, where several were joined.
    """

    rows: list[Row]
    modality: Modality
    kind: str
    declared: tuple[str, ...] = ()
    empty: list[tuple[str | None, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    settled: bool = False
    thinned: bool = False
    groups: dict[str, str] = field(default_factory=dict)


def natural_order(labels: set[str]) -> tuple[str, ...]:
    """Classes in order: by value when all are whole numbers, else by name."""
    numeric = all(label.lstrip("-").isdigit() for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numeric else (0, label)))
