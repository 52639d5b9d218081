"""How pictures become input: sizes, crops, mirrors, normalisation against literal forms; and nothing is shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.image.front_end import Pixels, build
from epitaxy.data.image.spec import ImageSpec


@dataclass(frozen=True)
class Shown:
    value: Image.Image
    name: str = "a picture"


def noise(width: int = 40, height: int = 28, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processor() -> Any:
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1])


def pixels(**settings: Any) -> Pixels:
    return build(ImageSpec(**settings), processor())


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("model", (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ([[0.1, 0.2, 0.3], [1, 2, 4]], (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)),
    ],
)
def test_exact_size_and_normalisation(normalisation: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    made = pixels(normalisation=normalisation)
    found = made.inputs([Shown(noise())])["pixel_values"]
    small = np.asarray(noise().resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    for channel in range(3):
        expected = (small[:, :, channel] - mean[channel]) / std[channel]
        assert np.allclose(found[0, channel].numpy(), expected, atol=1e-5)
    assert found.dtype == torch.float32
    assert made.spec.normalisation == (mean, std)


def test_the_ranges_the_names_promise() -> None:
    white, black = (Shown(Image.new("RGB", (8, 8), shade)) for shade in ((255,) * 3, (0,) * 3))
    for name, ends in (("none", (0.0, 1.0)), ("half", (-1.0, 1.0))):
        found = pixels(normalisation=name).inputs([black, white])["pixel_values"]
        assert (found[0].unique().tolist(), found[1].unique().tolist()) == ([ends[0]], [ends[1]])


def test_fetching_again_gives_the_same_and_changes_nothing() -> None:
    """Normalising a cached array in place, as published loaders do, would grow at every fetch."""
    made = pixels(normalisation="imagenet", size=28, resize="exact")
    image = noise(28, 28)  # of the right size already: what is resized would be a copy anyway
    before = image.tobytes()
    first = made.inputs([Shown(image)])["pixel_values"].clone()
    for _ in range(4):
        again = made.inputs([Shown(image)])["pixel_values"]
        assert torch.equal(again, first)
        again.mul_(100)  # what is done to a batch does not reach the picture either
    assert image.tobytes() == before
    assert first.abs().max() < 3


@pytest.mark.parametrize(("size", "side"), [(224, 256), (384, 438), (448, 512)])
def test_the_shorter_side_before_a_crop(size: int, side: int) -> None:
    assert ImageSpec(size=size, resize="short_side").shorter_side(size) == side
    assert ImageSpec(size=size, resize="short_side", side=600).shorter_side(size) == 600


@pytest.mark.parametrize("shape", [(40, 28), (28, 40), (30, 30), (33, 90)])
def test_short_side_and_center(shape: tuple[int, int]) -> None:
    made = pixels(size=14, resize="short_side", normalisation="none")  # shorter side 16
    found = made.inputs([Shown(noise(*shape))])["pixel_values"][0].numpy()
    width, height = shape
    short = (16, int(16 * height / width)) if width <= height else (int(16 * width / height), 16)
    resized = np.asarray(noise(*shape).resize(short, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    left, top = round((short[0] - 14) / 2), round((short[1] - 14) / 2)
    assert np.allclose(found.transpose(1, 2, 0), resized[top : top + 14, left : left + 14])


def test_a_draw_alone_decides_crop_and_mirror() -> None:
    made = pixels(size=14, resize="short_side", crop="random", flip=True, normalisation="none")
    image = Shown(noise(48, 24))
    draws = [(7, epoch, 3) for epoch in range(60)]
    np.random.seed(0)
    torch.manual_seed(0)
    together = made.inputs([image] * 60, draws)["pixel_values"]
    np.random.seed(1)
    for number in (0, 11, 59):  # neither the batch nor a global generator matters
        assert torch.equal(made.inputs([image], [draws[number]])["pixel_values"][0], together[number])
    resized = np.asarray(noise(48, 24).resize((32, 16), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    crops = {
        (flipped, left, top): crop[:, ::-1] if flipped else crop
        for left in range(19)
        for top in range(3)
        for crop in [resized[top : top + 14, left : left + 14]]
        for flipped in (False, True)
    }
    seen = []
    for one in together.numpy().transpose(0, 2, 3, 1):
        (place,) = [key for key, crop in crops.items() if np.array_equal(one, crop)]
        seen.append(place)
    flips = [place[0] for place in seen]
    assert 15 < sum(flips) < 45
    assert {place[2] for place in seen} == {0, 1, 2}
    assert {place[1] for place in seen} >= {0, 18} or len({place[1] for place in seen}) > 12
    plain = made.inputs([image])["pixel_values"][0].numpy().transpose(1, 2, 0)
    assert np.array_equal(plain, crops[False, 9, 1])  # evaluation knows no chance


def test_interpolation() -> None:
    found = pixels(interpolation="nearest", normalisation="none").inputs([Shown(noise())])["pixel_values"][0]
    expected = np.asarray(noise().resize((16, 16), Image.Resampling.NEAREST), dtype=np.float32) / 255
    assert np.allclose(found.numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize("resize", ["exact", "short_side"])
def test_the_processor_that_is_saved_does_the_same(resize: Any) -> None:
    made = pixels(size=12, resize=resize, normalisation="imagenet", interpolation="bicubic")
    own = processor()
    saved = made.processor_like(own)
    assert list(own.image_mean) == [0.4, 0.5, 0.6]
    found = saved(images=[noise()], return_tensors="pt")["pixel_values"]
    expected = made.inputs([Shown(noise())])["pixel_values"]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 0}, r"data.image.size must be at least 1, got 0"),
        (
            {"resize": "shortside"},
            r"data.image.resize is one of exact, short_side, got 'shortside'; did you mean 'short_side'",
        ),
        (
            {"normalisation": "imagnet"},
            r"normalisation is one of model, imagenet, half, none or .*; did you mean 'imagenet'",
        ),
        ({"normalisation": [[0.5, 0.5], [0.5, 0.5]]}, r"normalisation is a name or \[mean, std\], three numbers each"),
        ({"normalisation": [[0, 0, 0], [1, 0, 1]]}, r"three numbers each with std above 0"),
        ({"crop": "random"}, r"data.image.crop: resize: exact crops nothing"),
        ({"side": 256}, r"data.image.side: resize: exact crops nothing"),
        ({"size": 224, "side": 200, "resize": "short_side"}, r"a crop of 224 pixels does not fit into 200"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EpitaxyError, match=said):
        ImageSpec(**settings)


def test_stored_settings_come_back() -> None:
    made = pixels(resize="short_side", crop="random", flip=True)
    stored = made.spec.stored()
    assert (stored["reads"], stored["size"], stored["side"]) == ("pictures", 16, 18)
    assert "flip" not in stored
    again = build(ImageSpec.from_stored(stored, "x"), object())  # nothing is left to ask a processor for
    assert torch.equal(again.inputs([Shown(noise())])["pixel_values"], made.inputs([Shown(noise())])["pixel_values"])
    with pytest.raises(EpitaxyError, match=r"x: its front end has the unknown setting 'sise'; did you mean 'size'"):
        ImageSpec.from_stored({**stored, "sise": 3}, "x")
