"""Folded models: a stock class without adapters that computes what the adapted model computes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

import epitaxy
from epitaxy import BitFit, Bottleneck, Conformer, EpitaxyError, Head, LoRA, MoSA, MoSALoRA, NormTuning, Prefix
from epitaxy.core.fold import fold_obstacle
from tests.contract.families import FAMILIES, NO_DROPOUT, Family, PlainTransformer, noise

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mosa"
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def adapted(family: Family, method: Any, name: str = "a", spread: float = 0.3) -> nn.Module:
    """A model with an adapter away from its start."""
    torch.manual_seed(3)
    model = family.model()
    adapter = epitaxy.attach(model, method, name=name, layout=family.layout)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter) * spread)
    return model


def hooks(model: nn.Module) -> list[str]:
    """The modules that hooks come from; transformers hangs some of its own on a model that runs."""
    found = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    found += [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook.__module__ for hook in found]


def assert_plain(folded: nn.Module, model: nn.Module) -> None:
    """The class of the model, and nothing of ours in it."""
    assert type(folded) is type(model)
    assert not any(source.startswith("epitaxy") for source in hooks(folded))
    assert any(source.startswith("epitaxy") for source in hooks(model))
    assert not any("epitaxy" in path.split(".") for path, _ in folded.named_modules())
    assert epitaxy.adapters(folded) == {}
    assert not any(key.startswith("_epitaxy") for key in folded.__dict__)


def assert_strict(folded: Any, folder: Path) -> Any:
    """What the stock class makes of the saved files, every key used and none missing."""
    folded.save_pretrained(folder)
    again, told = type(folded).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    plain = {key: tuple(value.shape) for key, value in type(folded)(folded.config).state_dict().items()}
    assert plain == {key: tuple(value.shape) for key, value in folded.state_dict().items()}
    return again.eval()


READS: dict[str, Any] = {
    "stream": Bottleneck.adaptformer(5, scale="learned"),
    "sublayer": Bottleneck(bottleneck=5, activation="gelu", scale=0.7),
}


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        *itertools.product(("vit", "swin", "ast", "whisper"), READS),
        ("bert", "sublayer"),
        ("wav2vec2", "sublayer"),
    ],
)
@torch.no_grad()
def test_a_folded_model_is_the_stock_class(name: str, reads: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = adapted(family, READS[reads])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = family.run(model)
    folded = epitaxy.fold(model)
    assert_plain(folded, model)
    assert family.run(family.model()).sub(expected).abs().max() > 1e-3, "the adapter does nothing"
    torch.testing.assert_close(family.run(folded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.run(assert_strict(folded, tmp_path)), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(family.run(model), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", MoSA.adaptformer(6)),
        ("vit", MoSA.adaptformer(6, partition="out_slice") + MoSALoRA(rank=4) + Head(labels=5)),
        ("vit", MoSA(bottleneck=6, split="both", partition="column", bias="parts", scale="learned", norm="none")),
        ("vit", MoSA(bottleneck=8, partition="rank_slice", active="bernoulli", coefficients=True)),
        ("swin", MoSA.swin(6)),
        ("ast", MoSA.adaptformer(6)),
    ],
)
@torch.no_grad()
def test_parts_fold_merged(name: str, method: Any, tmp_path: Path) -> None:
    """A mixture of sparse adapters, also while it is in training mode, folds as the adapter it merges into."""
    family = FAMILIES[name]
    model = adapted(family, method)
    expected = family.run(model)
    assert fold_obstacle(method) is None
    folded = epitaxy.fold(model.train()).eval()
    assert_plain(folded, model)
    torch.testing.assert_close(family.run(folded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.run(assert_strict(folded, tmp_path)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_config_of_whole_ratios_gets_the_next_one(tmp_path: Path) -> None:
    """DINOv2's; the scale of its layers comes after the feed-forward and stays."""
    family = FAMILIES["dinov2"]
    model = adapted(family, READS["stream"])
    expected = family.run(model)
    with pytest.warns(
        UserWarning, match=r"Dinov2Config holds whole numbers as mlp_ratio only, .* get 5 times .* 4.156"
    ):
        folded: Any = epitaxy.fold(model)
    assert folded.config.mlp_ratio == 5
    torch.testing.assert_close(family.run(assert_strict(folded, tmp_path)), expected, atol=1e-5, rtol=1e-5)


