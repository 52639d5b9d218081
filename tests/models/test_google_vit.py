"""Google's numpy checkpoints: read into a ViT, equal to a literal numpy form of the published network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import epitaxy
from epitaxy import Bottleneck, Head
from epitaxy.core.errors import FormatError
from epitaxy.models.google_vit import read_google
from epitaxy.models.opening import InputSize, open_classifier
from tests.models.vision import pictures

Arrays = dict[str, "np.ndarray[Any, Any]"]
WIDTH, HEADS, HIDDEN, BLOCKS, PATCH, SIDE = 24, 3, 40, 2, 8, 4
LABELS = ["ant", "bee", "cow"]


def checkpoint(classes: int = 5, pre_logits: bool = False) -> Arrays:
    """A network of the published names and shapes, drawn at random."""
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> Any:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    found = {
        "cls": draw(1, 1, WIDTH),
        "embedding/kernel": 0.1 * draw(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": draw(WIDTH),
        "Transformer/posembed_input/pos_embedding": draw(1, SIDE * SIDE + 1, WIDTH),
        "Transformer/encoder_norm/scale": 1 + draw(WIDTH),
        "Transformer/encoder_norm/bias": draw(WIDTH),
        "head/kernel": draw(WIDTH, classes),
        "head/bias": draw(classes),
    }
    if pre_logits:
        found |= {"pre_logits/kernel": draw(WIDTH, WIDTH), "pre_logits/bias": draw(WIDTH)}
    for number in range(BLOCKS):
        block = f"Transformer/encoderblock_{number}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            found |= {f"{block}/{norm}/scale": 1 + draw(WIDTH), f"{block}/{norm}/bias": draw(WIDTH)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            found |= {
                f"{attention}/{name}/kernel": draw(WIDTH, HEADS, WIDTH // HEADS),
                f"{attention}/{name}/bias": draw(HEADS, WIDTH // HEADS),
            }
        found |= {
            f"{attention}/out/kernel": draw(HEADS, WIDTH // HEADS, WIDTH),
            f"{attention}/out/bias": draw(WIDTH),
            f"{block}/MlpBlock_3/Dense_0/kernel": draw(WIDTH, HIDDEN),
            f"{block}/MlpBlock_3/Dense_0/bias": draw(HIDDEN),
            f"{block}/MlpBlock_3/Dense_1/kernel": draw(HIDDEN, WIDTH),
            f"{block}/MlpBlock_3/Dense_1/bias": draw(WIDTH),
        }
    return found


def literal(arrays: Arrays, pixels: Any) -> Any:
    """The class token's features of the published network, with einsum over the arrays as they are stored."""

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    tiles = sliding_window_view(pixels, (PATCH, PATCH), axis=(1, 2))[:, ::PATCH, ::PATCH]  # b row column channel h w
    x = np.einsum("byxchw,hwcd->byxd", tiles, arrays["embedding/kernel"]) + arrays["embedding/bias"]
    x = x.reshape(len(pixels), -1, WIDTH)
    x = np.concatenate([np.repeat(arrays["cls"], len(pixels), 0), x], 1)
    x = x + arrays["Transformer/posembed_input/pos_embedding"]
    for number in range(BLOCKS):
        block = f"Transformer/encoderblock_{number}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(x, f"{block}/LayerNorm_0")
        query, key, value = (
            np.einsum("btd,dhk->bhtk", y, arrays[f"{attention}/{name}/kernel"])
            + arrays[f"{attention}/{name}/bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bhqk,bhtk->bhqt", query, key) / np.sqrt(WIDTH // HEADS))
        mixed = np.einsum("bhqt,bhtk->bqhk", scores / scores.sum(-1, keepdims=True), value)
        x = x + np.einsum("bqhk,hkd->bqd", mixed, arrays[f"{attention}/out/kernel"]) + arrays[f"{attention}/out/bias"]
        dense = f"{block}/MlpBlock_3/Dense"
        y = norm(x, f"{block}/LayerNorm_2") @ arrays[f"{dense}_0/kernel"] + arrays[f"{dense}_0/bias"]
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = x + y @ arrays[f"{dense}_1/kernel"] + arrays[f"{dense}_1/bias"]
    return norm(x, "Transformer/encoder_norm")[:, 0]


def write(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_logits_are_those_of_the_published_network(tmp_path: Path) -> None:
    arrays = checkpoint()
    opened = open_classifier(str(write(tmp_path / "ViT.npz", arrays)), ["a", "b", "c", "d", "e"])
    assert opened.head == "kept"
    pixels = pictures()
    double = {name: value.astype(np.float64) for name, value in arrays.items()}
    features = literal(double, pixels.permute(0, 2, 3, 1).double().numpy())
    expected = features @ double["head/kernel"] + double["head/bias"]
    with torch.no_grad():
        logits = opened.model.double()(pixel_values=pixels.double()).logits
    assert np.abs(logits.numpy() - expected).max() < 1e-9
    assert np.abs(expected).max() > 0.5
    config = opened.model.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (WIDTH, HEADS, HIDDEN)
    assert (config.patch_size, config.image_size, config.num_hidden_layers) == (PATCH, SIDE * PATCH, BLOCKS)
    assert tuple(opened.processor.image_mean) == tuple(opened.processor.image_std) == (0.5, 0.5, 0.5)
    assert not opened.model.training


@pytest.mark.parametrize("pre_logits", [False, True])
def test_other_labels_and_heads_that_read_a_further_layer_get_a_fresh_head(pre_logits: bool, tmp_path: Path) -> None:
    file = write(tmp_path / "ViT.npz", checkpoint(classes=3 if pre_logits else 21843, pre_logits=pre_logits))
    torch.manual_seed(5)
    opened = open_classifier(str(file), LABELS)
    assert opened.head == "fresh"
    assert opened.model.classifier.out_features == 3
    torch.manual_seed(5)
    again = open_classifier(str(file), LABELS)
    assert torch.equal(again.model.classifier.weight, opened.model.classifier.weight)
    torch.manual_seed(5)
    expected = torch.nn.init.normal_(torch.empty(3, WIDTH), std=0.02)  # its random start moves no other draw
    assert torch.equal(opened.model.classifier.weight, expected)


def test_it_takes_adapters_sizes_and_types(tmp_path: Path) -> None:
    file = write(tmp_path / "ViT.npz", checkpoint())
    opened = open_classifier(str(file), LABELS, "bfloat16", InputSize(pixels=48))
    assert opened.model.config.image_size == 48
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.bfloat16}
    epitaxy.attach(opened.model, Bottleneck(bottleneck=2) + Head(), name="a")
    opened.model(pixel_values=pictures(48).bfloat16()).logits.sum().backward()
    epitaxy.save(opened.model, tmp_path / "a")
    assert epitaxy.inspect(tmp_path / "a").base["source"] == "ViT.npz"
    again = open_classifier(str(file), LABELS, "bfloat16", InputSize(pixels=48))
    epitaxy.load(again.model, tmp_path / "a")


def test_what_is_no_such_checkpoint(tmp_path: Path) -> None:
    arrays = checkpoint()

    def refused(says: str, **changes: Any) -> None:
        changed = {**arrays, **{name.replace("__", "/"): value for name, value in changes.items()}}
        write(tmp_path / "x.npz", {name: value for name, value in changed.items() if value is not None})
        with pytest.raises(FormatError, match=rf"^\S+x.npz: {says}") as caught:
            open_classifier(str(tmp_path / "x.npz"), LABELS)
        assert "\n" not in str(caught.value)

    key = "Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel"
    refused(f"'{key}' is missing", **{key: None})
    refused(
        rf"expected '{key}' to hold 40 x 24 numbers, found float32 of shape \(2, 2\)", **{key: np.ones((2, 2), "f")}
    )
    refused(
        "1 of its arrays have no place in a vision transformer, the first is 'conv_root/kernel'", conv_root__kernel=1.0
    )
    refused("not a checkpoint of Google's vision transformer, 'embedding/kernel' is missing", embedding__kernel=None)
    refused("expected square pictures", **{"Transformer/posembed_input/pos_embedding": np.ones((1, 13, WIDTH), "f")})
    refused("expected 4 axes of 'embedding/kernel'", embedding__kernel=np.ones((3, WIDTH), "f"))
    refused("not a readable archive of numpy arrays", cls=np.array([{"pickled": 1}], object))
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match=r"x.npz: not a readable archive of numpy arrays"):
        read_google(tmp_path / "x.npz")
    whole = write(tmp_path / "y.npz", arrays).read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"x.npz: not a readable archive of numpy arrays"):
        read_google(tmp_path / "x.npz")
    with pytest.raises(FormatError, match=r"gone.npz: no such file"):
        open_classifier(str(tmp_path / "gone.npz"), LABELS)
