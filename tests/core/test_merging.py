"""Merges that must not happen, and what they leave behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epitaxy
from epitaxy.core.errors import StateError, UnsupportedError
from epitaxy.core.host import hosted
from tests.contract.families import FAMILIES, words


def adapted(family: str, method: Any) -> nn.Module:
    model = FAMILIES[family].model()
    for parameter in epitaxy.attach(model, method, name="a").parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def unchanged() -> Iterator[list[nn.Module]]:
    """Models put in must come out with the same weights, activation and merges."""
    models: list[nn.Module] = []
    states: list[dict[str, Tensor]] = []

    class Kept(list[nn.Module]):
        def append(self, model: nn.Module) -> None:
            super().append(model)
            states.append({key: value.clone() for key, value in model.state_dict().items()})

    models = Kept()
    yield models
    assert models
    for model, before in zip(models, states, strict=True):
        record = hosted(model)
        assert record is not None
        assert record.state.merged == ()
        assert record.stash == {}
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) or before[key].isnan().any() for key in before)


@pytest.mark.parametrize("active", ["a", None])
def test_a_probe_that_fails(unchanged: list[nn.Module], active: str | None) -> None:
    model = adapted("vit", epitaxy.LoRA())
    epitaxy.activate(model, active)
    unchanged.append(model)
    with pytest.raises((TypeError, AttributeError)):  # whatever the model makes of arguments it does not have
        epitaxy.merge(model, "a", probe={"pictures": torch.zeros(1)})
    calls: list[int] = []

    def fails_after_the_merge(probed: nn.Module) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return FAMILIES["vit"].run(probed)

    with pytest.raises(RuntimeError, match="out of memory"):
        epitaxy.merge(model, "a", probe=fails_after_the_merge)
    record = hosted(model)
    assert record is not None
    assert record.state.active == (() if active is None else (active,))


def test_weights_that_are_no_numbers_are_never_merged(unchanged: list[nn.Module]) -> None:
    """Whichever of many hosts holds them."""
    for broken in range(4):
        model = adapted("vit", epitaxy.LoRA())
        list(epitaxy.adapters(model)["a"].parameters())[2 * broken + 1].data[0, 0] = float("nan")
        unchanged.append(model)
        with pytest.raises(StateError, match=r"not merged: lora\.attention\..* holds NaN or infinite values"):
            epitaxy.merge(model, "a")


def test_tied_weights_are_not_merged(unchanged: list[nn.Module]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = words(2)
    base = model(input_ids=ids).logits
    adapter = epitaxy.attach(model, epitaxy.LoRA(at="lm_head"), name="a")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(input_ids=ids).logits, base)
    unchanged.append(model)
    with pytest.raises(UnsupportedError, match=r"'lm_head' is shared with 'model.embed_tokens'.*untie them first"):
        epitaxy.merge(model, "a")


def test_a_parametrised_weight_is_not_merged(unchanged: list[nn.Module]) -> None:
    model = FAMILIES["vit"].model()
    torch.nn.utils.parametrizations.weight_norm(model.vit.layers[0].attention.q_proj)
    epitaxy.attach(model, epitaxy.LoRA(), name="a")
    unchanged.append(model)
    with pytest.raises(UnsupportedError, match=r"computed from other parameters \(a parametrization\)"):
        epitaxy.merge(model, "a")


def test_which_adapter() -> None:
    model = adapted("vit", epitaxy.LoRA())
    with pytest.raises(StateError, match="no adapter is merged"):
        epitaxy.unmerge(model)
    epitaxy.attach(model, epitaxy.LoRA(), name="b")
    with pytest.raises(StateError, match="say which adapter to merge: a, b"):
        epitaxy.merge(model)
    epitaxy.merge(model, "a")
    with pytest.raises(StateError, match="'b' is not merged"):
        epitaxy.unmerge(model, "b")
    with pytest.raises(StateError, match="merged already"):
        epitaxy.merge(model, "a")
    with pytest.raises(StateError, match="unmerge it first"):
        epitaxy.detach(model)
    assert set(epitaxy.adapters(model)) == {"a", "b"}


class Packed(nn.Linear):
    """Stands for a four-bit layer: its weight is packed bytes of another shape, unpacked in its own forward."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features)
        self.dense = [dense.weight.detach()]
        self.weight = nn.Parameter(torch.zeros(dense.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense[0], self.bias)


def packed(model: nn.Module) -> nn.Module:
    """The model with every linear map inside its blocks packed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks" in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Packed(module))
    return model


def dynamically_quantised(model: nn.Module) -> nn.Module:
    """The model with torch's own dynamic quantisation, whose layers are no ``nn.Linear`` and pack their weights."""
    torch.backends.quantized.engine = next(
        name for name in torch.backends.quantized.supported_engines if name != "none"
    )
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return quantised


@pytest.mark.parametrize("quantise", [packed, dynamically_quantised])
@pytest.mark.parametrize(
    "method",
    [
        epitaxy.LoRA(at=("attention.q", "mlp.up", "mlp.down")),
        epitaxy.Bottleneck.houlsby(4),
        epitaxy.Prefix(tokens=2),
        epitaxy.Prefix(tokens=2, gated=True),
        epitaxy.Prompt(tokens=2),
        epitaxy.NormTuning(),
        epitaxy.Head(labels=5),
    ],
    ids=["lora", "bottleneck", "prefix", "gated prefix", "prompt", "norms", "head"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_base_takes_adapters(quantise: Any, method: Any, tmp_path: Any) -> None:
    """Sizes are told right, outputs change, files load; merging into packed weights is refused."""
    family = FAMILIES["plain"]
    model = quantise(family.model())
    base = family.run(model)
    adapter = epitaxy.attach(model, method, name="a", layout=family.layout)
    if "identity" not in method.cannot and not isinstance(method, epitaxy.Head):
        assert torch.equal(family.run(model), base)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    changed = family.run(model)
    assert changed.shape != base.shape or not torch.allclose(changed, base)
    if quantise is packed:  # torch's dynamic quantisation has no backward pass: adapters on it serve, they do not train
        changed.square().sum().backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
    epitaxy.save(model, tmp_path / "a")
    again = quantise(family.model())
    epitaxy.load(again, tmp_path / "a")
    assert torch.equal(family.run(again), changed)
    if isinstance(method, epitaxy.LoRA):
        with pytest.raises(UnsupportedError, match="dequantise the base first"):
            epitaxy.merge(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_head_is_not_copied() -> None:
    family = FAMILIES["plain"]
    model = dynamically_quantised(family.model())
    with pytest.raises(UnsupportedError, match="cannot be copied to a trained head"):
        epitaxy.attach(model, epitaxy.Head(), layout=family.layout)
    assert hosted(model) is None


@pytest.mark.parametrize(
    "host",
    [
        nn.Linear(6, 5),
        nn.Conv1d(6, 5, 3),
        nn.ConvTranspose2d(6, 5, 2),
        nn.LayerNorm(6),
        nn.GroupNorm(2, 6),
        nn.BatchNorm1d(6),
        nn.BatchNorm2d(6),
        nn.BatchNorm3d(6),
        nn.RMSNorm(6),
    ],
    ids=lambda host: type(host).__name__,
)
def test_hosts_are_probed_with_inputs_they_take(host: nn.Module) -> None:
    model = nn.Sequential(host)
    method = epitaxy.NormTuning(at="0") if "Norm" in type(host).__name__ else epitaxy.BitFit(at="0")
    for parameter in epitaxy.attach(model, method, name="a").parameters():
        nn.init.normal_(parameter)
    report = epitaxy.merge(model)
    assert report.drift < 1e-5
    assert report.weights in (1, 2)


def test_a_host_without_an_obvious_input_asks_for_a_probe() -> None:
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    model = nn.Sequential(ConvNextLayerNorm(6, data_format="channels_first"))
    epitaxy.attach(model, epitaxy.NormTuning(at="0"), name="a")
    with pytest.raises(UnsupportedError, match=r"give merge\(\) a probe: ConvNextLayerNorm takes no random input"):
        epitaxy.merge(model)
    inputs = torch.randn(2, 6, 3, 3)
    assert epitaxy.merge(model, probe=lambda net: net(inputs)).drift < 1e-5
