"""Models built like timm's, as objects: where adapters sit in them, what they compute, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import epitaxy
from epitaxy import BitFit, Bottleneck, Convpass, GridConv, Head, LoRA, MoSA, NormTuning, Prefix, Prompt
from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, FormatError, SiteError, UnsupportedError
from epitaxy.interop import adapter_plus
from epitaxy.models.opening import open_classifier
from tests.interop.test_adapter_plus import adapters, head
from tests.models.timm_like import SwinTransformer, VisionTransformer
from tests.models.vision import PROJECTIONS, ROLES, pictures

BUILD: dict[str, Callable[[], nn.Module]] = {
    "vit": VisionTransformer,
    "vit with registers": lambda: VisionTransformer(reg_tokens=2, init_values=0.3, drop_path=0.2),
    "vit averaged": lambda: VisionTransformer(global_pool="avg"),
    "deit": lambda: VisionTransformer(distilled=True),
    "swin": SwinTransformer,
    "own biases": lambda: VisionTransformer(own_biases=True),
}


def build(kind: str) -> Any:
    torch.manual_seed(2)
    model = BUILD[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(kind: str) -> Tensor:
    return pictures(32 if kind == "swin" else 16, batch=3)


def attached(kind: str, method: Any) -> tuple[Any, Any]:
    """A model with a randomised adapter."""
    model = build(kind)
    adapter = epitaxy.attach(model, method, name="a")
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, adapter


@pytest.mark.parametrize("kind", BUILD)
def test_every_role_is_found(kind: str) -> None:
    anatomy = describe(build(kind))
    roles = anatomy.roles
    for role in (*ROLES, *PROJECTIONS, "attention.qkv"):
        assert len(roles[role]) == (3 if kind == "swin" else 2), role
    assert {spot.heads for spot in roles["attention"]} == {2}
    assert roles["patch"][0].path == "patch_embed.proj"
    assert roles["head"][0].path == ("head.fc" if kind == "swin" else "head")
    assert anatomy.special == {"vit with registers": 3, "deit": 2, "swin": 0}.get(kind, 1)
    assert anatomy.last == ("blocks.1" if kind == "vit averaged" else "norm")
    assert [spot.path for spot in roles.get("norm.final", ())] == ([] if kind == "vit averaged" else ["norm"])


METHODS = (
    LoRA(rank=2),
    LoRA(at=("attention.q", "attention.output", "mlp.up"), rank=2),
    Bottleneck(bottleneck=4),
    Bottleneck.adaptformer(4),
    Bottleneck.houlsby(4),
    MoSA(bottleneck=8),
    MoSA.adaptformer(8),
    BitFit(),
    NormTuning(),
    Head(),
    Prompt(tokens=2),
    Prompt(tokens=2, deep=True),
    Prefix(tokens=2, gated=True),
    Convpass(bottleneck=4),
    GridConv(bottleneck=4),
)


@pytest.mark.parametrize("kind", ["vit", "vit with registers", "swin"])
@pytest.mark.parametrize("number", range(len(METHODS)))
def test_methods_start_train_save_and_load(kind: str, number: int, tmp_path: Path) -> None:
    method = METHODS[number]
    if kind == "swin" and isinstance(method, (Prompt, Convpass, GridConv)):
        with pytest.raises(UnsupportedError, match="work on windows of a fixed grid"):
            epitaxy.attach(build(kind), method)
        return
    model = build(kind)
    before = model(pixels(kind))
    epitaxy.attach(model, method, name="a")
    if not isinstance(method, Prompt):
        assert torch.equal(model(pixels(kind)), before)
    model, adapter = attached(kind, method)
    model(pixels(kind)).square().sum().backward()
    assert not [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    found = model(pixels(kind))
    assert (found - before).abs().max() > 1e-4
    epitaxy.save(model, tmp_path / "a")
    again = build(kind)
    epitaxy.load(again, tmp_path / "a")
    assert torch.equal(again(pixels(kind)), found)


def test_adaptformer_beside_layer_scale() -> None:
    """The published place by hand: what the adapter gives is scaled and dropped with the feed-forward's output."""
    model, adapter = attached("vit with registers", Bottleneck.adaptformer(4))
    base = build("vit with registers")
    modules = [piece.module.module for piece in adapter.pieces if piece.key is not None]
    with torch.no_grad():
        x = base.patch_embed(pixels("vit"))
        x = torch.cat([base.cls_token.expand(3, -1, -1), base.reg_token.expand(3, -1, -1), x], 1) + base.pos_embed
        for block, module in zip(base.blocks, modules, strict=True):
            h = x + block.ls1(block.attn(block.norm1(x)))
            x = h + block.ls2(block.mlp(block.norm2(h)) + 0.1 * module(h))
        assert torch.allclose(model(pixels("vit")), base.head(base.norm(x)[:, 0]), atol=1e-5)


