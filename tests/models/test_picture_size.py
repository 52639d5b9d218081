"""Other picture sizes: the table interpolated at opening gives what the model's own switch gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from epitaxy.core.errors import EpitaxyError
from epitaxy.models.opening import InputSize, open_classifier
from epitaxy.models.picture_size import interpolate_table, resize_pictures
from tests.models.vision import build, pictures, save

LABELS = ["ant", "bee", "cow"]


@pytest.mark.parametrize("kind", ["vit", "deit", "clip classifier", "clip tower", "siglip"])
@pytest.mark.parametrize("pixels", [16, 64, 72])
def test_as_with_the_switch_of_the_model(kind: str, pixels: int, tmp_path: Path) -> None:
    path = str(save(build(kind), tmp_path / "m"))
    torch.manual_seed(0)
    own = open_classifier(path, LABELS)
    torch.manual_seed(0)
    sized = open_classifier(path, LABELS, size=InputSize(pixels=pixels))
    with torch.no_grad():
        expected = own.model(pixel_values=pictures(pixels), interpolate_pos_encoding=True).logits
        found = sized.model(pixel_values=pictures(pixels)).logits
    assert torch.allclose(found, expected, atol=1e-6)
    config = sized.model.config
    assert getattr(config, "vision_config", config).image_size == pixels
    assert dict(sized.processor.size) == {"height": pixels, "width": pixels}
    shape = sized.processor(images=[Image.new("RGB", (50, 40))], return_tensors="pt").pixel_values.shape
    assert shape == (1, 3, pixels, pixels)
    sized.model.save_pretrained(tmp_path / "again")
    sized.processor.save_pretrained(tmp_path / "again")
    again = open_classifier(str(tmp_path / "again"), LABELS)
    assert torch.equal(again.model(pixel_values=pictures(pixels)).logits, found)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 registers", "beit", "beit trunk", "swin trunk", "swin v2 trunk"])
def test_models_that_read_other_sizes_as_they_are(kind: str, tmp_path: Path) -> None:
    path = str(save(build(kind), tmp_path / "m"))
    torch.manual_seed(0)
    own = open_classifier(path, LABELS)
    torch.manual_seed(0)
    sized = open_classifier(path, LABELS, size=InputSize(pixels=64))
    for (name, one), (_, other) in zip(own.model.named_parameters(), sized.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with torch.no_grad():
        assert torch.equal(own.model(pixel_values=pictures(64)).logits, sized.model(pixel_values=pictures(64)).logits)
    assert dict(sized.processor.size) == {"height": 64, "width": 64}


def test_the_own_size_changes_nothing() -> None:
    model: Any = build("vit")
    before = model.vit.embeddings
    resize_pictures(model, 32, "vit")
    assert model.vit.embeddings is before
    table = before.position_embeddings
    assert interpolate_table(table, 1, 4) is table


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(4, 7), (8, 16), (8, 5)])
def test_the_table_is_resampled_by_the_cubic_kernel(old: int, new: int) -> None:
    matrix = torch.zeros(new, old)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for near in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(near, 0), old - 1)] += cubic(centre - near)
    torch.manual_seed(0)
    table = torch.randn(1, 2 + old * old, 3)
    found = interpolate_table(table, 2, new)
    assert torch.equal(found[:, :2], table[:, :2])
    expected = torch.einsum("yh,xw,hwd->yxd", matrix, matrix, table[0, 2:].view(old, old, 3))
    assert torch.allclose(found[0, 2:].view(new, new, 3), expected, atol=1e-5)


def test_tables_of_no_square_grid_are_refused() -> None:
    with pytest.raises(EpitaxyError, match="a position table of 13 rows is not that of a square grid"):
        interpolate_table(torch.zeros(1, 13, 3), 1, 4)


def test_frozen_half_precision_and_modes_are_kept() -> None:
    model: Any = build("vit").to(torch.bfloat16).requires_grad_(False)
    state = torch.random.get_rng_state()
    resize_pictures(model, 64, "vit")
    assert torch.equal(torch.random.get_rng_state(), state)
    table = model.vit.embeddings.position_embeddings
    assert table.dtype == torch.bfloat16
    assert table.shape == (1, 65, 32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.vit.embeddings.training


def test_a_cropped_margin_keeps_its_share(tmp_path: Path) -> None:
    import transformers

    path = save(build("dinov2"), tmp_path / "m")
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, do_center_crop=True
    ).save_pretrained(path)
    opened = open_classifier(str(path), LABELS, size=InputSize(pixels=448))
    assert dict(opened.processor.size)["shortest_edge"] == 512
    assert dict(opened.processor.crop_size) == {"height": 448, "width": 448}


@pytest.mark.parametrize(
    ("kind", "pixels", "says"),
    [
        ("vit", 60, r"m: the side of its pictures is a multiple of its patches of 8 pixels, up to 4096, got 60"),
        ("vit", 8192, r"m: the side of its pictures is a multiple of its patches of 8 pixels, up to 4096, got 8192"),
        (
            "swin",
            16,
            r"m: the last stage of swin has windows of 4 x 4 patches, so its pictures have at least 32 pixels",
        ),
    ],
)
def test_sizes_that_cannot_be(kind: str, pixels: int, says: str, tmp_path: Path) -> None:
    path = save(build(kind), tmp_path / "m")
    with pytest.raises(EpitaxyError, match=says):
        open_classifier(str(path), LABELS, size=InputSize(pixels=pixels))


def test_pixels_are_for_pictures() -> None:
    with pytest.raises(EpitaxyError, match="reference-ast: a size in pixels is for models of pictures"):
        open_classifier("reference-ast", LABELS, size=InputSize(pixels=64))


def test_convolutional_networks_read_every_size(tmp_path: Path) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    path = save(transformers.ResNetForImageClassification(config), tmp_path / "m")
    opened = open_classifier(str(path), LABELS, size=InputSize(pixels=50))
    assert dict(opened.processor.size) == {"height": 50, "width": 50}
    assert opened.model(pixel_values=pictures(50)).logits.shape == (2, 3)
