"""Speech and sound encoders beyond the contract's families: the same promises, by the contract's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import BitFit, Bottleneck, Head, LoRA, NormTuning, Prefix, Prompt
from epitaxy.core.anatomy import describe
from epitaxy.core.errors import UnsupportedError
from tests.contract.checks import CHECKS, Case
from tests.contract.families import Family, noise, ragged
from tests.contract.methods import Variant

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
WAVES: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def hubert() -> nn.Module:
    return transformers.HubertForSequenceClassification(transformers.HubertConfig(**SIZES, **WAVES))


def wavlm() -> nn.Module:
    return transformers.WavLMForSequenceClassification(transformers.WavLMConfig(**SIZES, **WAVES))


def wavlm_stable() -> nn.Module:
    config = transformers.WavLMConfig(**SIZES, **WAVES, do_stable_layer_norm=True)
    return transformers.WavLMForSequenceClassification(config)


def unispeech_sat() -> nn.Module:
    return transformers.UniSpeechSatForSequenceClassification(transformers.UniSpeechSatConfig(**SIZES, **WAVES))


def data2vec() -> nn.Module:
    sizes = {**SIZES, **WAVES, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}
    return transformers.Data2VecAudioForSequenceClassification(transformers.Data2VecAudioConfig(**sizes))


def conformer() -> nn.Module:
    config = transformers.Wav2Vec2ConformerConfig(**SIZES, **WAVES, conv_depthwise_kernel_size=3)
    return transformers.Wav2Vec2ConformerForSequenceClassification(config)


def wav2vec2_bert() -> nn.Module:
    config = transformers.Wav2Vec2BertConfig(
        **{**SIZES, "conformer_conv_dropout": 0.0}, feature_projection_input_dim=20, conv_depthwise_kernel_size=3
    )
    return transformers.Wav2Vec2BertForSequenceClassification(config)


class Clap(nn.Module):
    """CLAP's audio encoder with a linear classifier on its embedding."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.ClapAudioConfig(
            window_size=4,
            num_mel_bins=16,
            spec_size=64,
            depths=[1, 1],
            num_attention_heads=[2, 4],
            patch_embeds_hidden_size=16,
            hidden_size=32,
            patch_size=4,
            patch_stride=[4, 4],
            hidden_dropout_prob=0.0,
            drop_path_rate=0.0,
            projection_dim=8,
        )
        self.encoder = transformers.ClapAudioModelWithProjection(config)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.encoder(input_features=input_features).audio_embeds)
        return logits


def waves(batch: int) -> dict[str, Any]:
    return {"input_values": noise(batch, 400)}


MODELS = {
    family.name: family
    for family in (
        Family("hubert", hubert, waves),
        Family("wavlm", wavlm, waves),
        Family("wavlm_stable", wavlm_stable, waves),
        Family("unispeech_sat", unispeech_sat, waves),
        Family("data2vec", data2vec, waves),
        Family("conformer", conformer, waves),
        Family("wav2vec2_bert", wav2vec2_bert, lambda batch: {"input_features": noise(batch, 12, 20)}),
        Family("clap", Clap, lambda batch: {"input_features": noise(batch, 1, 256, 16)}),
    )
}
METHODS = {
    "lora": LoRA(at=("attention.*", "mlp.*"), rank=2),
    "bottleneck": Bottleneck.houlsby(4),
    "prefix": Prefix(tokens=3),
    "gated_prefix": Prefix(tokens=3, gated=True),
    "prompt": Prompt(tokens=3, deep=True),
    "tuning": NormTuning() + BitFit() + Head(),
}
REFUSED = {
    ("conformer", "prompt"): "its blocks convolve neighbouring frames",
    ("wav2vec2_bert", "prompt"): "its blocks convolve neighbouring frames",
    ("clap", "prefix"): "computes its softmax itself",
    ("clap", "prompt"): "windows of a fixed grid",
}
PROMISES = ("untouched", "gradients", "save_load", "detach", "route_base", "deepcopy")
UNABLE = {
    # batch norms inside its blocks: in training, the rows of a batch are no strangers to one another
    *(("conformer", method, "route_base") for method in METHODS),
    ("conformer", "tuning", "gradients"),  # it has a positional convolution that it never runs
    ("clap", "tuning", "route_base"),  # torch's batch norm has wrong gradients on the CPU for mixed memory formats
}
WAVLM_PROMISES = ("identity", "composition", "route", "merge", "bf16")


