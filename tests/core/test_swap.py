"""Trained changes of biases and norms against the same changes written into the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import epitaxy
from epitaxy.core.edits import Swap
from epitaxy.core.errors import EpitaxyError, SiteError

HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(3, 6), (2, 6, 4, 4)),
    "group norm of sequences": (lambda: nn.GroupNorm(6, 6), (2, 6, 9)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "batch norm of features": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (4, 6, 5)),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "llama's norm": (lambda: LlamaRMSNorm(6), (2, 3, 6)),
    "gemma's norm": (lambda: Gemma2RMSNorm(6), (2, 3, 6)),
    "channels before space": (lambda: ConvNextLayerNorm(6, data_format="channels_first"), (2, 6, 3, 3)),
}
BIASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 3), (2, 6, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 5, 2, stride=2), (2, 6, 4, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(6, affine=True), (2, 6, 9)),
    **{name: host for name, host in HOSTS.items() if getattr(host[0](), "bias", None) is not None},
}


class Box(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def trained(make: Callable[[], nn.Module], method: Any) -> tuple[Box, Box, epitaxy.Adapter]:
    """A model with an adapter, and a copy with the adapter's changes written into its parameters."""
    torch.manual_seed(0)
    model = Box(make()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    written = copy.deepcopy(model)
    adapter = epitaxy.attach(model, method, name="a")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    edit = adapter.edits[0]
    assert isinstance(edit, Swap)
    with torch.no_grad():
        for name in edit.names:
            if edit.absolute:
                getattr(written.layer, name).copy_(getattr(edit, name))
            else:
                getattr(written.layer, name).add_(getattr(edit, name))
    return model, written, adapter


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("legacy", [False, True], ids=["difference", "value"])
@pytest.mark.parametrize("kind", HOSTS)
def test_a_tuned_norm_is_the_norm_with_other_parameters(kind: str, legacy: bool, training: bool) -> None:
    make, shape = HOSTS[kind]
    model, written, adapter = trained(make, epitaxy.NormTuning(at="layer", legacy=legacy))
    model.train(training)
    written.train(training)
    x = torch.randn(shape) * 3 + 1
    y = model(x)
    torch.testing.assert_close(y, written(x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in adapter.parameters())


@pytest.mark.parametrize("legacy", [False, True], ids=["difference", "value"])
@pytest.mark.parametrize("kind", BIASES)
def test_a_tuned_bias_is_the_layer_with_another_bias(kind: str, legacy: bool) -> None:
    make, shape = BIASES[kind]
    model, written, _ = trained(make, epitaxy.BitFit(at="layer", legacy=legacy))
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), written(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_a_fresh_change_of_a_norm_is_exactly_none(kind: str) -> None:
    make, shape = HOSTS[kind]
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = Box(make()).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model.to(dtype)
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            base = model(x)
            for name, legacy in (("a", False), ("b", True)):
                epitaxy.attach(model, epitaxy.NormTuning(at="layer", legacy=legacy), name=name)
                assert torch.equal(model(x), base)


def test_a_small_change_shows_beside_the_one_of_gemma_in_half_precision() -> None:
    model = Box(Gemma2RMSNorm(6)).to(torch.bfloat16)
    adapter = epitaxy.attach(model, epitaxy.NormTuning(at="layer"), name="a")
    x = torch.zeros(1, 6, dtype=torch.bfloat16) + torch.tensor([1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]).bfloat16()
    nn.init.constant_(adapter.edits[0].weight, 1e-3)  # type: ignore[arg-type]
    change = adapter.edits[0].after(model.layer, x, torch.zeros_like(x))
    epitaxy.activate(model, None)
    torch.testing.assert_close(change, (model(x).float() * 1e-3).bfloat16(), rtol=2e-2, atol=0)


def test_several_changes_of_one_norm_add_up_and_merge() -> None:
    model, written, _ = trained(lambda: nn.LayerNorm(6), epitaxy.NormTuning(at="layer"))
    second = epitaxy.attach(model, epitaxy.NormTuning(at="layer", weight=False), name="b")
    nn.init.normal_(second.edits[0].bias)  # type: ignore[arg-type]
    with torch.no_grad():
        written.layer.bias.add_(second.edits[0].bias)
    x = torch.randn(2, 6)
    epitaxy.activate(model, ["a", "b"])
    torch.testing.assert_close(model(x), written(x))
    epitaxy.merge(model, "a")
    epitaxy.merge(model, "b")
    torch.testing.assert_close(model.layer.weight, written.layer.weight)
    torch.testing.assert_close(model.layer.bias, written.layer.bias)


def test_weight_decay_pulls_to_the_base_or_to_zero() -> None:
    """A trained value decays as the base's own parameter would in a plain script; a difference does not move at all."""
    for legacy, kept in ((False, 1.0), (True, 0.9)):
        model, plain = Box(nn.LayerNorm(6)), nn.LayerNorm(6)
        adapter = epitaxy.attach(model, epitaxy.NormTuning(at="layer", legacy=legacy), name="a")
        for parameters in (adapter.parameters(), plain.parameters()):
            for parameter in (chosen := list(parameters)):
                parameter.grad = torch.zeros_like(parameter)
            torch.optim.AdamW(chosen, lr=0.1, weight_decay=1.0).step()
        x = torch.randn(2, 6)
        torch.testing.assert_close(model(x), kept * nn.functional.layer_norm(x, (6,)))
        assert torch.allclose(model(x), plain(x)) is legacy


def test_a_trained_value_keeps_its_meaning_when_another_adapter_is_merged() -> None:
    model, _, _ = trained(lambda: nn.LayerNorm(6), epitaxy.NormTuning(at="layer", legacy=True))
    other = epitaxy.attach(model, epitaxy.NormTuning(at="layer", weight=False), name="b")
    nn.init.normal_(other.edits[0].bias)  # type: ignore[arg-type]
    x = torch.randn(2, 6)
    epitaxy.activate(model, ["a", "b"])
    expected = model(x)
    epitaxy.merge(model, "b")
    torch.testing.assert_close(model(x), expected)
    epitaxy.merge(model, "a")
    torch.testing.assert_close(model(x), expected)


def test_training_leaves_the_running_statistics_of_the_base_alone() -> None:
    """They are part of the base; it counts again after the last adapter is gone."""
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False))
    norm, x = model[1], torch.randn(4, 2, 9)
    bare = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    epitaxy.attach(model, epitaxy.NormTuning() + epitaxy.LoRA(at="conv", rank=1), name="a")
    assert torch.equal(model(x), bare(x))
    assert torch.equal(model.eval()(x), bare.eval()(x)) is False  # the copy has counted the batch
    after = {key: value for key, value in model.state_dict().items() if key in before}
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    epitaxy.detach(model)
    model.train()(x)
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 1
    assert model[2].track_running_stats is False


