"""Paint one training picture: put an object on a random background, at a random place, size and angle."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance

Colour = tuple[int, int, int]


def random_colour(rng: Generator) -> Colour:
    """Any hue, from nearly white or grey to saturated."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.random() ** 1.5, 0.15 + 0.85 * rng.random())
    return int(255 * red), int(255 * green), int(255 * blue)


def random_crop(picture: Image.Image, size: int, rng: Generator, smallest: float = 0.2) -> Image.Image:
    """A square part of the picture, ``smallest`` to 1 of its shorter side, half of the time mirrored."""
    side = int(min(picture.size) * rng.uniform(smallest, 1.0))
    left = int(rng.integers(picture.width - side + 1))
    top = int(rng.integers(picture.height - side + 1))
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _gradient(size: int, rng: Generator) -> Image.Image:
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    ramp = np.clip(0.5 + rows * np.sin(angle) + columns * np.cos(angle), 0, 1)[..., None]
    first, second = (np.array(random_colour(rng), float) for _ in range(2))
    return Image.fromarray((first * ramp + second * (1 - ramp)).astype(np.uint8))


def _blotches(size: int, rng: Generator) -> Image.Image:
    cells = int(rng.integers(3, 12))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    noise = coarse.resize((size, size), Image.Resampling.BICUBIC)
    return Image.blend(Image.new("RGB", (size, size), random_colour(rng)), noise, float(rng.uniform(0.2, 0.8)))


def random_background(size: int, photos: list[Image.Image], rng: Generator) -> Image.Image:
    """A plain colour, a gradient, soft blotches or a part of a photograph."""
    kind = rng.random()
    if kind < 0.3:
        return Image.new("RGB", (size, size), random_colour(rng))
    if kind < 0.5:
        return _gradient(size, rng)
    if kind < 0.65:
        return _blotches(size, rng)
    return random_crop(photos[int(rng.integers(len(photos)))], size, rng)


def paste_object(background: Image.Image, cutout: Image.Image, rng: Generator) -> Image.Image:
    """The cut-out object on the background: 0.45 to 1.1 of its width, tilted by up to 30 degrees."""
    size = background.width
    side = int(size * rng.uniform(0.45, 1.1))
    cutout = cutout.resize((side, side), Image.Resampling.BILINEAR)
    cutout = cutout.rotate(float(rng.uniform(-30, 30)), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # The centre stays near the middle, so that at most an edge of the object is cut off.
    slack = max(size - side, 0) / 2 + 0.06 * size
    centre = size / 2 + rng.uniform(-slack, slack, 2)
    corner = int(centre[0] - cutout.width / 2), int(centre[1] - cutout.height / 2)
    scene = background.copy()
    scene.paste(cutout, corner, cutout)
    return scene


def garment_cutout(grey: np.ndarray, rng: Generator) -> Image.Image:
    """A Fashion-MNIST garment in a random colour; the black background becomes transparent."""
    # Enlarged before it is cut out, so that the outline is smooth.
    enlarged = Image.fromarray(grey).resize((112, 112), Image.Resampling.BICUBIC)
    value = np.asarray(enlarged).astype(np.float32)
    tint = np.array(random_colour(rng), np.float32) / 255
    tint = 0.35 + 0.65 * tint
    colour = (value[..., None] * tint).astype(np.uint8)
    opacity = np.clip(value * 12, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colour, opacity]), "RGBA")


def plain_garment(grey: np.ndarray, size: int) -> Image.Image:
    """The garment as it is in Fashion-MNIST: grey on black."""
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR).convert("RGB")


def vary_light(picture: Image.Image, rng: Generator) -> Image.Image:
    """Random brightness, contrast and saturation."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(float(rng.uniform(0.7, 1.3)))
    return picture
