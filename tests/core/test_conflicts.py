"""Several edits of one kind at one place: side by side where that means something, refused where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epitaxy
from epitaxy import Bottleneck, Head, LoRA, Prefix, Prompt
from epitaxy.core.errors import SiteError, StateError, UnsupportedError
from epitaxy.core.host import hosted
from tests.contract.families import FAMILIES, noise, words


def randomise(adapter: epitaxy.Adapter) -> epitaxy.Adapter:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("vit", Prefix(tokens=2) + Prefix(tokens=3, layers=(0,))),
        ("llama", Prefix(tokens=2) + Prefix(tokens=3)),
        ("sd15", Prefix(tokens=2) + Prefix(tokens=2)),
        ("vit", Prefix(tokens=2, gated=True) + Prefix(tokens=3, gated=True)),
        ("bert", Bottleneck.parallel(8) + Bottleneck.parallel(8)),
        ("vit", LoRA(rank=2) + LoRA(rank=3, at="linear")),
    ],
    ids=["prefix", "prefix of a decoder", "prefix without masks", "gated prefix", "tapped bottleneck", "lora"],
)
def test_twice_the_same_method_is_two_adapters(family: str, method: Any) -> None:
    """Every part acts, in one adapter as in two, for all rows or routed."""
    model, twin = FAMILIES[family].model(), FAMILIES[family].model()
    both = randomise(epitaxy.attach(model, method, name="both"))
    parts = [epitaxy.attach(twin, part, name=f"part{number}") for number, part in enumerate(method.parts)]
    places = [tensor for part in parts for tensor in part.tensors().values()]
    for place, tensor in zip(places, both.tensors().values(), strict=True):
        place.copy_(tensor)
    epitaxy.activate(twin, ["part0", "part1"])
    together = FAMILIES[family].run(model)
    torch.testing.assert_close(together, FAMILIES[family].run(twin), rtol=1e-4, atol=1e-5)
    together.square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in both.parameters())
    with epitaxy.route(model, ["both"] * 3):
        torch.testing.assert_close(FAMILIES[family].run(model), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Prompt(tokens=2) + Prompt(tokens=3), "would put prompts twice before the same blocks"),
        (Prompt(tokens=2, deep=True) + LoRA() + Prompt(tokens=3, layers=(1,)), "would put prompts twice"),
        (Head() + Head(labels=5), "would replace 'classifier' twice"),
    ],
)
def test_what_cannot_be_twice_in_one_adapter(method: Any, says: str) -> None:
    model = FAMILIES["vit"].model()
    with pytest.raises(StateError, match=says):
        epitaxy.attach(model, method, name="a")
    assert hosted(model) is None
    assert not any("epitaxy" in path for path, _ in model.named_modules())


def test_prompts_over_different_blocks() -> None:
    """They would stand in each other's way where they overlap, and do not where they have blocks of their own."""
    family = FAMILIES["vit"]
    model, base = family.model(), family.run(family.model())
    for name, layers in (("all", None), ("first", (0,)), ("last", (1,))):
        randomise(epitaxy.attach(model, Prompt(tokens=2, layers=layers), name=name))
    for call in (
        lambda: epitaxy.activate(model, ["all", "last"]),
        lambda: epitaxy.route(model, ["all", "last", None]).__enter__(),
    ):
        with pytest.raises(
            StateError, match="the prompts of 'all' and 'last' span different blocks, 0 to 1 and 1 to 1"
        ):
            call()
    record = hosted(model)
    assert record is not None
    assert record.state.route is None
    assert record.state.active == ("last",)
    outputs: dict[str, Tensor] = {}
    for names in (["first"], ["last"], ["first", "last"]):
        epitaxy.activate(model, names)
        outputs["+".join(names)] = family.run(model)
    assert len({float(output.detach().sum()) for output in [base, *outputs.values()]}) == 4
    with epitaxy.route(model, ["first", "last", None]):
        routed = family.run(model)
    for row, expected in enumerate((outputs["first"], outputs["last"], base)):
        torch.testing.assert_close(routed[row], expected[row], rtol=1e-5, atol=1e-5)


def test_prompts_take_blocks_in_a_row() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    model = ViTForImageClassification(config)
    with pytest.raises(SiteError, match="prompts take blocks in a row, not 2 of the blocks 0 to 2"):
        epitaxy.attach(model, Prompt(tokens=2, deep=True, layers=(0, 2)))
    assert hosted(model) is None


def test_prompts_on_two_stacks_are_refused() -> None:
    """An encoder's tokens would leave in the decoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedError, match=r"2 stacks, the first two are 'model.encoder.layers'"):
        epitaxy.attach(model, Prompt(tokens=2))
    inputs = {"input_features": noise(2, 16, 40), "decoder_input_ids": words(2, 4)}
    with torch.no_grad():
        base = model(**inputs).logits
    randomise(epitaxy.attach(model, Prefix(tokens=2) + LoRA(at=("attention.q", "cross_attention.v"))))
    logits = model(**inputs).logits
    assert logits.shape == base.shape
    assert not torch.allclose(logits, base)


def test_prompts_on_a_bare_decoder() -> None:
    """The tokens enter at the root module itself."""
    model, ids = FAMILIES["llama"].model(), words(2)
    adapter = randomise(epitaxy.attach(model, Prompt(tokens=3), name="a"))
    expected = model.model(input_ids=ids).last_hidden_state
    bare = FAMILIES["llama"].model().model
    hidden = bare(input_ids=ids).last_hidden_state
    for place, tensor in zip(
        epitaxy.attach(bare, Prompt(tokens=3), name="a").tensors().values(), adapter.tensors().values(), strict=True
    ):
        place.copy_(tensor)
    assert torch.equal(bare(input_ids=ids).last_hidden_state, expected)
    epitaxy.detach(bare)
    assert torch.equal(bare(input_ids=ids).last_hidden_state, hidden)
