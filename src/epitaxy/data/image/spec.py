"""What a user says about how pictures become a model's input: the section ``data.image`` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from epitaxy.core.errors import EpitaxyError, meant, nearest

Resize = Literal["exact", "short_side"]
Crop = Literal["center", "random"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Three = tuple[float, float, float]
Normalisation = str | tuple[Three, Three]

NORMALISATIONS: dict[str, tuple[Three, Three]] = {  # mean and standard deviation of red, green and blue in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
READS = "pictures"  # what stored settings say, to tell them from those of sounds


@dataclass(frozen=True)
class ImageSpec:
    """How pictures become input.

    ``size`` is the side of the input in pixels (default: the model's own).  ``resize: exact`` makes every picture
    ``size`` by ``size``, whatever its shape, and crops nothing (VTAB-1k); ``short_side`` makes its shorter side
    ``side`` pixels and crops ``size`` by ``size``.  ``side`` is by default 8/7 of ``size``: 224 of 256, 384 of 438, 448
    of 512 (FGVC).  In training the crop is that of the center or, with ``crop: random``, at a random place, and
    ``flip`` mirrors every second picture; evaluation always takes the center and never mirrors.

    Values are scaled to [0, 1], then the mean is subtracted and the result divided by the standard deviation:
    ``normalisation`` is "model" (what the model's own processor has), "imagenet", "half" (to [-1, 1], as the original
    ViT checkpoints were trained), "none" (left in [0, 1]), or [mean, std] with three numbers each.  Papers on the same
    benchmark differ in it and it changes the scores, so every result names it.
    """

    size: int | None = None
    resize: Resize = "exact"
    side: int | None = None
    crop: Crop = "center"
    flip: bool = False
    normalisation: Normalisation = "model"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("size", "side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EpitaxyError(f"data.image.{name} must be at least 1, got {value!r}")
        if not isinstance(self.normalisation, str):
            object.__setattr__(self, "normalisation", _pair(self.normalisation))
        choices: dict[str, tuple[str, ...]] = {
            "resize": get_args(Resize),
            "crop": get_args(Crop),
            "interpolation": get_args(Interpolation),
        }
        if isinstance(self.normalisation, str):
            choices["normalisation"] = ("model", *NORMALISATIONS)
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise EpitaxyError(
                    f"data.image.{name} is one of {', '.join(known)}{' or [mean, std]' * (name == 'normalisation')}, "
                    f"got {value!r}{meant(str(value), known)}"
                )
        if self.resize == "exact":
            for name, plain in (("side", None), ("crop", "center")):
                if getattr(self, name) != plain:
                    raise EpitaxyError(
                        f"data.image.{name}: resize: exact crops nothing; set data.image.resize to short_side"
                    )
        if self.side is not None and self.size is not None and self.side < self.size:
            raise EpitaxyError(f"data.image.side: a crop of {self.size} pixels does not fit into {self.side}")

    def shorter_side(self, size: int) -> int:
        """Pixels of the shorter side before a crop of ``size``."""
        return self.side if self.side is not None else size * 8 // 7

    def stored(self) -> dict[str, Any]:
        """What an adapter keeps of it, as plain data: all that decides its input when it is used."""
        values = {"reads": READS, **asdict(self)}
        for name in ("crop", "flip"):  # which are for training alone
            del values[name]
        if not isinstance(self.normalisation, str):
            values["normalisation"] = [list(part) for part in self.normalisation]
        return values

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], origin: str) -> ImageSpec:
        """The settings that ``stored`` gave; raises ``EpitaxyError`` naming ``origin`` when they cannot be read."""
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in values.items() if key != "reads"}
        unknown = [key for key in given if key not in known]
        if unknown:
            raise EpitaxyError(
                f"{origin}: its front end has the unknown setting {unknown[0]!r}{nearest(unknown[0], known)}"
            )
        try:
            return cls(**given)
        except (EpitaxyError, TypeError, ValueError) as error:
            raise EpitaxyError(f"{origin}: its front end cannot be read ({error})") from None


def _pair(values: Any) -> tuple[Three, Three]:
    try:
        mean, std = (tuple(float(number) for number in part) for part in values)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not all(number > 0 for number in std):
        raise EpitaxyError(
            f"data.image.normalisation is a name or [mean, std], three numbers each with std above 0, got {values!r}"
        )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
