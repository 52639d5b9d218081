"""From pictures to a model's input, ``pixel_values``: PIL resizes and crops, numpy normalises, nothing is shared.

The arithmetic of sizes is torchvision's (``Resize`` of the shorter side, ``CenterCrop``), so that a picture becomes
what the published loaders make of it; PIL's own resampling, which smooths when it shrinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.chance import Draw, chance
from epitaxy.data.image.spec import NORMALISATIONS, ImageSpec, Three

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Example(Protocol):
    """A picture in RGB and how messages call it."""

    @property
    def value(self) -> Any: ...
    @property
    def name(self) -> str: ...


class Pixels:
    """Pictures as ``size`` by ``size`` pixels, normalised; ``spec`` has every default resolved."""

    def __init__(self, spec: ImageSpec, size: int) -> None:
        assert not isinstance(spec.normalisation, str)
        self.spec, self.size = spec, size
        self.mean, self.std = (np.array(part, dtype=np.float32)[:, None, None] for part in spec.normalisation)

    def inputs(self, examples: Sequence[Example], draws: Sequence[Draw] | None = None) -> dict[str, Tensor]:
        """``pixel_values``, ``b 3 size size`` in float32.

        ``draws`` marks training: each decides the crop and the mirroring of its example, and nothing else does.  The
        pictures themselves are never changed.
        """
        sources = [None] * len(examples) if draws is None else [chance(draw) for draw in draws]
        pictures = [self._picture(example.value, source) for example, source in zip(examples, sources, strict=True)]
        return {"pixel_values": torch.from_numpy(np.stack([self._values(picture) for picture in pictures]))}

    def processor_like(self, processor: Any) -> Any:
        """A processor of the same kind that does at evaluation what is done here: to be saved with the model."""
        assert not isinstance(self.spec.normalisation, str)
        mean, std = self.spec.normalisation
        settings: dict[str, Any] = {"do_normalize": True, "image_mean": list(mean), "image_std": list(std)}
        settings |= {"do_resize": True, "do_rescale": True, "resample": int(RESAMPLING[self.spec.interpolation])}
        square = {"height": self.size, "width": self.size}
        if self.spec.resize == "exact":
            settings |= {"size": square, "do_center_crop": False}
        else:
            settings |= {"size": {"shortest_edge": self.spec.side}, "do_center_crop": True, "crop_size": square}
        return type(processor).from_dict({**processor.to_dict(), **settings})

    def _picture(self, image: Image.Image, source: np.random.Generator | None) -> Image.Image:
        spec, size = self.spec, self.size
        if spec.resize == "exact":
            made = self._resized(image, size, size)
        else:
            made = self._cropped(self._resized(image, *_by_short_side(image.size, spec.shorter_side(size))), source)
        if source is not None and spec.flip and source.random() < 0.5:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return made

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return (
            image
            if image.size == (width, height)
            else image.resize((width, height), RESAMPLING[self.spec.interpolation])
        )

    def _cropped(self, image: Image.Image, source: np.random.Generator | None) -> Image.Image:
        room = (image.width - self.size, image.height - self.size)
        if source is not None and self.spec.crop == "random":
            left, top = (int(source.integers(space + 1)) for space in room)
        else:
            left, top = (round(space / 2) for space in room)
        return image.crop((left, top, left + self.size, top + self.size))

    def _values(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """``3 h w``, a new array every time."""
        values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
        return np.ascontiguousarray((values - self.mean) / self.std)


def build(spec: ImageSpec, processor: Any) -> Pixels:
    """The front end for the model that ``processor`` belongs to.

    Raises ``EpitaxyError`` when neither ``spec`` nor the processor says the size or the normalisation.
    """
    size = spec.size or own_size(processor)
    normalisation = spec.normalisation
    if isinstance(normalisation, str):
        normalisation = own_normalisation(processor) if normalisation == "model" else NORMALISATIONS[normalisation]
    spec = replace(spec, size=size, normalisation=normalisation)
    if spec.resize == "short_side":
        spec = replace(spec, side=spec.shorter_side(size))
    return Pixels(spec, size)


def own_size(processor: Any) -> int:
    """The side of the square input that a processor makes."""
    wanted = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    sides = _sides(wanted if wanted is not None else getattr(processor, "size", None))
    if len(set(sides)) != 1:
        raise EpitaxyError(
            f"data.image.size: {type(processor).__name__} does not say the size of a square input; give it in pixels"
        )
    return sides[0]


def own_normalisation(processor: Any) -> tuple[Three, Three]:
    """Mean and standard deviation that a processor applies to values in [0, 1]."""
    if not getattr(processor, "do_normalize", False):
        return NORMALISATIONS["none"]
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise EpitaxyError(
            f"data.image.normalisation: {type(processor).__name__} does not say its own; name one of "
            f"{', '.join(NORMALISATIONS)}"
        )
    return tuple(map(float, mean)), tuple(map(float, std))  # type: ignore[return-value]


def _sides(size: Any) -> list[int]:
    if isinstance(size, int):
        return [size]
    if size is None:
        return []
    values = size.values() if isinstance(size, Mapping) else vars(size).values() if hasattr(size, "__dict__") else size
    return [int(value) for value in values if value is not None]


def _by_short_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
