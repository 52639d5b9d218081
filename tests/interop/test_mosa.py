"""State dicts of the released code of MoSA: the mean of the copies, where the published network puts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import epitaxy
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.interop import mosa
from epitaxy.interop.mosa import Published
from tests.interop.bases import photograph
from tests.interop.vision_files import BLOCKS, RANK, VPT, WIDTH, State, draw, renamed, run_blocks, vit, write
from tests.models.vision import build, pictures

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "mosa"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden vectors of mosa are not beside this checkout")
LAYER = "enc.transformer.encoder.layer"


def projection(name: str, shape: tuple[int, int], copies: int, seed: int) -> State:
    """``copies`` of a linear map and a stale merged one; 0: one plain map."""
    if not copies:
        return {f"{name}.weight": draw(*shape, seed=seed), f"{name}.bias": draw(shape[0], seed=seed + 1)}
    found = {}
    for ending in (*(f".{number}" for number in range(copies)), "_merge"):
        seed += 2
        found |= {
            f"{name}{ending}.weight": draw(*shape, seed=seed),
            f"{name}{ending}.bias": draw(shape[0], seed=seed + 1),
        }
    return found


def adapters(down: int = 0, up: int = 3, norm: bool = True, sides: tuple[str, ...] = ("",)) -> State:
    found: State = {}
    for number in range(BLOCKS):
        block = f"{LAYER}.{number}"
        if norm:
            found[f"{block}.adapter_norm.weight"] = 1 + draw(WIDTH, seed=number)
            found[f"{block}.adapter_norm.bias"] = draw(WIDTH, seed=50 + number)
        for position, side in enumerate(sides):
            seed = 1000 * number + 100 * position
            found |= projection(f"{block}.adapter_down{side}", (RANK, WIDTH), down, seed)
            found |= projection(f"{block}.adapter_up{side}", (WIDTH, RANK), up, seed + 40)
    return found


def head(labels: int = 4) -> State:
    return {"head.last_layer.weight": draw(labels, WIDTH, seed=8), "head.last_layer.bias": draw(labels, seed=9)}


def mean(state: State, name: str, leaf: str, merge: str = "mean") -> Tensor:
    """The one tensor that a projection's copies stand for."""
    if f"{name}.{leaf}" in state:
        return state[f"{name}.{leaf}"]
    if merge == "joint":
        return state[f"{name}_merge.{leaf}"]
    parts = [value for key, value in state.items() if key.startswith(f"{name}.") and key.endswith(leaf)]
    assert len(parts) > 1
    return sum(parts[1:], parts[0]) / len(parts)


def branch(state: State, place: str, side: str, x: Tensor, activation: Any, merge: str = "mean") -> Tensor:
    """``U g(D LN(x) + b) + c`` of the merged adapter, from the file's own tensors."""
    if f"{place}.adapter_norm.weight" in state:
        x = F.layer_norm(
            x, x.shape[-1:], state[f"{place}.adapter_norm.weight"], state[f"{place}.adapter_norm.bias"], 1e-6
        )
    maps = [
        [mean(state, f"{place}.adapter_{name}{side}", leaf, merge) for leaf in ("weight", "bias")]
        for name in ("down", "up")
    ]
    return F.linear(activation(F.linear(x, *maps[0])), *maps[1])


def expected(model: Any, state: State, style: str, merge: str = "mean", activation: Any = None) -> Tensor:
    """Logits of the published network, block by block."""

    def block(number: int, module: Any, x: Tensor) -> Tensor:
        place = f"{LAYER}.{number}"
        h = x + module.attention(module.layernorm_before(x))[0]
        if style == "houlsby":
            h = h + branch(state, place, "_attn", h, F.silu, merge)
            h = h + module.mlp(module.layernorm_after(h))
            return h + branch(state, place, "_ffn", h, F.silu, merge)
        y = module.mlp(module.layernorm_after(h))
        if style == "pfeiffer":
            return h + y + branch(state, place, "", y, activation or F.relu, merge)
        return h + y + 0.1 * branch(state, place, "", h, activation or F.gelu, merge)

    features = run_blocks(model, pictures(), block)
    return F.linear(features, state["head.last_layer.weight"], state["head.last_layer.bias"])