def promises() -> list[Any]:
    every = [(model, method, check) for model in MODELS for method in METHODS for check in PROMISES]
    every += [("wavlm", method, check) for method in ("lora", "tuning") for check in WAVLM_PROMISES]
    every += [("wavlm", method, check) for method in ("prefix", "prompt") for check in ("route", "bf16", "together")]
    every += [("wavlm", method, "compiles") for method in ("lora", "prefix")]
    first = ("wavlm", "clap")  # the ones built unlike wav2vec 2.0
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell[0] in first and cell[2] != "compiles" else [SLOW])
        for cell in every
        if cell[:2] not in REFUSED and cell not in UNABLE
    ]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("model", "method", "check"), promises())
def test_promise(model: str, method: str, check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    variant = Variant(method, method, lambda family: METHODS[method])
    CHECKS[check](Case.of(variant, MODELS[model], lambda: tmp_path_factory.mktemp("case")))


@pytest.mark.parametrize(("model", "method"), REFUSED)
def test_what_has_no_place_is_refused(model: str, method: str) -> None:
    base = MODELS[model].model()
    with pytest.raises(UnsupportedError, match=REFUSED[model, method]):
        epitaxy.attach(base, METHODS[method])
    assert not epitaxy.adapters(base)


@pytest.mark.parametrize("model", MODELS)
def test_roles(model: str) -> None:
    """Every block has its parts, each as wide as the block: CLAP's widths differ from stage to stage."""
    base = MODELS[model].model()
    roles = describe(base).roles
    count = len(roles["block"])
    assert count == 2
    for role in ("attention", "attention.q", "attention.output", "mlp", "mlp.up", "norm.attention", "norm.mlp"):
        assert len(roles[role]) == count, role
    adapter = epitaxy.attach(base, Bottleneck(at=("attention", "mlp"), bottleneck=3, order="sequential"))
    widths = [edit.module.up.out_features for edit in adapter.edits]
    assert widths == ([16, 16, 32, 32] if model == "clap" else [32] * 4)
    assert {spot.heads for spot in roles["block"]} == ({2, 4} if model == "clap" else {2})


def test_wavlm_under_a_mask_is_as_torch_computes_it() -> None:
    """Nothing changes while an adapter is fresh, and what the mask hides has no influence beside a prefix either."""
    model = MODELS["wavlm"].model()
    layer = model.get_submodule("wavlm.encoder.layers.0.attention")
    hidden, mask = noise(2, 9, 32), ragged(2, 9, left=False)
    base = layer(hidden, attention_mask=mask)[0]
    epitaxy.attach(model, METHODS["lora"], name="lora")
    assert torch.equal(layer(hidden, attention_mask=mask)[0], base)
    for parameter in epitaxy.attach(model, METHODS["prefix"], name="prefix").parameters():
        nn.init.normal_(parameter)
    prefixed = layer(hidden, attention_mask=mask)[0]
    assert not torch.allclose(prefixed, base, atol=1e-3)
    hidden[1, 8] = 100.0
    torch.testing.assert_close(layer(hidden, attention_mask=mask)[0][:, :8], prefixed[:, :8])


@pytest.mark.parametrize("layers", [(0,), (1,)])
@pytest.mark.parametrize("model", ["wavlm", "wavlm_stable"])
def test_wavlm_takes_prompts_in_all_blocks_or_none(model: str, layers: tuple[int, ...]) -> None:
    """Its first block makes one position bias for all: a sequence of another length later on would not fit it."""
    base = MODELS[model].model()
    with pytest.raises(UnsupportedError, match="prompts of wavlm span all its blocks: the first one makes"):
        epitaxy.attach(base, epitaxy.Prompt(tokens=2, layers=layers))
    assert not epitaxy.adapters(base)
    epitaxy.attach(base, epitaxy.Prompt(tokens=2, deep=True, layers=(0, 1)))
    assert MODELS[model].run(base).isfinite().all()


def test_wavlm_gets_its_own_attention_back() -> None:
    model = MODELS["wavlm"].model()
    layers = [module for module in model.modules() if type(module).__name__ == "WavLMAttention"]
    before = [dict(vars(layer)) for layer in layers]
    epitaxy.attach(model, LoRA(rank=2))
    epitaxy.detach(model)
    assert [vars(layer).keys() for layer in layers] == [attributes.keys() for attributes in before]
