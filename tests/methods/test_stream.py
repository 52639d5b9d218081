"""Adapters that read the residual stream, with a norm and a learned scale of their own, against the sums by hand."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

import epitaxy
from epitaxy import Bottleneck, EpitaxyError, Layout
from epitaxy.core.host import hosted
from tests.contract.families import FAMILIES, PLAIN_LAYOUT, PlainTransformer, enable_checkpointing
from tests.methods.test_insertion import SIZES, bert, randomise, vit, whisper

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mosa"


def by_hand(edit: Any, h: Tensor) -> Tensor:
    """``s (U g(D LN(h) + b) + c)``."""
    units, d = edit.module, h.shape[-1]
    n = F.layer_norm(h, (d,), units.norm.weight, units.norm.bias, 1e-6)
    low = F.gelu(n @ units.down.weight.T + units.down.bias)
    return edit.scale * (low @ units.up.weight.T + units.up.bias)


def test_block_of_vit() -> None:
    model = vit()
    block, plain = model.layers[0], copy.deepcopy(model.layers[0])
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(5, dropout=0.0), name="a")
    randomise(adapter)
    x = torch.randn(3, 6, 32)
    h = x + plain.attention(plain.layernorm_before(x))[0]
    expected = plain.mlp(plain.layernorm_after(h)) + by_hand(adapter.edits[0], h) + h
    torch.testing.assert_close(block(x), expected)
    assert adapter.edits[0].scale == 0.1


def test_attention_of_whisper_reads_the_stream() -> None:
    model = whisper()
    block, plain = model.layers[0], copy.deepcopy(model.layers[0])
    adapter = epitaxy.attach(
        model, Bottleneck(at="attention", bottleneck=5, reads="stream", activation="gelu"), name="a"
    )
    randomise(adapter)
    x = torch.randn(3, 6, 32)
    units = adapter.edits[0].module
    h = x + plain.self_attn(plain.self_attn_layer_norm(x))[0] + units.up(F.gelu(units.down(x)))
    feed_forward = plain.fc2(F.gelu(plain.fc1(plain.final_layer_norm(h))))
    torch.testing.assert_close(
        block(x, None)[0] if isinstance(block(x, None), tuple) else block(x, None), h + feed_forward
    )


def test_golden_block() -> None:
    """The block of the reference vectors, in float64."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    tensors = load_file(GOLDEN / "vit_block.safetensors")
    with safe_open(GOLDEN / "vit_block.safetensors", "pt") as file:
        told = file.metadata()
    d, heads, width = int(told["d"]), int(told["heads"]), int(told["mlp"])
    config = transformers.ViTConfig(
        hidden_size=d, num_attention_heads=heads, intermediate_size=width, num_hidden_layers=1, layer_norm_eps=1e-6
    )
    model = transformers.ViTModel(config).double().eval()
    block = model.layers[0]
    places = {
        "q": block.attention.q_proj,
        "k": block.attention.k_proj,
        "v": block.attention.v_proj,
        "out": block.attention.o_proj,
        "fc1": block.mlp.fc1,
        "fc2": block.mlp.fc2,
        "norm1": block.layernorm_before,
        "norm2": block.layernorm_after,
    }
    for name, module in places.items():
        module.load_state_dict({leaf: tensors[f"base.{name}.{leaf}"] for leaf in ("weight", "bias")})
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(int(told["r"])), name="a")
    (edit,) = adapter.edits
    edit.module.double()
    values = {"down.weight": "dw", "down.bias": "db", "up.weight": "uw", "up.bias": "ub"}
    found = {ours: tensors[f"AdaptFormer.merged_mean.ad.{theirs}"] for ours, theirs in values.items()}
    found |= {f"norm.{leaf}": tensors[f"base.adapter_norm.{leaf}"] for leaf in ("weight", "bias")}
    edit.module.load_state_dict(found)
    torch.testing.assert_close(block(tensors["x"]), tensors["AdaptFormer.merged_mean.y"], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("at", ["mlp", "attention"])
@torch.no_grad()
def test_models_that_normalise_after_the_sum_have_no_other_stream(at: str) -> None:
    model, ids = bert(), torch.randint(0, 20, (2, 5))
    for name, reads in (("a", "stream"), ("b", "sublayer")):
        randomise(epitaxy.attach(model, Bottleneck(at=at, bottleneck=4, reads=reads), name=name))  # type: ignore[arg-type]
    outputs = []
    for name in ("a", "b"):
        epitaxy.activate(model, name)
        outputs.append(model(ids).last_hidden_state)
    assert torch.equal(*outputs)


BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 20,
}
OPT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "vocab_size": 20,
    "word_embed_proj_dim": 16,
}


