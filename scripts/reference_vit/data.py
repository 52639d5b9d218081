"""The pretraining pool (painted once, with the teacher's features) and the batches drawn from it.

A batch depends only on the seed and the step number, so a run that is stopped and resumed sees the same pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from scripts.reference_vit.model import MEAN, STD
from scripts.reference_vit.pictures import (
    FASHION_CLASSES,
    HELD_OUT_FASHION,
    Bytes,
    Emoji,
    load_fashion,
    load_photos,
    seen_emoji,
)
from scripts.reference_vit.scenes import (
    garment_cutout,
    paste_object,
    plain_garment,
    random_background,
    random_crop,
    vary_light,
)
from scripts.reference_vit.teacher import load_teacher
from torch import Tensor

PAINTED = 128  # side of a painted picture, which is what the teacher looks at
STORED = 80  # side kept in the pool: a little more than the student needs, so that it can be cropped
TEACHER_DIMENSIONS = 256
EMOJI_VIEWS, FLAG_VIEWS, GARMENTS_PER_CLASS, CROPS_PER_PHOTO = 8, 1, 1000, 300
NO_LABEL = -1


@dataclass
class Pool:
    """All painted pictures with their labels (``NO_LABEL`` where there is none) and the teacher's view of them."""

    pictures: Tensor  # (n, 3, STORED, STORED) bytes
    group: Tensor  # index into label_names()
    identity: Tensor  # which emoji
    teacher: Tensor  # (n, TEACHER_DIMENSIONS), unit length


def label_names(emoji: list[Emoji]) -> list[str]:
    """The classes of the exported classifier: six garments and the groups of the emoji that are not held out."""
    garments = [f"garment: {name}" for name in FASHION_CLASSES if name not in HELD_OUT_FASHION]
    return sorted(garments) + sorted({f"emoji: {item.group}" for item in emoji})


def _paint(cache: Path, rng: Generator) -> Iterator[tuple[Image.Image, str | None, int]]:
    """Yield picture, class name and emoji number for the whole pool."""
    photos = load_photos(cache)
    for number, emoji in enumerate(seen_emoji(cache)):
        # A sixth of all emoji are national flags; one view each keeps them from filling the pool.
        views = FLAG_VIEWS if emoji.group == "country-flag" else EMOJI_VIEWS
        for style in ("fluent", "noto"):
            cutout = emoji.open(style)
            for _ in range(views):
                scene = paste_object(random_background(PAINTED, photos, rng), cutout, rng)
                yield vary_light(scene, rng), f"emoji: {emoji.group}", number
    garments, labels = load_fashion(cache, "train")
    for label, name in enumerate(FASHION_CLASSES):
        if name in HELD_OUT_FASHION:
            continue
        for index in rng.permutation(np.flatnonzero(labels == label))[:GARMENTS_PER_CLASS]:
            if rng.random() < 0.5:
                picture = plain_garment(garments[index], PAINTED)
            else:
                background = random_background(PAINTED, photos, rng)
                picture = paste_object(background, garment_cutout(garments[index], rng), rng)
            yield picture, f"garment: {name}", NO_LABEL
    for photo in photos:
        for _ in range(CROPS_PER_PHOTO):
            yield vary_light(random_crop(photo, PAINTED, rng), rng), None, NO_LABEL


def compress_features(features: Tensor) -> Tensor:
    """Keep the main directions of the teacher's features, flatten their spread a little, and scale to unit length."""
    centred = features - features.mean(0)
    spread, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    spread, directions = spread[-TEACHER_DIMENSIONS:], directions[:, -TEACHER_DIMENSIONS:]
    # Dividing by the square root of the standard deviation lets the finer distinctions count without amplifying noise.
    return F.normalize(centred @ directions / spread.clamp_min(1e-6) ** 0.25, dim=1)


@torch.inference_mode()
def build_pool(cache: Path, seed: int) -> Pool:
    """Paint every picture and show it to the teacher."""
    names = {name: index for index, name in enumerate(label_names(seen_emoji(cache)))}
    teacher = load_teacher(cache).to(memory_format=torch.channels_last)
    stored: list[Bytes] = []
    groups: list[int] = []
    identities: list[int] = []
    features: list[Tensor] = []
    waiting: list[Bytes] = []

    def show_to_teacher() -> None:
        batch = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            features.append(teacher(batch.contiguous(memory_format=torch.channels_last)).float())
        waiting.clear()

    for picture, name, identity in _paint(cache, np.random.default_rng(seed)):
        waiting.append(np.asarray(picture))
        stored.append(np.asarray(picture.resize((STORED, STORED), Image.Resampling.BILINEAR)))
        groups.append(NO_LABEL if name is None else names[name])
        identities.append(identity)
        if len(waiting) == 128:
            show_to_teacher()
    if waiting:
        show_to_teacher()
    return Pool(
        pictures=torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2).contiguous(),
        group=torch.tensor(groups),
        identity=torch.tensor(identities),
        teacher=compress_features(torch.cat(features)),
    )


def load_pool(cache: Path, seed: int) -> Pool:
    """The pool from the cache, or a newly built one."""
    path = cache / f"pool-{seed}.pt"
    if not path.exists():
        pool = build_pool(cache, seed)
        partial = path.with_suffix(".partial")
        torch.save({field.name: getattr(pool, field.name) for field in fields(pool)}, partial)
        os.replace(partial, path)
    return Pool(**torch.load(path, weights_only=True))


def augment(pictures: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Random crop, stretch, mirror and colour cast of a batch of bytes; the result is normalised for the model."""
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    zoom, stretch = uniform(0.7, 1.0), uniform(0.9, 1.1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = zoom * stretch * mirror, zoom / stretch
    matrix[:, :, 2] = uniform(-1, 1, 2) * (1 - zoom)[:, None]
    grid = F.affine_grid(matrix, [count, 3, size, size], align_corners=False)
    x = F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)
    x = x * uniform(0.75, 1.25, 1, 1, 1) * uniform(0.85, 1.15, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    grey = (uniform(0, 1, 1, 1, 1) < 0.1).float()
    x = grey * x.mean(1, keepdim=True) + (1 - grey) * x
    return (x.clamp(0, 1) - MEAN) / STD


def draw_batch(pool: Pool, step: int, seed: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Augmented pictures, groups, identities and teacher targets of one training step."""
    random = torch.Generator().manual_seed(1_000_003 * seed + step)
    rows = torch.randint(len(pool.group), (count,), generator=random)
    return augment(pool.pictures[rows], size, random), pool.group[rows], pool.identity[rows], pool.teacher[rows]
