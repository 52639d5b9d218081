"""Vision backbones of every family: their roles, and opening them as classifiers from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import epitaxy
from epitaxy import BitFit, Bottleneck, Head, LoRA, NormTuning, Prefix, Prompt
from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, FormatError, UnsupportedError
from epitaxy.core.kinds import is_norm
from epitaxy.models.opening import open_classifier
from tests.models.vision import BUILD, PROJECTIONS, ROLES, build, edit, pictures, save

LABELS = ["ant", "bee", "cow"]


@pytest.mark.parametrize("kind", BUILD)
def test_every_role_is_found(kind: str) -> None:
    model = build(kind)
    roles = describe(model).roles
    text = 2 if kind in ("clip", "siglip") else 0  # the text tower's blocks come first
    count = 3 if "swin" in kind else 2
    for role in (*ROLES, *PROJECTIONS):
        assert len(roles[role]) == count + text, role
    assert len(roles["patch"]) == 1
    assert isinstance(model.get_submodule(roles["patch"][0].path), nn.Conv2d)
    for spot in (*roles["norm.attention"], *roles["norm.mlp"], *roles.get("norm.final", ())):
        assert is_norm(model.get_submodule(spot.path))
    for block, up, down in zip(roles["block"], roles["mlp.up"], roles["mlp.down"], strict=True):
        assert up.path.startswith(block.path + ".")
        assert model.get_submodule(up.path).out_features == model.get_submodule(down.path).in_features


@pytest.mark.parametrize(
    ("kind", "final", "special", "distillation"),
    [
        ("vit", "vit.layernorm", 1, None),
        ("deit", "deit.layernorm", 2, 1),
        ("dinov2 registers", "layernorm", 5, None),
        ("swin", "swin.layernorm", 0, None),
        ("siglip tower", "post_layernorm", 0, None),
        ("clip tower", "encoder.layers.1", 1, None),  # its last norm sees the class token alone
        ("beit", "beit.layers.1", 1, None),  # the norm of its pooler sees a mean
    ],
)
def test_where_the_last_states_are(kind: str, final: str, special: int, distillation: int | None) -> None:
    model = build(kind)
    anatomy = describe(model)
    assert (anatomy.last, anatomy.special, anatomy.distillation) == (final, special, distillation)
    seen: list[torch.Tensor] = []
    model.get_submodule(final).register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(pixel_values=pictures(), output_hidden_states=True)
    if hasattr(output, "last_hidden_state"):
        assert torch.equal(seen[0], output.last_hidden_state)
    assert len(anatomy.roles.get("norm.final", ())) <= 1


@pytest.mark.parametrize("kind", BUILD)
def test_what_is_stored_is_opened_as_a_classifier(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    path = save(model, tmp_path / "m")
    opened = open_classifier(str(path), LABELS)
    assert opened.head == "fresh"
    assert opened.modality == "vision"
    assert opened.model.config.id2label == dict(enumerate(LABELS))
    head = describe(opened.model).roles["head"][0].path
    stored = model.state_dict()
    for key, value in opened.model.state_dict().items():
        if not key.startswith(head):
            ends = [name for name in stored if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")]
            assert any(torch.equal(value, stored[name]) for name in ends), key
    prepared = opened.processor(images=[Image.fromarray(np.zeros((40, 50, 3), np.uint8))], return_tensors="pt")
    assert opened.model(**prepared).logits.shape == (1, 3)


WITHOUT_HEAD = [
    kind
    for kind in BUILD
    if "trunk" in kind or kind in ("clip tower", "siglip tower", "dinov2 gated", "dinov2 registers")
]


@pytest.mark.parametrize("kind", WITHOUT_HEAD)
def test_features_are_those_of_the_trunk(kind: str, tmp_path: Path) -> None:
    """A head of known weights on what ``open_classifier`` gives equals the same head on the stored trunk's features."""
    trunk = build(kind)
    opened = open_classifier(str(save(trunk, tmp_path / "m")), LABELS)
    output = trunk(pixel_values=pictures())
    states = output.last_hidden_state
    if kind.startswith("swin"):
        features = states.mean(1)
    elif kind.startswith("dinov2"):
        skipped = 5 if "registers" in kind else 1
        features = torch.cat([states[:, 0], states[:, skipped:].mean(1)], 1)
    elif kind.startswith("beit"):
        features = output.pooler_output
    else:
        features = {"clip tower": lambda: states[:, 1:].mean(1), "siglip tower": lambda: states.mean(1)}.get(
            kind, lambda: states[:, 0]
        )()
    head: Any = opened.model.get_submodule(describe(opened.model).roles["head"][0].path)
    expected = features @ head.weight.T + head.bias
    assert torch.allclose(opened.model(pixel_values=pictures()).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "dinov2 gated", "dinov2 registers", "swin", "clip", "siglip"])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(),
        Bottleneck(),
        Bottleneck.houlsby(4),
        BitFit(),
        NormTuning(),
        Head(pool="all"),
        Prefix(tokens=2),
        Prompt(tokens=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_adapters_train_every_parameter(kind: str, method: Any, tmp_path: Path) -> None:
    """None of them sits where a classifier never looks (CLIP's last norm, SigLIP's pooling head)."""
    opened = open_classifier(str(save(build(kind), tmp_path / "m")), LABELS)
    if isinstance(method, Prompt) and kind in ("swin", "beit"):
        with pytest.raises(UnsupportedError, match="takes no extra tokens: "):
            epitaxy.attach(opened.model, method)
        return
    adapter = epitaxy.attach(opened.model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    opened.model(pixel_values=pictures()).logits.square().sum().backward()
    without = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    assert not without


OLD_NAMES = (  # of the checkpoints on the hub, written by transformers 4
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def hub_in21k(path: Path) -> tuple[Any, Path]:
    """A trunk as google/vit-base-patch16-224-in21k is on the hub: old names, a pooler, no labels, old preparation."""
    trunk = build("vit trunk")
    save(trunk, path)
    edit(path / "config.json", architectures=["ViTModel"], transformers_version="4.13.0.dev0")
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for new, old in OLD_NAMES:
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "preprocessor_config.json").write_text(
        '{"do_normalize": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], '
        '"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 32}'
    )
    return trunk, path


def test_the_imagenet_21k_trunk_as_it_is_on_the_hub(tmp_path: Path) -> None:
    trunk, path = hub_in21k(tmp_path / "vit-base-patch16-224-in21k")
    assert "encoder.layer.1.attention.attention.query.weight" in load_file(path / "model.safetensors")
    assert "pooler.dense.weight" in load_file(path / "model.safetensors")
    opened = open_classifier(str(path), LABELS)
    assert type(opened.model).__name__ == "ViTForImageClassification"
    assert opened.head == "fresh"
    states = trunk(pixel_values=pictures()).last_hidden_state
    assert torch.allclose(opened.model.vit(pixel_values=pictures()).last_hidden_state, states, atol=1e-6)
    assert not any("pooler" in name for name in opened.model.state_dict())
    opened.model.save_pretrained(tmp_path / "again")
    opened.processor.save_pretrained(tmp_path / "again")
    again = open_classifier(str(tmp_path / "again"), LABELS)
    assert torch.equal(again.model(pixel_values=pictures()).logits, opened.model(pixel_values=pictures()).logits)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    pixels = opened.processor(images=[picture], return_tensors="pt").pixel_values[0]
    assert torch.allclose(pixels, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_config_without_architectures(tmp_path: Path) -> None:
    path = save(build("dinov2 trunk"), tmp_path / "m")
    edit(path / "config.json", architectures=None)
    assert open_classifier(str(path), LABELS).head == "fresh"


def test_a_distilled_deit_keeps_both_heads_for_its_own_labels(tmp_path: Path) -> None:
    model = build("deit distilled")
    path = save(model, tmp_path / "m")
    kept = open_classifier(str(path), ["LABEL_0", "LABEL_1"])
    assert kept.head == "kept"
    assert torch.equal(kept.model(pixel_values=pictures()).logits, model(pixel_values=pictures()).logits)


def test_a_classifier_of_clip_keeps_its_head(tmp_path: Path) -> None:
    model = build("clip classifier")
    kept = open_classifier(str(save(model, tmp_path / "m")), ["LABEL_0", "LABEL_1"])
    assert kept.head == "kept"
    assert torch.equal(kept.model(pixel_values=pictures()).logits, model(pixel_values=pictures()).logits)


@pytest.mark.parametrize(
    "kind", ["clip tower", "clip tower projected", "siglip tower", "clip", "vit trunk", "swin trunk"]
)
def test_what_was_opened_is_saved_and_opened_again(kind: str, tmp_path: Path) -> None:
    opened = open_classifier(str(save(build(kind), tmp_path / "m")), LABELS)
    opened.model.save_pretrained(tmp_path / "again")
    opened.processor.save_pretrained(tmp_path / "again")
    again = open_classifier(str(tmp_path / "again"), LABELS)
    assert again.head == "kept"
    assert torch.equal(again.model(pixel_values=pictures()).logits, opened.model(pixel_values=pictures()).logits)


@pytest.mark.parametrize(("kind", "field"), [("vit", "num_hidden_layers"), ("vit trunk", "num_hidden_layers")])
def test_blocks_are_not_left_out(kind: str, field: str, tmp_path: Path) -> None:
    path = save(build(kind), tmp_path / "m")
    edit(path / "config.json", **{field: 1})
    with pytest.raises(FormatError, match=r"m: 16 weights of its blocks have no place in the 1 blocks that its config"):
        open_classifier(str(path), LABELS)


def test_pictures_are_never_prepared_by_guess(tmp_path: Path) -> None:
    path = save(build("vit trunk"), tmp_path / "m")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(FormatError, match=r"^\S+m: preprocessor_config.json is missing, which says how pictures are"):
        open_classifier(str(path), LABELS)


def test_a_config_that_says_no_type(tmp_path: Path) -> None:
    path = save(build("vit"), tmp_path / "m")
    edit(path / "config.json", model_type=None, architectures=None)
    with pytest.raises(EpitaxyError, match=r"^\S+m: cannot open the model's config: ") as caught:
        open_classifier(str(path), LABELS)
    assert "\n" not in str(caught.value)


def test_a_prefix_on_one_tower_speaks_of_no_other(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    opened = open_classifier(str(save(build("clip"), tmp_path / "m")), LABELS)
    before = opened.model(pixel_values=pictures()).logits
    capfd.readouterr()
    epitaxy.attach(opened.model, Prefix(tokens=2), name="a")
    assert not torch.allclose(opened.model(pixel_values=pictures()).logits, before)
    epitaxy.detach(opened.model, "a")
    assert torch.equal(opened.model(pixel_values=pictures()).logits, before)
    assert capfd.readouterr() == ("", "")