@pytest.mark.parametrize(
    ("make", "stream"),
    [
        (lambda: transformers.BartModel(transformers.BartConfig(**BART)), "fc1"),
        (lambda: transformers.MBartModel(transformers.MBartConfig(**BART)), "final_layer_norm"),
        (lambda: transformers.OPTModel(transformers.OPTConfig(**OPT)), "final_layer_norm"),
        (lambda: transformers.OPTModel(transformers.OPTConfig(do_layer_norm_before=False, **OPT)), "fc1"),
        (lambda: _speech(False), "feed_forward"),
        (lambda: _speech(True), "final_layer_norm"),
        (lambda: _swin(transformers.Swinv2Config, transformers.Swinv2Model), "intermediate"),
        (lambda: _swin(transformers.SwinConfig, transformers.SwinModel), "layernorm_after"),
    ],
)
def test_where_the_stream_enters_is_told_by_the_class(make: Any, stream: str) -> None:
    model = make()
    epitaxy.attach(model, Bottleneck(reads="stream"), name="a")
    found = {spot.stream.rpartition(".")[2] for spot in hosted(model).anatomy.roles["mlp"]}
    assert found == {stream}


def _speech(stable: bool) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        do_stable_layer_norm=stable,
        conv_dim=(8,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer" if stable else "group",
        **SIZES,
    )
    return transformers.Wav2Vec2Model(config)


def _swin(config: Any, model: Any) -> nn.Module:
    made = config(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=4)
    return model(made)  # type: ignore[no-any-return]


def test_windows_do_not_have_the_tokens_as_the_stream_has_them() -> None:
    model = FAMILIES["swin"].model()
    with pytest.raises(EpitaxyError, match=r"^reads: at 'swin.*attention' no norm is known that receives the residual"):
        epitaxy.attach(model, Bottleneck(at="attention", reads="stream"), name="a")
    assert epitaxy.adapters(model) == {}


@pytest.mark.parametrize("at", ["block", "mlp"])
def test_a_place_without_a_known_norm_is_refused(at: str) -> None:
    roles = {role: part for role, part in PLAIN_LAYOUT.roles.items() if role != "norm.mlp"}
    with pytest.raises(EpitaxyError, match=r"no norm is known that receives the residual stream"):
        epitaxy.attach(PlainTransformer(), Bottleneck(at=at, reads="stream"), layout=Layout("no norm", roles))