CASES: dict[str, tuple[str, State, Published]] = {
    "shared down": ("adaptformer", adapters(), Published()),
    "shared up": ("adaptformer", adapters(down=2, up=0), Published()),
    "both split": ("adaptformer", adapters(down=4, up=2), Published()),
    "joint": ("adaptformer", adapters(down=4, up=2), Published(merge="joint")),
    "Pfeiffer": ("pfeiffer", adapters(), Published(placement="pfeiffer")),
    "Houlsby": ("houlsby", adapters(norm=False, sides=("_attn", "_ffn")), Published()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole", [True, False], ids=["with the base", "alone"])
def test_outputs_are_those_of_the_published_network(case: str, whole: bool, tmp_path: Path) -> None:
    style, own, options = CASES[case]
    model = vit()
    state = {**(renamed(model, VPT) if whole else {}), **own, **head()}
    file = write(tmp_path / "run.pth", {"model": state, "epoch": 99})
    with torch.no_grad():
        wanted = expected(model, state, style, options.merge)
        mosa.load(model, file, "task", options)
        found = model(pixel_values=pictures()).logits
    assert torch.allclose(found, wanted, atol=2e-5)
    base = vit()
    assert (found - F.linear(base.vit(pictures()).last_hidden_state[:, 0], *head().values())).abs().max() > 1e-2
    epitaxy.save(model, tmp_path / "native")
    again = vit()
    epitaxy.load(again, tmp_path / "native")
    assert torch.equal(again(pixel_values=pictures()).logits, found)


def test_plain_adapters_of_that_code_have_relu(tmp_path: Path) -> None:
    model, state = vit(), {**adapters(up=0), **head()}
    with torch.no_grad():
        wanted = expected(model, state, "adaptformer", activation=F.relu)
        epitaxy.load(model, write(tmp_path / "run.pth", state))
        assert torch.allclose(model(pixel_values=pictures()).logits, wanted, atol=2e-5)


def test_a_learned_scale_is_kept(tmp_path: Path) -> None:
    state = {
        **adapters(),
        **{f"{LAYER}.{number}.adapter_scale": torch.tensor([0.3 + number]) for number in range(BLOCKS)},
    }
    model = vit()
    adapter = epitaxy.load(model, write(tmp_path / "run.pth", state))
    assert adapter.method.scale == "learned"
    assert [float(value) for key, value in adapter.tensors().items() if key.endswith(".scale")] == pytest.approx(
        [0.3, 1.3]
    )


def test_some_blocks_only(tmp_path: Path) -> None:
    state = {key: value for key, value in adapters().items() if f"{LAYER}.1." in key}
    adapter = epitaxy.load(vit(), write(tmp_path / "run.pth", state))
    assert adapter.method.layers == (1,)


def test_lora(tmp_path: Path) -> None:
    state: State = {}
    for number in range(BLOCKS):
        for position, letter in enumerate("qv"):
            name = f"{LAYER}.{number}.attn.lora"
            for copy_ in range(2):
                seed = 100 * number + 10 * position + copy_
                state[f"{name}_A_{letter}.{copy_}.weight"] = draw(RANK, WIDTH, seed=seed)
                state[f"{name}_B_{letter}.{copy_}.weight"] = draw(WIDTH, RANK, seed=seed + 5)
            state[f"{name}_A_{letter}_merge.weight"] = draw(RANK, WIDTH, seed=77)
            state[f"{name}_B_{letter}_merge.weight"] = draw(WIDTH, RANK, seed=78)
    model, literal = vit(), vit()
    with torch.no_grad():
        for number, block in enumerate(literal.vit.layers):
            for letter, linear in (("q", block.attention.q_proj), ("v", block.attention.v_proj)):
                name = f"{LAYER}.{number}.attn.lora"
                a, b = (
                    (state[f"{name}_{factor}_{letter}.0.weight"] + state[f"{name}_{factor}_{letter}.1.weight"]) / 2
                    for factor in "AB"
                )
                linear.weight += b @ a
        adapter = epitaxy.load(model, write(tmp_path / "run.pth", state))
        assert torch.allclose(model(pixel_values=pictures()).logits, literal(pixel_values=pictures()).logits, atol=2e-5)
    assert adapter.method == epitaxy.LoRA(rank=RANK, alpha=RANK)


def swin() -> Any:
    return build("swin")


def swin_names(model: Any) -> State:
    """The official code's names; a constant of it beside them."""
    found: State = {}
    state = model.state_dict()
    for key, value in state.items():
        name = key.replace("swin.encoder.", "enc.").replace(
            "swin.embeddings.patch_embeddings.projection", "enc.patch_embed.proj"
        )
        name = name.replace("swin.embeddings.norm", "enc.patch_embed.norm").replace("swin.layernorm", "enc.norm")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("relative_position_bias.relative", "relative").replace("attention.o_proj", "attn.proj")
        if "q_proj" in key:
            name = name.replace("attention.q_proj", "attn.qkv")
            value = torch.cat([state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        if not any(word in key for word in ("k_proj", "v_proj", "classifier", "index")):
            found[name.replace("attention.", "attn.")] = value.clone()
    found["enc.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    found["enc.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return found


def beside(state: State, place: str) -> Any:
    """A hook that adds the published branch to a feed-forward."""

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * branch(state, place, "", args[0], F.gelu)

    return add


def test_swin(tmp_path: Path) -> None:
    model, literal = swin(), swin()
    state = swin_names(model)
    assert "enc.layers.0.downsample.reduction.weight" in state
    assert "enc.layers.1.blocks.0.attn.qkv.bias" in state
    own: State = {}
    for (stage, number), width in {(0, 0): 16, (0, 1): 16, (1, 0): 32}.items():
        place = f"enc.layers.{stage}.blocks.{number}.mlp"
        own |= projection(f"{place}.adapter_down", (RANK, width), 0, 10 * stage + number)
        own |= projection(f"{place}.adapter_up", (width, RANK), 3, 100 + 10 * stage + number)

        literal.swin.encoder.layers[stage].blocks[number].mlp.register_forward_hook(beside(own, place))
    state |= own
    with torch.no_grad():
        wanted = literal(pixel_values=pictures()).logits
        assert (wanted - model(pixel_values=pictures()).logits).abs().max() > 1e-2
        epitaxy.load(model, write(tmp_path / "run.pth", state))
        assert torch.allclose(model(pixel_values=pictures()).logits, wanted, atol=2e-5)


def golden(name: str) -> State:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_model() -> Any:
    """One block of the golden base."""
    base = golden("vit_block")
    width, hidden = base["base.q.weight"].shape[0], base["base.fc1.weight"].shape[0]
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=hidden,
        image_size=16,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    model = transformers.ViTForImageClassification(config).eval().double()
    block: Any = model.vit.layers[0]
    attention, norms = block.attention, (block.layernorm_before, block.layernorm_after)
    places = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "out": attention.o_proj}
    places |= {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2, "norm1": norms[0], "norm2": norms[1]}
    with torch.no_grad():
        for name, module in places.items():
            for leaf in ("weight", "bias"):
                getattr(module, leaf).copy_(base[f"base.{name}.{leaf}"])
    return model


@needs_golden
@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("AdaptFormer.merged_mean", Published(activation="gelu")),
        ("AdaptFormer.train", Published(activation="gelu")),
        ("Pfeiffer.train", Published(placement="pfeiffer")),
        ("Houlsby.train", Published()),
    ],
)
def test_golden_blocks(style: str, options: Published, tmp_path: Path) -> None:
    vectors = golden("vit_block")
    state: State = {}
    for short, long in (("d", "down"), ("u", "up")):
        for letter, leaf in (("w", "weight"), ("b", "bias")):
            sides = {"attn.": "_attn", "ffn.": "_ffn"} if style.startswith("Houlsby") else {"": ""}
            for prefix, side in sides.items():
                state[f"{LAYER}.0.adapter_{long}{side}.{leaf}"] = vectors[f"{style}.ad.{prefix}{short}{letter}"]
    if not style.startswith("Houlsby"):
        for leaf in ("weight", "bias"):
            state[f"{LAYER}.0.adapter_norm.{leaf}"] = vectors[f"base.adapter_norm.{leaf}"]
    model = golden_model()
    adapter = mosa.load(model, write(tmp_path / "run.pth", state), "a", options)
    for piece in adapter.pieces:
        piece.module.double()
    with torch.no_grad():
        found = model.vit.layers[0](vectors["x"])
    assert (found - vectors[f"{style}.y"]).abs().max() < 2e-6


@needs_golden
@pytest.mark.parametrize(("share", "merge"), [("down", "mean"), ("down", "joint"), ("none", "mean")])
def test_golden_merges(share: str, merge: str, tmp_path: Path) -> None:
    vectors = golden("adapter_forward")
    state: State = {f"{LAYER}.0.adapter_norm.{leaf}": vectors[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    for name in ("down", "up"):
        for leaf in ("weight", "bias"):
            key = f"{LAYER}.0.adapter_{name}"
            if share == name:
                state[f"{key}.{leaf}"] = vectors[f"shared_{name}.{leaf}"]
                continue
            for number in range(4):
                state[f"{key}.{number}.{leaf}"] = vectors[f"{name}.{number}.{leaf}"]
            state[f"{key}_merge.{leaf}"] = vectors[f"{name}.merged_joint.{leaf}"]
    reading = mosa.read(write(tmp_path / "run.pth", state), Published(merge=merge))  # type: ignore[arg-type]
    held = {name: named.value for name, named in reading.parts["mlp", 0].items()}
    for name in {"down", "up"} - {share}:
        for leaf in ("weight", "bias"):
            wanted = vectors[f"{name}.merged_{merge}.{leaf}"]
            assert (held[f"module.{name}.{leaf}"] - wanted).abs().max() < 1e-12
    x = F.layer_norm(vectors["x"], vectors["x"].shape[-1:], held["module.norm.weight"], held["module.norm.bias"], 1e-6)
    low = F.gelu(F.linear(x, held["module.down.weight"], held["module.down.bias"]))
    out = 0.1 * F.linear(low, held["module.up.weight"], held["module.up.bias"])
    assert (out - vectors[f"share_{share}.out_merged_{merge}"]).abs().max() < 1e-12


def test_it_is_recognised_and_told(tmp_path: Path) -> None:
    file = write(tmp_path / "run 1.pth", {**adapters(), **head()})
    told = epitaxy.inspect(file)
    assert told.format == "mosa"
    assert told.name == "run_1"
    assert [entry["method"] for entry in told.methods] == ["bottleneck", "head"]
    assert told.methods[0]["bottleneck"] == RANK
    save_file({key: value.contiguous() for key, value in adapters().items()}, tmp_path / "x.safetensors")
    assert epitaxy.inspect(tmp_path / "x.safetensors").format == "mosa"
    wrapped = {f"module.{key}": value for key, value in adapters().items()}
    assert epitaxy.inspect(write(tmp_path / "ddp.pth", {"state_dict": wrapped})).format == "mosa"
    model = vit()
    epitaxy.load(model, file, "a")
    with pytest.raises(EpitaxyError, match="format 'mosa' can be read but not written"):
        epitaxy.save(model, tmp_path / "out", format="mosa")


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base, own = renamed(vit(), VPT), adapters()
    norm, up = f"{LAYER}.1.adapter_norm.weight", f"{LAYER}.1.adapter_up.1"

    def refused(says: str, changes: dict[str, Any], options: Published | None = None, model: Any = None) -> None:
        state = {key: value for key, value in {**base, **own, **changes}.items() if value is not None}
        model = model or vit()
        same = photograph(model)
        with pytest.raises(FormatError, match=says) as caught:
            mosa.load(model, write(tmp_path / "x.pth", state), "a", options)
        assert "\n" not in str(caught.value)
        same()

    refused(r"x.pth: '\S+1.adapter_norm.bias' is there, but not the module.norm.weight", {norm: None})
    refused(r"x.pth: copy 1 is missing beside '\S+1.adapter_up.0.weight'", {f"{up}.weight": None, f"{up}.bias": None})
    refused(r"'\S+1.adapter_up.1.weight' has shape \(2, 2\), expected \(32, 5\)", {f"{up}.weight": torch.zeros(2, 2)})
    refused(r"has shape \(7, 32\), expected \(5, 32\) as", {f"{LAYER}.1.adapter_down.weight": torch.zeros(7, 32)})
    refused(r"'enc.extra' is no name that this format knows", {"enc.extra": torch.zeros(1)})
    refused(r"'head.last_layer.bias' .*|its head has no weight", {"head.last_layer.weight": torch.zeros(4, 32)})
    refused(
        r"made for another base: it has a block 7, this vit has 2 blocks",
        {key.replace(".1.", ".7.", 1): own[key] for key in own if f"{LAYER}.1." in key},
    )
    refused(
        r"made for another base: \S+ has shape \(1, 5, 32\), this model's is \(1, 17, 32\)",
        {"enc.transformer.embeddings.position_embeddings": torch.zeros(1, 5, 32)},
    )
    refused(
        r"made for another base, or the whole model was trained: '\S+1.attn.key.bias' differs",
        {f"{LAYER}.1.attn.key.bias": torch.zeros(32)},
    )
    refused(r"holds NaN or infinite values", {f"{up}.weight": torch.full((32, 5), torch.nan)})
    refused(
        r"merge 'joint' needs the merged tensor of",
        {key: None for key in own if "_merge" in key},
        Published(merge="joint"),
    )
    refused(r"is there beside copies of it", {f"{LAYER}.0.adapter_up.weight": torch.zeros(32, 5)})
    refused(r"adapters and LoRA at once", {f"{LAYER}.0.attn.lora_A_q.weight": torch.zeros(5, 32)})
    refused(
        r"it has a block \(0, 0\), this vit has 2 blocks",
        {"enc.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 2)},
    )


def test_lora_on_the_output_is_refused(tmp_path: Path) -> None:
    state = {
        f"{LAYER}.{n}.attn.lora_{factor}_o.{i}.weight": torch.zeros(*shape)
        for n in range(2)
        for i in range(2)
        for factor, shape in (("A", (5, 32)), ("B", (32, 5)))
    }
    with pytest.raises(FormatError, match="feeds with the attention's input, not its context"):
        epitaxy.load(vit(), write(tmp_path / "x.pth", state))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    import argparse

    file = write(tmp_path / "x.pth", {"model": adapters(), "args": argparse.Namespace(lr=1)})
    with pytest.raises(FormatError, match=r"x.pth: holds argparse.Namespace, and nothing is unpickled; save the state"):
        mosa.load(vit(), file)
