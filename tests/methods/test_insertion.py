"""Adapters beside, after and before sub-layers against the sums written out by hand, on models of several builds."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import Bottleneck, Conformer, Convpass, EpitaxyError, GridConv

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATTERNS = [(order, residual) for order in ("parallel", "sequential", "before") for residual in (False, True, None)]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, **SIZES)).eval()


def whisper() -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
    )
    return WhisperEncoder(config).eval()


def randomise(adapter: epitaxy.Adapter) -> None:
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)


def inserted(order: str, residual: bool | None, inner: Any, adapter: Any, n: Tensor, scale: float) -> Tensor:
    """The definition: what a sub-layer gives for the input ``n``."""
    if order == "parallel":
        return inner(n) + scale * adapter(n) + (n if residual else 0)
    if order == "sequential":
        out = inner(n)
        return scale * adapter(out) + (0 if residual is False else out)
    v = scale * adapter(n) + (n if residual else 0)
    return inner(v) + v


@pytest.mark.parametrize(("order", "residual"), PATTERNS)
def test_feed_forward_of_vit(order: Any, residual: bool | None) -> None:
    check(vit().layers[0], "mlp", lambda block, n: block.mlp(n), order, residual)


@pytest.mark.parametrize(("order", "residual"), PATTERNS)
def test_attention_of_vit(order: Any, residual: bool | None) -> None:
    check(vit().layers[0], "attention", lambda block, n: block.attention(n)[0], order, residual)


@pytest.mark.parametrize(("order", "residual"), PATTERNS)
def test_feed_forward_of_bert_enters_and_leaves_elsewhere(order: Any, residual: bool | None) -> None:
    def call(layer: Any, n: Tensor) -> Tensor:
        return layer.output.dense(layer.intermediate(n))

    check(bert().encoder.layer[0], "mlp", call, order, residual)


@pytest.mark.parametrize(("order", "residual"), PATTERNS)
def test_feed_forward_of_whisper_enters_and_leaves_elsewhere(order: Any, residual: bool | None) -> None:
    def call(layer: Any, n: Tensor) -> Tensor:
        return layer.fc2(layer.activation_fn(layer.fc1(n)))

    check(whisper().layers[0], "mlp", call, order, residual)


def check(block: Any, at: str, call: Any, order: Any, residual: bool | None) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    plain = copy.deepcopy(block)
    method = Bottleneck(at=at, bottleneck=5, order=order, residual=residual, scale=0.7, activation="gelu")
    adapter = epitaxy.attach(model, method, name="a")
    randomise(adapter)
    n = torch.randn(3, 6, 32)
    expected = inserted(order, residual, lambda x: call(plain, x), adapter.edits[0].module, n, 0.7)
    torch.testing.assert_close(call(block, n), expected)


def test_nothing_goes_before_an_attention_whose_input_is_its_residual() -> None:
    model = bert()
    with pytest.raises(EpitaxyError, match=r"nothing can be put before 'encoder.layer.0.attention'"):
        epitaxy.attach(model, Bottleneck(at="attention", order="before"), name="a")
    assert epitaxy.adapters(model) == {}


@pytest.mark.parametrize(("order", "residual"), [("parallel", True), ("before", False)])
def test_patterns_that_need_equal_widths_say_so(order: Any, residual: bool) -> None:
    with pytest.raises(EpitaxyError, match=r"one width at 'layers.0.mlp.fc1', found 32 and 64"):
        epitaxy.attach(vit(), Bottleneck(at="mlp.up", order=order, residual=residual), name="a")


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(EpitaxyError, match=r"order: expected one of parallel, sequential, before, found 'after'"):
        Bottleneck(order="after")  # type: ignore[arg-type]


METHODS: dict[str, Any] = {
    "bottleneck": lambda **fields: Bottleneck(bottleneck=4, **fields),
    "conformer": lambda **fields: Conformer(bottleneck=4, kernel=3, **fields),
    "convpass": lambda **fields: Convpass(bottleneck=4, **fields),
    "grid_conv": lambda **fields: GridConv(bottleneck=4, kernel=3, **fields),
    "bottleneck, legacy": lambda **fields: Bottleneck(bottleneck=4, init="legacy_normal", **fields),
    "bottleneck, all zero": lambda **fields: Bottleneck(bottleneck=4, init="legacy_zeros", **fields),
    "conformer, random": lambda **fields: Conformer(bottleneck=4, kernel=3, zero_init=False, **fields),
    "conformer, legacy": lambda **fields: Conformer(bottleneck=4, kernel=3, legacy=True, **fields),
    "convpass, legacy": lambda **fields: Convpass(bottleneck=4, legacy=True, **fields),
}


@pytest.mark.parametrize(("order", "residual"), PATTERNS)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_identity_start_is_what_the_fields_declare(name: str, order: Any, residual: bool | None) -> None:
    model = vit()
    x = torch.randn(2, 3, 16, 16)
    base = model(x).last_hidden_state
    method = METHODS[name](order=order, residual=residual)
    epitaxy.attach(model, method, name="a")
    assert torch.equal(model(x).last_hidden_state, base) is ("identity" not in method.cannot)
    assert "merge" in method.cannot


def test_a_checkpointed_pass_leaves_no_tensor_that_cannot_be_copied() -> None:
    """Recomputing stops halfway through a block, between the two halves of an adapter."""
    model = whisper()
    randomise(epitaxy.attach(model, Bottleneck(bottleneck=4, order="before"), name="a"))
    model.gradient_checkpointing_enable()
    model.train()
    features = torch.randn(2, 8, 20)
    model(features).last_hidden_state.pow(3).sum().backward()
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    model.eval()
    for other in (twin, again):
        other.eval()
        assert torch.equal(other(features).last_hidden_state, model(features).last_hidden_state)


@pytest.mark.parametrize(("reduction", "hidden"), [(8, 4), (12.8, 2), (9.2, 3), (21, 2), (64, None), (0, None)])
def test_reduction_rounds_halves_to_even_and_never_to_nothing(reduction: float, hidden: int | None) -> None:
    if hidden is None:
        with pytest.raises(EpitaxyError, match=r"leaves no hidden unit at 'layers.0.mlp'"):
            epitaxy.attach(vit(), Bottleneck(reduction=reduction), name="a")
        return
    adapter = epitaxy.attach(vit(), Bottleneck(reduction=reduction), name="a")
    assert {tuple(edit.module.down.weight.shape) for edit in adapter.edits} == {(hidden, 32)}


def test_bottleneck_starts() -> None:
    """The corrected start trains both matrices within two steps; the one the published code writes never trains."""
    for init, trained in (("kaiming", True), ("legacy_normal", True), ("legacy_zeros", False)):
        model = vit()
        adapter = epitaxy.attach(model, Bottleneck(bottleneck=4, init=init), name="a")  # type: ignore[arg-type]
        start = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
        optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(torch.randn(2, 3, 16, 16)).last_hidden_state.pow(3).sum().backward()
            optimiser.step()
        moved = {key for key, tensor in adapter.tensors().items() if not torch.equal(tensor, start[key])}
        assert moved == {key for key in start if trained or key.endswith("up.bias")}, init
        spread = float(start["bottleneck.mlp.0.module.up.weight"].std())
        assert (abs(spread - 0.02) < 0.005) if init == "legacy_normal" else spread == 0