def test_lora_on_one_matrix_for_all() -> None:
    """Queries, keys and values are one matrix: LoRA on any of them changes that matrix, once."""
    sizes = set()
    for at in ("attention.q", "attention.v", ("attention.q", "attention.k", "attention.v"), "attention.qkv"):
        model, adapter = attached("vit", LoRA(at=at, rank=2))
        assert [piece.path for piece in adapter.pieces] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
        sizes.add(adapter.size())
        literal = build("vit")
        with torch.no_grad():
            for piece in adapter.pieces:
                literal.get_submodule(piece.path).weight += piece.module.up @ piece.module.down
            assert torch.allclose(model(pixels("vit")), literal(pixels("vit")), atol=1e-5)
    assert len(sizes) == 1


def test_merging_and_folding_leave_a_plain_model() -> None:
    model, _ = attached("vit", LoRA(rank=2) + BitFit())
    found = model(pixels("vit"))
    epitaxy.merge(model, "a")
    assert torch.allclose(model(pixels("vit")), found, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "vit with registers", "vit averaged"])
def test_prompts_stand_before_the_special_tokens_of_every_block(kind: str) -> None:
    model, adapter = attached(kind, Prompt(tokens=2))
    base = build(kind)
    tokens: Tensor = adapter.edits[0].tokens.detach()[0]
    with torch.no_grad():
        x = base.patch_embed(pixels(kind))
        leading = [token for token in (base.cls_token, base.reg_token) if token is not None]
        x = torch.cat([*(token.expand(3, -1, -1) for token in leading), x], 1) + base.pos_embed
        x = base.norm(base.blocks(torch.cat([tokens.expand(3, -1, -1), x], 1))[:, 2:])
        x = x[:, base.num_prefix_tokens :].mean(1) if kind == "vit averaged" else x[:, 0]
        assert torch.allclose(model(pixels(kind)), base.head(base.fc_norm(x)), atol=1e-5)


def test_rows_are_routed() -> None:
    model, _ = attached("vit", Bottleneck(bottleneck=4))
    alone = model(pixels("vit"))
    with epitaxy.route(model, ["a", None, "a"]):
        routed = model(pixels("vit"))
    assert torch.allclose(routed[[0, 2]], alone[[0, 2]], atol=1e-6)
    assert torch.allclose(routed[1], build("vit")(pixels("vit"))[1], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "method", "says"),
    [
        ("vit", Prefix(tokens=2), r"'blocks.0.attn' of VisionTransformer makes queries, keys and values by one matrix"),
        ("own biases", LoRA(), r"^'blocks.0.attn.qkv' is inside Attention, which reads its weights without calling"),
        (
            "own biases",
            Prefix(tokens=2, gated=True),
            r"never calls its projection 'qkv', so its queries cannot be read",
        ),
        ("deit", Head(), r"^the outputs of 'head' and 'head_dist' are averaged, and a head would replace only one"),
        ("swin", Head(pool="cls"), r"SwinTransformer has no class token"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, method: Any, says: str) -> None:
    model = build(kind)
    with pytest.raises((SiteError, UnsupportedError), match=says):
        epitaxy.attach(model, method)
    assert not epitaxy.adapters(model)


def test_linear_maps_that_are_never_called_are_left_out() -> None:
    model, adapter = attached("own biases", LoRA(at="linear", rank=2))
    assert not any("qkv" in piece.path for piece in adapter.pieces)
    model(pixels("vit")).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_adapter_plus_goes_on_a_model_of_timm(tmp_path: Path) -> None:
    """Its own base, under its own names: the file of the whole model is accepted, another base is not."""
    model = build("vit")
    state = {
        **{key: value.clone() for key, value in model.state_dict().items() if "head" not in key},
        **adapters(),
        **head(),
    }
    torch.save(state, tmp_path / "best.pt")
    adapter_plus.load(model, tmp_path / "best.pt")
    base = build("vit")
    with torch.no_grad():
        x = base.patch_embed(pixels("vit"))
        x = torch.cat([base.cls_token.expand(3, -1, -1), x], 1) + base.pos_embed
        for number, block in enumerate(base.blocks):
            x = block(x)
            maps = [
                state[f"blocks.{number}.adapter.bottleneck.{layer}.{leaf}"]
                for layer in "14"
                for leaf in ("weight", "bias")
            ]
            x = x + state[f"blocks.{number}.adapter.scaling"] * F.linear(F.gelu(F.linear(x, *maps[:2])), *maps[2:])
        wanted = F.linear(base.norm(x)[:, 0], state["head.weight"], state["head.bias"])
        assert torch.allclose(model(pixels("vit")), wanted, atol=1e-4)
    other = build("vit with registers")
    with pytest.raises(FormatError, match="made for another base"):
        adapter_plus.load(other, tmp_path / "best.pt")


def test_a_directory_of_timm_says_what_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    try:
        import timm  # type: ignore[import-not-found]  # noqa: F401

        pytest.skip("timm is there")
    except ImportError:
        pass
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        EpitaxyError, match=r"cannot open the model's config: it needs timm, which is not installed: pip"
    ):
        open_classifier(str(tmp_path), ["a", "b"])
