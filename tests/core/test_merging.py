"""Merges that must not happen, and what they leave behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epitaxy
from epitaxy.core.errors import EpitaxyError, StateError, UnsupportedError
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
    with pytest.raises(TypeError):
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
        for probe in (None, FAMILIES["vit"].inputs(2)):
            with pytest.raises(UnsupportedError, match="by nan .* the base is unchanged"):
                epitaxy.merge(model, "a", probe=probe)


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
    with pytest.raises(UnsupportedError, match="'lm_head' is shared with 'model.embed_tokens'.*untie them first"):
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


def test_torchs_own_quantised_layers() -> None:
    """Dynamic quantisation packs the weights: adapters on other layers work, on these they are refused."""
    model = FAMILIES["plain"].model()
    try:
        packed = torch.ao.quantization.quantize_dynamic(
            model, {"blocks.0.ff.0": torch.ao.quantization.default_dynamic_qconfig}
        )
    except RuntimeError:
        pytest.xfail("this build of torch has no quantised kernels")
    layout = FAMILIES["plain"].layout
    with pytest.raises(EpitaxyError, match="needs a linear map or a convolution, found Linear"):
        epitaxy.attach(packed, epitaxy.LoRA(at="blocks.0.ff.0"), layout=layout)
    base = FAMILIES["plain"].run(packed)
    adapter = epitaxy.attach(packed, epitaxy.LoRA() + epitaxy.Bottleneck(bottleneck=4), layout=layout)
    assert torch.equal(FAMILIES["plain"].run(packed), base)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(FAMILIES["plain"].run(packed), base)
