"""What a user says about how sounds become a model's input: the section ``data.audio`` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from epitaxy.core.errors import EpitaxyError, meant, nearest
from epitaxy.data.audio.waveform import Mono

Short = Literal["pad", "silence", "mean", "repeat"]
Long = Literal["cut", "center", "random", "windows"]
Positions = Literal["crop", "start", "interpolate"]
Statistics = str | tuple[float, float]

PUBLISHED: dict[str, tuple[float, float]] = {
    "audioset": (-4.2677393, 4.5689974),
    "esc50": (-6.6268, 5.3585),
    "speech_commands": (-6.8460, 5.5655),
}


@dataclass(frozen=True)
class Augment:
    """SpecAugment (1904.08779): one mask along frequency and one along time, each narrower than this.  0: none."""

    frequency: int = 0
    time: int = 0

    def __post_init__(self) -> None:
        for name in ("frequency", "time"):
            if getattr(self, name) < 0:
                raise EpitaxyError(f"data.audio.augment.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class AudioSpec:
    """How sounds become input.

    ``frames`` of 10 ms and ``mels`` bins: the size of the input (default: the model's own; other sizes adapt its
    position table by ``positions``).  ``statistics`` of the log-mel values: "model", "train" (computed over the
    training split), a published pair (audioset, esc50, speech_commands), or [mean, std].

    ``short`` clips are filled at the end: "pad" with the log-mel value 0, as published, which is louder than silence
    and +0.467 after normalisation with AudioSet's statistics; "silence" with the value of digital silence; "mean" with
    the mean; "repeat" with the clip itself.  ``long`` clips are cut at the end, to their center, at a random place
    (training; the center in evaluation), or in evaluation their class is the average over up to ``windows``
    windows spread evenly over the clip (training: a random place).

    ``mono`` averages the channels or takes the left one.  ``augment`` masks training examples only.  ``cache`` is a
    directory for features of at most ``cache_gigabytes``.  ``legacy="zeroed"`` runs with a position table of zeros when
    ``frames`` or ``mels`` differ from the model's, as the code released with 2312.03694 does.
    """

    frames: int | None = None
    mels: int | None = None
    statistics: Statistics = "model"
    short: Short = "pad"
    long: Long = "cut"
    windows: int = 4
    mono: Mono = "mean"
    subtract_clip_mean: bool = False
    augment: Augment = Augment()
    cache: str | None = None
    cache_gigabytes: float = 20.0
    positions: Positions = "crop"
    legacy: Literal["zeroed"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.statistics, (tuple, list)):
            object.__setattr__(self, "statistics", _pair(self.statistics))
        for name in ("frames", "mels", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EpitaxyError(f"data.audio.{name} must be at least 1, got {value!r}")
        if self.cache_gigabytes <= 0:
            raise EpitaxyError(f"data.audio.cache_gigabytes must be above 0, got {self.cache_gigabytes}")
        choices: dict[str, tuple[Any, ...]] = {
            "short": get_args(Short),
            "long": get_args(Long),
            "mono": get_args(Mono),
            "positions": get_args(Positions),
            "legacy": (None, "zeroed"),
        }
        if isinstance(self.statistics, str):
            choices["statistics"] = ("model", "train", *PUBLISHED)
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                words = [str(choice) for choice in known if choice is not None]
                raise EpitaxyError(
                    f"data.audio.{name} is one of {', '.join(words)}{' or [mean, std]' * (name == 'statistics')}, "
                    f"got {value!r}{meant(str(value), words)}"
                )

    def stored(self) -> dict[str, Any]:
        """What an adapter keeps of it, as plain data: all that decides its input when it is used."""
        values = asdict(self)
        for name in ("augment", "cache", "cache_gigabytes"):
            del values[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], origin: str) -> AudioSpec:
        """The settings that ``stored`` gave; raises ``EpitaxyError`` naming ``origin`` when they cannot be read."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise EpitaxyError(
                f"{origin}: its front end has the unknown setting {unknown[0]!r}{nearest(unknown[0], known)}"
            )
        try:
            return cls(**values)
        except (EpitaxyError, TypeError) as error:
            raise EpitaxyError(f"{origin}: its front end cannot be read ({error})") from None


def _pair(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 2 or not numbers[1] > 0:
        raise EpitaxyError(f"data.audio.statistics is a name or [mean, std] with std above 0, got {values!r}")
    return numbers[0], numbers[1]