def test_the_units_of_a_vit_block() -> None:
    """The matrices of the definition, written out."""
    model: Any = adapted(FAMILIES["vit"], Bottleneck.adaptformer(5))
    block, folded = model.vit.layers[1], epitaxy.fold(model).vit.layers[1]  # type: ignore[union-attr]
    units, norm = epitaxy.adapters(model)["a"].edits[1].module, block.layernorm_after
    w1, b1, w2, b2 = (
        getattr(block.mlp, layer).get_parameter(leaf) for layer in ("fc1", "fc2") for leaf in ("weight", "bias")
    )
    expected = {
        "mlp.fc1.weight": torch.cat([w1 * norm.weight, units.down.weight * units.norm.weight]),
        "mlp.fc1.bias": torch.cat([w1 @ norm.bias + b1, units.down.weight @ units.norm.bias + units.down.bias]),
        "mlp.fc2.weight": torch.cat([w2, 0.1 * units.up.weight], dim=1),
        "mlp.fc2.bias": b2 + 0.1 * units.up.bias,
        "layernorm_after.weight": torch.ones(32),
        "layernorm_after.bias": torch.zeros(32),
    }
    for path, value in expected.items():
        torch.testing.assert_close(folded.get_parameter(path).data, value.detach(), msg=path)


@torch.no_grad()
def test_golden_fold() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    block, wide = load_file(GOLDEN / "vit_block.safetensors"), load_file(GOLDEN / "fold_wide_mlp.safetensors")
    with safe_open(GOLDEN / "vit_block.safetensors", "pt") as file:
        told = file.metadata()
    sizes = {
        "hidden_size": int(told["d"]),
        "intermediate_size": int(told["mlp"]),
        "layer_norm_eps": float(told["ln_eps"]),
    }
    config = transformers.ViTConfig(num_attention_heads=int(told["heads"]), num_hidden_layers=1, image_size=32, **sizes)
    model: Any = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    layer = model.layers[0]
    places = {
        **{
            ours: layer.attention.get_submodule(f"{theirs}_proj")
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        },
        "fc1": layer.mlp.fc1,
        "fc2": layer.mlp.fc2,
        "norm1": layer.layernorm_before,
        "norm2": layer.layernorm_after,
    }
    for name, module in places.items():
        module.load_state_dict({leaf: block[f"base.{name}.{leaf}"] for leaf in ("weight", "bias")})
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(int(told["r"]), scale=float(told["scale"])), name="a")
    units = adapter.edits[0].module.double()
    values = {"down.weight": "dw", "down.bias": "db", "up.weight": "uw", "up.bias": "ub"}
    found = {ours: block[f"AdaptFormer.merged_mean.ad.{theirs}"] for ours, theirs in values.items()}
    units.load_state_dict(found | {f"norm.{leaf}": block[f"base.adapter_norm.{leaf}"] for leaf in ("weight", "bias")})
    folded: Any = epitaxy.fold(model)
    layer = folded.layers[0]
    for name, module in {"fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2, "norm2": layer.layernorm_after}.items():
        for leaf in ("weight", "bias"):
            torch.testing.assert_close(getattr(module, leaf), wide[f"{name}.{leaf}"], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(layer(wide["x"]), wide["y"], atol=1e-10, rtol=1e-9)


@torch.no_grad()
def test_layers_without_an_adapter_get_units_of_zero() -> None:
    family = FAMILIES["vit"]
    model = adapted(family, Bottleneck(bottleneck=5, activation="gelu", layers=(1,)))
    folded: Any = epitaxy.fold(model)
    assert folded.config.intermediate_size == 69
    assert not folded.vit.layers[0].mlp.fc1.weight[64:].any()
    assert not folded.vit.layers[0].mlp.fc2.weight[:, 64:].any()
    torch.testing.assert_close(family.run(folded), family.run(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_swin_takes_the_smallest_ratio_and_is_exact_with_a_reduction() -> None:
    """Stages of 16 and 32: five units more need 4.3125 times in the first, and leave five of zero in the second."""
    model: Any = adapted(FAMILIES["swin"], READS["stream"])
    folded: Any = epitaxy.fold(model)
    assert folded.config.mlp_ratio == 4.3125
    widths = [stage.blocks[0].mlp.fc1.out_features for stage in folded.swin.encoder.layers]
    assert widths == [69, 138]
    last = folded.swin.encoder.layers[1].blocks[0].mlp
    assert not last.fc1.weight[133:].any()
    assert last.fc1.weight[128:133].any()
    exact: Any = epitaxy.fold(adapted(FAMILIES["swin"], Bottleneck(reduction=4, activation="gelu")))
    assert exact.config.mlp_ratio == 4.25
    assert all(stage.blocks[0].mlp.fc1.weight.abs().sum(dim=1).gt(0).all() for stage in exact.swin.encoder.layers)


@torch.no_grad()
def test_what_merges_is_merged_into_the_same_model(tmp_path: Path) -> None:
    """Two bottlenecks, LoRA also on the matrices that grow, biases, norms and a head of other labels."""
    method = (
        Bottleneck.adaptformer(5)
        + Bottleneck(bottleneck=3, activation="gelu", layers=(0,))
        + LoRA(at=("attention.q", "mlp.up", "mlp.down"), rank=2)
        + BitFit()
        + NormTuning()
        + Head(labels=7)
    )
    family = FAMILIES["vit"]
    model = adapted(family, method, spread=0.1)
    expected = family.run(model)
    folded: Any = epitaxy.fold(model, "a")
    assert folded.config.num_labels == 7
    assert folded.config.intermediate_size == 72
    torch.testing.assert_close(family.run(assert_strict(folded, tmp_path)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_adapters_stay_out_and_merged_ones_in() -> None:
    family = FAMILIES["vit"]
    model = adapted(family, LoRA(rank=2), name="merged")
    epitaxy.merge(model, "merged")
    for name in ("wanted", "other"):
        for parameter in epitaxy.attach(model, READS["stream"], name=name).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with pytest.raises(EpitaxyError, match="say which adapter to fold: merged, wanted, other"):
        epitaxy.fold(model)
    with pytest.raises(EpitaxyError, match="'merged' is merged already"):
        epitaxy.fold(model, "merged")
    folded = epitaxy.fold(model, "wanted")
    epitaxy.activate(model, "wanted")
    torch.testing.assert_close(family.run(folded), family.run(model), atol=1e-5, rtol=1e-5)
    assert epitaxy.adapters(model).keys() == {"merged", "wanted", "other"}


@torch.no_grad()
def test_a_route_that_is_on_does_not_matter() -> None:
    family = FAMILIES["vit"]
    model = adapted(family, READS["stream"])
    expected = family.run(model)
    with epitaxy.route(model, ["a", None, "a"]):
        folded = epitaxy.fold(model)
    torch.testing.assert_close(family.run(folded), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_modes_flags_and_types_are_those_of_the_model() -> None:
    model = adapted(FAMILIES["vit"], READS["stream"]).train()
    folded = epitaxy.fold(model)
    assert all(module.training for module in folded.modules())
    assert all(parameter.requires_grad for parameter in folded.parameters())
    half = FAMILIES["vit"].model().bfloat16()
    adapter = epitaxy.attach(half, READS["stream"])
    for parameter in adapter.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    small = epitaxy.fold(half)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    x = {"pixel_values": noise(2, 3, 16, 16).bfloat16()}
    torch.testing.assert_close(small(**x).logits, half(**x).logits, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_model_without_a_config_gets_wider_maps() -> None:
    family = FAMILIES["plain"]
    model = adapted(family, READS["stream"])
    folded: Any = epitaxy.fold(model)
    assert isinstance(folded, PlainTransformer)
    assert [block.ff[0].out_features for block in folded.blocks] == [69, 69]
    torch.testing.assert_close(family.run(folded), family.run(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_tower_of_two_grows() -> None:
    """CLIP's classifier keeps the sizes of its tower of pictures in a config inside its own."""
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_act": "gelu", "projection_dim": 16}
    config = transformers.CLIPConfig(vision_config=vision, num_labels=3)
    torch.manual_seed(0)
    model = transformers.CLIPForImageClassification(config).eval()
    for parameter in epitaxy.attach(model, READS["stream"]).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    folded: Any = epitaxy.fold(model)
    assert folded.config.vision_config.intermediate_size == 69
    assert folded.config.text_config.intermediate_size == config.text_config.intermediate_size
    x = noise(2, 3, 16, 16)
    torch.testing.assert_close(folded(pixel_values=x).logits, model(pixel_values=x).logits, atol=1e-5, rtol=1e-5)


def vit_with(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES, **NO_DROPOUT, **fields)
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("model", "method", "says"),
    [
        (vit_with(), Bottleneck.adaptformer(5, activation="relu"), "its activation is 'relu'.*it has GELUActivation"),
        (vit_with(hidden_act="gelu_new"), READS["stream"], "its activation is 'gelu'.*it has NewGELUActivation"),
        (vit_with(hidden_act="quick_gelu"), READS["stream"], "its activation is 'gelu'.*it has QuickGELUActivation"),
        (vit_with(), Bottleneck.pfeiffer(5), "only a parallel bottleneck without a residual is more hidden units"),
        (vit_with(), Bottleneck(order="before", activation="gelu"), "only a parallel bottleneck without a residual"),
        (vit_with(), Bottleneck(residual=True, activation="gelu"), "only a parallel bottleneck without a residual"),
        (vit_with(), Bottleneck(at="attention", activation="gelu"), "does not stand beside a feed-forward"),
        (vit_with(), Bottleneck(at="mlp.up", activation="gelu"), "does not stand beside a feed-forward"),
        (vit_with(), Bottleneck(norm="layer", activation="gelu"), "it normalises what the feed-forward reads as it is"),
        (vit_with(), Bottleneck(reads="stream", activation="gelu"), "reads the residual stream without a norm"),
        (vit_with(), MoSA.pfeiffer(8), "mosa at .* only a parallel bottleneck without a residual"),
        (vit_with(), READS["stream"] + Conformer(kernel=3), "conformer at .* neither merges nor folds: a gated conv"),
        (vit_with(), READS["stream"] + Prefix(2), "prefix at .* neither merges nor folds"),
        (vit_with(), READS["stream"] + Head(pool="all"), "head at 'classifier' neither merges nor folds"),
        (FAMILIES["bert"].model(), READS["stream"], "it normalises what the feed-forward reads as it is"),
        (FAMILIES["llama"].model(), READS["sublayer"], "no plain linear map with a bias, found one without"),
        (FAMILIES["llama"].model(), READS["stream"], "is no layer norm with weight and bias, found LlamaRMSNorm"),
        (FAMILIES["gpt2"].model(), READS["sublayer"], "no plain linear map with a bias, found Conv1D"),
        (FAMILIES["sd15"].model(), READS["sublayer"], "is not two linear maps with exactly that between them"),
    ],
)
def test_refusals(model: nn.Module, method: Any, says: str) -> None:
    epitaxy.attach(model, method, name="a")
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(EpitaxyError, match=f"^adapter 'a' cannot be folded: .*{says}") as caught:
        epitaxy.fold(model)
    assert ". " not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    epitaxy.detach(model)


def test_another_eps_is_refused_and_a_fresh_adapter_has_the_models() -> None:
    model = vit_with(layer_norm_eps=1e-5)
    adapter = epitaxy.attach(model, READS["stream"])
    assert {edit.module.norm.eps for edit in adapter.edits} == {1e-5}
    adapter.edits[0].module.norm.eps = 1e-6
    with pytest.raises(EpitaxyError, match=r"its norm has the eps 1e-06, expected 1e-05 as in 'vit.layers.0"):
        epitaxy.fold(model)
    assert epitaxy.attach(vit_with(), Bottleneck(norm="layer")).edits[0].module.norm.eps == 1e-6


def test_values_that_are_no_numbers_are_refused() -> None:
    model = vit_with()
    next(epitaxy.attach(model, Bottleneck.adaptformer(5)).parameters()).data[0] = float("nan")
    with pytest.raises(EpitaxyError, match=r"is not folded: bottleneck.mlp.0.module.norm.weight holds NaN"):
        epitaxy.fold(model)


def test_a_config_that_would_no_longer_be_true_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit_with()

    model = Wrapper()
    epitaxy.attach(model, READS["stream"])
    with pytest.raises(EpitaxyError, match="its part 'inner' has one that would no longer be true"):
        epitaxy.fold(model)


class TwoNorms(nn.Module):
    """A block whose attention and feed-forward read one norm: its weights belong to both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 8)
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        summed: Tensor = x + self.mix(n) + self.ff(n)
        return summed


def test_a_norm_with_two_readers_is_refused() -> None:
    roles = {
        "attention": "mix",
        "mlp": "ff",
        "mlp.up": "ff.0",
        "mlp.down": "ff.2",
        "norm.mlp": "norm",
        "norm.attention": "norm",
    }
    model = nn.Sequential(TwoNorms())
    epitaxy.attach(model, READS["stream"], layout=epitaxy.Layout("one norm", roles))
    with pytest.raises(EpitaxyError, match=r"'0.norm' stands before attention and mlp, so its weights cannot be moved"):
        epitaxy.fold(model)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Bottleneck.adaptformer(), None),
        (LoRA() + BitFit() + Head(), None),
        (MoSA.houlsby(8), "mosa: only a parallel adapter"),
        (Bottleneck.pfeiffer(), "bottleneck: only a parallel adapter"),
        (Bottleneck(norm="layer"), "bottleneck: its input is normalised in another way"),
        (LoRA() + Conformer(), "conformer: a gated convolution is not linear"),
    ],
)
def test_a_method_knows_whether_it_can_fold(method: Any, says: str | None) -> None:
    obstacle = fold_obstacle(method)
    assert obstacle is None if says is None else (obstacle or "").startswith(says)


def test_a_copy_of_a_folded_model_is_independent() -> None:
    model = adapted(FAMILIES["vit"], READS["stream"])
    folded = epitaxy.fold(model)
    twin = copy.deepcopy(folded)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in twin.parameters())
    assert all(
        value.data_ptr() not in {other.data_ptr() for other in model.parameters()} for value in folded.parameters()
    )