def test_rows_of_a_batch_norm_in_training_are_routed_with_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 3)).train()
    adapters = {name: epitaxy.attach(model, epitaxy.NormTuning(), name=name) for name in ("a", "b")}
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    x, rows = torch.randn(4, 3, 9), ["a", None, "b", "a"]
    alone = []
    for row, name in enumerate(rows):
        epitaxy.activate(model, name)
        alone.append(model(x)[row])
    with epitaxy.route(model, rows):
        torch.testing.assert_close(model(x), torch.stack(alone))


def test_a_whole_gemma() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=50,
    )
    model, words = transformers.Gemma2ForCausalLM(config).eval(), torch.randint(0, 50, (2, 6))
    base = model(input_ids=words).logits
    adapter = epitaxy.attach(model, epitaxy.NormTuning(), name="a")
    assert len(adapter.edits) == 9
    assert torch.equal(model(input_ids=words).logits, base)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    logits = model(input_ids=words).logits
    epitaxy.merge(model, "a", probe={"input_ids": words})
    torch.testing.assert_close(model(input_ids=words).logits, logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_swapped_is_refused() -> None:
    with pytest.raises(SiteError, match="Linear has no one-dimensional parameter 'bias'"):
        Swap(nn.Linear(4, 4, bias=False))
    with pytest.raises(SiteError, match="only a norm's weight"):
        Swap(nn.PReLU(4), ("weight",))
    with pytest.raises(EpitaxyError, match="placed nothing"):
        epitaxy.attach(Box(nn.LayerNorm(4)), epitaxy.NormTuning(at="layer", weight=False, bias=False))


def test_a_head_of_its_own() -> None:
    """Same size: a copy of the base's; another size: a new one; its own output replaces the base's."""
    torch.manual_seed(0)
    model, x = Box(nn.Linear(6, 3)), torch.randn(2, 6)
    base = model(x)
    adapter = epitaxy.attach(model, epitaxy.Head(at="layer"), name="a")
    assert torch.equal(model(x), base)
    nn.init.normal_(adapter.edits[0].linear.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model(x), adapter.edits[0].linear(x))  # type: ignore[operator]
    epitaxy.attach(model, epitaxy.Head(at="layer", labels=5), name="b")
    assert model(x).shape == (2, 5)
    epitaxy.merge(model, "b")
    assert model.layer.out_features == 5
    assert model.layer.weight.shape == (5, 6)
    epitaxy.unmerge(model)
    epitaxy.detach(model)
    assert torch.equal(model(x), base)
    assert model.layer.out_features == 3