class After(nn.Module):
    """A block that normalises after its feed-forward, whatever its layout says."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.ff, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        normed: Tensor = self.norm(x + self.ff(x))
        return normed


def test_a_layout_with_norms_after_the_sum() -> None:
    roles = {"attention": "mix", "mlp": "ff", "norm.mlp": "norm"}
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(nn.ModuleList([After()])[0])
    epitaxy.attach(model, Bottleneck(reads="stream"), layout=Layout("wrong", roles))
    with pytest.raises(EpitaxyError, match="the norm that the layout names for this sub-layer did not run before it"):
        model(x)
    epitaxy.detach(model)
    layout = Layout.from_dict(Layout("right", roles, norms="after").to_dict())
    epitaxy.attach(model, Bottleneck(reads="stream"), layout=layout)
    model(x)
    with pytest.raises(EpitaxyError, match="norms of layout 'x': expected one of before, after, either, found 'none'"):
        Layout("x", roles, norms="none")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_learned_scale_is_one_trained_number() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(4, scale="learned"), name="a")
    fixed = epitaxy.attach(model, Bottleneck.adaptformer(4, scale=0.25), name="b")
    randomise(adapter)
    own, other = adapter.tensors(), fixed.tensors()
    assert sorted(set(own) - set(other)) == ["bottleneck.mlp.0.scale", "bottleneck.mlp.1.scale"]
    assert own["bottleneck.mlp.0.scale"].shape == (1,)
    for key, value in own.items():
        (value.fill_(0.25) if key.endswith("scale") else other[key].copy_(value))
    outputs = []
    for name in ("a", "b"):
        epitaxy.activate(model, name)
        outputs.append(model(x).last_hidden_state)
    torch.testing.assert_close(*outputs)


def test_a_learned_scale_starts_at_one_and_gets_a_gradient() -> None:
    model = vit()
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(4, scale="learned"), name="a")
    scales = [value for key, value in adapter.named_parameters() if key.endswith("scale")]
    assert [value.item() for value in scales] == [1.0, 1.0]
    for edit in adapter.edits:
        nn.init.normal_(edit.module.up.weight)
    model(torch.randn(2, 3, 16, 16)).last_hidden_state.pow(3).sum().backward()
    assert all(value.grad is not None and float(value.grad.abs()) > 0 for value in scales)


def test_an_adapter_before_its_sub_layer_cannot_read_the_stream() -> None:
    with pytest.raises(
        EpitaxyError, match=r"reads: 'stream' needs the order 'parallel' or 'sequential', found .*'before'"
    ):
        Bottleneck(order="before", reads="stream")


@pytest.mark.parametrize(("field", "value"), [("reads", "input"), ("norm", "batch")])
def test_unknown_choices_are_refused(field: str, value: str) -> None:
    with pytest.raises(EpitaxyError, match=f"^{field}: expected one of"):
        Bottleneck(**{field: value})  # type: ignore[arg-type]


def test_a_scale_is_a_number_or_learned() -> None:
    with pytest.raises(EpitaxyError, match=r"bottleneck.scale: expected .* found 'trained'"):
        epitaxy.attach(vit(), Bottleneck(scale="trained"))  # type: ignore[arg-type]


def test_routed_rows_read_their_own_stream() -> None:
    model, x = vit(), torch.randn(4, 3, 16, 16)
    for name in ("a", "b"):
        randomise(epitaxy.attach(model, Bottleneck.adaptformer(4), name=name))
        nn.init.normal_(next(epitaxy.adapters(model)[name].parameters()))
    single = {}
    for name in ("a", "b", None):
        epitaxy.activate(model, name)
        single[name] = model(x).last_hidden_state
    rows = ["b", None, "a", "b"]
    with epitaxy.route(model, rows):
        routed = model(x).last_hidden_state
    expected = torch.stack([single[name][row] for row, name in enumerate(rows)])
    torch.testing.assert_close(routed, expected)


def test_checkpointed_blocks_and_bf16_bases() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    adapter = epitaxy.attach(model, Bottleneck.adaptformer(4, scale="learned", dropout=0.0), name="a")
    randomise(adapter)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
            model.train()
        for parameter in adapter.parameters():
            parameter.grad = None
        model(x).last_hidden_state.pow(3).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in adapter.named_parameters()})
    for key in gradients[0]:
        torch.testing.assert_close(gradients[1][key], gradients[0][key], msg=key)
    half = vit().bfloat16()
    epitaxy.attach(half, Bottleneck.adaptformer(4, scale="learned"), name="a")
    half(x.bfloat16()).last_hidden_state.float().sum().backward()
    assert {parameter.dtype for parameter in epitaxy.adapters(half)["a"].parameters()} == {torch.float32}


def test_files_without_the_new_fields_load(tmp_path: Path) -> None:
    """The config and the layout of an adapter saved before they existed."""
    import json

    from safetensors.torch import save_file

    model = PlainTransformer().eval()
    adapter = epitaxy.attach(model, Bottleneck(bottleneck=4), name="a", layout=PLAIN_LAYOUT)
    randomise(adapter)
    epitaxy.save(model, tmp_path / "new", "a")
    file = tmp_path / "new" / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    (mark,) = metadata
    config = json.loads(metadata[mark])
    for field in ("norm", "reads"):
        del config["methods"][0][field]
    del config["layout"]["norms"]
    (tmp_path / "old").mkdir()
    save_file(load_file(file), tmp_path / "old" / "adapter.safetensors", {mark: json.dumps(config)})
    again = PlainTransformer().eval()
    again.load_state_dict({key: value for key, value in model.state_dict().items() if "epitaxy" not in key})
    epitaxy.load(again, tmp_path / "old", "a")
    x = torch.randn(2, 6, 12)
    assert torch.equal(again(x), model(x))


def test_every_layout_knows_what_enters_its_feed_forward() -> None:
    """No family of the contract is left without a stream at the feed-forward."""
    for family, role in itertools.product(FAMILIES.values(), ("mlp",)):
        model = family.model()
        epitaxy.attach(model, Bottleneck(at=role, reads="stream"), name="a", layout=family.layout)
        assert all(spot.stream for spot in hosted(model).anatomy.roles[role]), family.name
