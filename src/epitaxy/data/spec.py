"""What a user says about the data, and what every reader hands on: rows that know where their content lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.audio.spec import AudioSpec

Modality = Literal["vision", "audio", "text"]
Kind = Literal["auto", "image_folder", "audio_folder", "csv", "hub"]
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
    ``limit_evaluation_per_class`` so many for validation and test.  The columns are those of tables and hub data
    sets; ``sampling_rate`` in Hz (default: as stored); ``subset`` and ``revision`` choose within the hub.  ``audio``
    says how sounds become a model's input.
    """

    source: str
    kind: Kind = "auto"
    train: str = "train"
    validation: str | float | None = None
    test: str | float | None = None
    seed: int = 0
    on_bad: Literal["error", "skip"] = "error"
    check: bool = True
    limit_per_class: int | None = None
    limit_evaluation_per_class: int | None = None
    text_column: str | None = None
    label_column: str | None = None
    file_column: str | None = None
    split_column: str | None = None
    sampling_rate: int | None = None
    subset: str | None = None
    revision: str | None = None
    audio: AudioSpec | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not 0.0 < value < 1.0:
                raise EpitaxyError(f"data.{name} is the name of a split or a fraction between 0 and 1, got {value!r}")
        for name in ("limit_per_class", "limit_evaluation_per_class", "sampling_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EpitaxyError(f"data.{name} must be at least 1, got {value!r}")
        if self.seed < 0:
            raise EpitaxyError(f"data.seed must not be negative, got {self.seed}")
        for name, known in (("kind", get_args(Kind)), ("on_bad", ("error", "skip"))):
            if getattr(self, name) not in known:
                raise EpitaxyError(f"data.{name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.kind == "audio_folder" and self.audio is None:
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

    ``declared`` are the classes the source lists itself, in its order; ``empty`` the class folders without a file.
    """

    rows: list[Row]
    modality: Modality
    kind: str
    declared: tuple[str, ...] = ()
    empty: list[tuple[str | None, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def natural_order(labels: set[str]) -> tuple[str, ...]:
    """Classes in order: by value when all are whole numbers, else by name."""
    numeric = all(label.lstrip("-").isdigit() for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numeric else (0, label)))
