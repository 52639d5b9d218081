"""Official state dicts of PETL-AST and Soft-MoA: what is loaded computes the published outputs, and goes out equal.

The files are put together from the golden vectors under the published names: whole models, in both spellings of the
prefix, with the norms that each method trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epitaxy
from epitaxy import EpitaxyError
from epitaxy.core.host import hosted
from epitaxy.interop import ast_petl
from epitaxy.interop.ast_petl import Published
from epitaxy.interop.ast_petl_base import base_names, base_tensors

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "ast_petl"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="the golden vectors of ast_petl are not beside this checkout"
)
State = dict[str, Tensor]
LAYERS = range(3)


def golden(name: str) -> State:
    """float32, as real files are; the vectors hold nothing finer."""
    return {key: value.float() for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


def model(kind: str = "ast", seed: int = 0) -> nn.Module:
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    cls, folder = {
        "ast": (transformers.ASTForAudioClassification, "backbone"),
        "wav2vec2": (transformers.Wav2Vec2ForSequenceClassification, "backbone_wav2vec2"),
    }[kind]
    try:
        return cls.from_pretrained(GOLDEN / folder, dtype=torch.float32, num_labels=5).eval()
    finally:
        transformers.logging.set_verbosity(quiet)


def below(name: str, prefix: str, keep: Callable[[str], bool] = lambda key: True) -> State:
    """The vectors under ``prefix``, without it."""
    found = {key.removeprefix(prefix): value for key, value in golden(name).items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if keep(key)}


def whole(name: str, own: State, prefixes: tuple[str, ...] = ("model.", ""), folder: str = "backbone") -> State:
    """A state dict of the whole model: base and method under each prefix, prompts and head beside them."""
    head = {f"classification_head.{leaf}": golden(name)[f"head.{leaf}"] for leaf in ("weight", "bias")}
    top = {key: value for key, value in own.items() if "prompt_embeddings" in key}
    trunk = {**golden(f"{folder}/model"), **{key: value for key, value in own.items() if key not in top}}
    return {f"{prefix}{key}": value for prefix in prefixes for key, value in trunk.items()} | top | head


def lora(letters: str, upper: bool) -> State:
    found = below("lora_prompt_prefix", "lora.params.", lambda key: key.removesuffix(".weight")[-1] in letters)
    return {key if upper else key.replace("_Q.", "_q.").replace("_V.", "_v."): value for key, value in found.items()}


def prompts(deep: bool) -> State:
    return below(
        "lora_prompt_prefix", "prompt.", lambda key: key in ("prompt_embeddings", "deep_prompt_embeddings"[: 99 * deep])
    )


def block(kind: str, sides: str, name: str = "adapters") -> State:
    found = below(name, f"params_{kind}.", lambda key: any(f"module_{side}" in key for side in sides.split()))
    counters = {
        key.replace("bnorm.weight", "bnorm.num_batches_tracked"): torch.tensor(7)
        for key in found
        if "bnorm.weight" in key
    }
    return found | counters


def single(found: State) -> State:
    return {key.replace("_module_FFN", "_module"): value for key, value in found.items()}


def mixture(kind: str, side: str | None) -> State:
    found = below("moa", f"{kind}.params.", lambda key: side is None or f"_{side}." in key)
    return found if side is None else {key.replace(f"_{side}.", "."): value for key, value in found.items()}


SCALE = {"lora_scale": 1.0}  # that of the vectors: 8 / 8
CASES: dict[str, tuple[str, Callable[[], State], dict[str, Any], str]] = {
    "LoRA": ("lora_prompt_prefix", lambda: lora("QV", False), SCALE, "lora.main_QV"),
    "LoRA, ablation Q": ("lora_prompt_prefix", lambda: lora("Q", True), SCALE, "lora.ablation.Q"),
    "LoRA, ablation QKVO": ("lora_prompt_prefix", lambda: lora("QKVO", True), SCALE, "lora.ablation.QKVO"),
    "prefix": ("lora_prompt_prefix", lambda: below("lora_prompt_prefix", "prefix.params."), {}, "prefix.ALL"),
    "shallow prompts": ("lora_prompt_prefix", lambda: prompts(False), {}, "prompt.shallow.ALL"),
    "deep prompts": ("lora_prompt_prefix", lambda: prompts(True), {"pool": "prompts"}, "prompt.deep.PROMPTS"),
    "linear probe": ("adapters", dict, {"pool": "cls"}, "base.CLS"),
    "bottleneck Pfeiffer": (
        "adapters",
        lambda: block("bottleneck", "FFN"),
        {},
        "bottleneck.Pfeiffer.parallel.res0.ALL",
    ),
    "bottleneck Houlsby": (
        "adapters",
        lambda: block("bottleneck", "FFN MHSA"),
        {"order": "sequential", "residual": True},
        "bottleneck.Houlsby.sequential.res1.ALL",
    ),
    "bottleneck, ablation": (
        "adapters",
        lambda: single(block("bottleneck", "FFN")),
        {"order": "before", "side": "attention"},
        "ablation.MHSA.sequential.before",
    ),
    "conformer Pfeiffer": ("adapters", lambda: block("conformer", "FFN"), {}, "conformer.Pfeiffer.parallel.res0.ALL"),
    "conformer Houlsby": (
        "adapters",
        lambda: block("conformer", "FFN MHSA"),
        {},
        "conformer.Houlsby.parallel.res0.ALL",
    ),
    "Soft-MoA Houlsby": ("moa", lambda: mixture("soft", None), {}, "soft.Houlsby.both.official"),
    "Soft-MoA Pfeiffer": ("moa", lambda: mixture("soft", "mhsa"), {}, "soft.Pfeiffer.MHSA.official"),
    "Dense-MoA Houlsby": ("moa", lambda: mixture("dense", None), {}, "dense.Houlsby.both.official"),
    "Dense-MoA Pfeiffer": ("moa", lambda: mixture("dense", "ffn"), {"side": "mlp"}, "dense.Pfeiffer.FFN.official"),
}


def state_of(case: str) -> State:
    name, own, _, _ = CASES[case]
    return whole(name, own(), ("",) if "prompts" in case else ("model.", ""))


def written(state: State, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, file)
    else:
        torch.save(state, file)
    return file


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def outgoing(base: nn.Module, folder: Path) -> State:
    target = epitaxy.save(base, folder, format="ast_petl")
    state: State = torch.load(target / "ast_petl.pt", weights_only=True)
    return state


@pytest.mark.parametrize("case", CASES)
def test_the_published_outputs(case: str, tmp_path: Path) -> None:
    """From the file as the published code writes it to its logits, and the same file again."""
    name, _, options, logits = CASES[case]
    state = state_of(case)
    base = model()
    adapter = ast_petl.load(base, written(state, tmp_path / "best.pt"), options=Published(**options))
    assert not adapter.trainable
    with torch.no_grad():
        found = base(golden(name)["input_values"]).logits
    expected = golden(name)[f"{logits}.logits"]
    assert float((found - expected).abs().max()) <= 2e-5
    assert_same(outgoing(base, tmp_path / "again"), state)
    epitaxy.save(base, tmp_path / "ours")
    again = model()
    epitaxy.load(again, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(golden(name)["input_values"]).logits, base(golden(name)["input_values"]).logits)
    assert_same(outgoing(again, tmp_path / "once more"), state)


@pytest.mark.parametrize("sides", ["FFN", "FFN MHSA"])
@pytest.mark.parametrize("kind", ["bottleneck", "conformer"])
def test_adapters_on_wav2vec2(kind: str, sides: str, tmp_path: Path) -> None:
    state = whole("wav2vec2", block(kind, sides, "wav2vec2"), folder="backbone_wav2vec2")
    base = model("wav2vec2")
    ast_petl.load(base, written(state, tmp_path / "best.pt"), options=Published(dead_norm=False))
    with torch.no_grad():
        found = base(golden("wav2vec2")["input_values"]).logits
    which = "Pfeiffer" if sides == "FFN" else "Houlsby"
    expected = golden("wav2vec2")[f"{kind}.{which}.parallel.res0.logits"]
    assert float((found - expected).abs().max()) <= 2e-5
    assert_same(outgoing(base, tmp_path / "again"), state)


def quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("spelling", ["", "_FFN", "_FFN _MHSA"])
def test_convpass_alone(spelling: str, dead: bool, tmp_path: Path) -> None:
    """As an adapter of its own, beside the sub-layer; with the convolution in vain, as released, and as meant."""
    kind = "convpass_official_eval" if dead else "convpass_intended_eval"
    parts = below("modules", f"{kind}.param.")
    ends = spelling.split() or [""]
    own = {
        f"encoder.layer.{layer}.adapter_module{end}.{key}": value * (1 + layer)
        for layer in LAYERS
        for end in ends
        for key, value in parts.items()
    }
    state = whole("adapters", own)
    base = model()
    adapter = ast_petl.load(base, written(state, tmp_path / "best.pt"), options=Published(dead_convolution=dead))
    assert adapter.config[0]["method"] == "convpass"
    assert adapter.config[0]["legacy"] is dead

    literal, x = model(), golden("adapters")["input_values"]

    def beside(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
            u = given[0] if given else None
            assert isinstance(u, Tensor)
            scale = 1 + layer
            low = quick(u @ (scale * parts["adapter_down.weight"]).T + scale * parts["adapter_down.bias"])
            if not dead:
                weight, bias = scale * parts["adapter_conv.weight"], scale * parts["adapter_conv.bias"]
                low = nn.functional.conv1d(low.transpose(1, 2), weight, bias, padding=1).transpose(1, 2)
            own = quick(low) @ (scale * parts["adapter_up.weight"]).T + scale * parts["adapter_up.bias"]
            return (output[0] + own, *output[1:]) if isinstance(output, tuple) else output + own

        return hook

    for layer, block in enumerate(literal.base_model.layers):
        for end, inner in (("_FFN", block.mlp), ("_MHSA", block.attention)):
            if end in ends or (end == "_FFN" and ends == [""]):
                inner.register_forward_hook(beside(layer))
    head = epitaxy.attach(literal, epitaxy.Head(labels=5, pool="all"))
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            getattr(head.edits[0].linear, leaf).copy_(state[f"classification_head.{leaf}"])
        torch.testing.assert_close(base(x).logits, literal(x).logits, rtol=1e-5, atol=2e-5)
        plain = model()
        epitaxy.load(plain, written({key: v for key, v in state.items() if "adapter" not in key}, tmp_path / "p.pt"))
        assert float((base(x).logits - plain(x).logits).abs().max()) > 1e-3
    assert_same(outgoing(base, tmp_path / "again"), state)


def trained(state: State, ending: str) -> list[str]:
    """Change tensors as training would, under both names; returns the short keys."""
    keys = sorted({key.removeprefix("model.") for key in state if key.removeprefix("model.").endswith(ending)})
    for key in keys:
        value = state[key] + torch.randn_like(state[key]) * 2  # further than rounding of differences would bear
        for prefix in ("model.", ""):
            if f"{prefix}{key}" in state:
                state[f"{prefix}{key}"] = value
    return keys


NORMS = (".layernorm_before.weight", ".layernorm_before.bias", ".layernorm_after.weight", ".layernorm_after.bias")


@pytest.mark.parametrize("case", CASES)
def test_trained_norms_are_found(case: str, tmp_path: Path) -> None:
    """Adapters train the norms of their sub-layers, every method the final one; the values come out bit for bit."""
    state = state_of(case)
    for leaf in ("weight", "bias"):
        trained(state, f"layernorm.{leaf}")
    if "Houlsby" in case:
        for ending in NORMS:
            trained(state, ending)
    base = model()
    file = written(state, tmp_path / "best.safetensors")
    adapter = ast_petl.load(base, file, options=Published(**CASES[case][2]))
    norms = next(part for part in adapter.config if part["method"] == "norm_tuning")
    assert set(norms["at"] if isinstance(norms["at"], tuple) else [norms["at"]]) == (
        {"norm"} if "Houlsby" in case else {"norm.final"}
    ) or ("Houlsby" in case and {"norm.attention", "norm.mlp", "norm.final"} == set(norms["at"]))
    assert_same(outgoing(base, tmp_path / "again"), state)


def test_the_side_of_a_mixture_is_told_by_the_norms(tmp_path: Path) -> None:
    for norm, role in (("layernorm_before", "attention"), ("layernorm_after", "mlp")):
        state = whole("moa", mixture("dense", "ffn"))
        for leaf in ("weight", "bias"):
            trained(state, f".{norm}.{leaf}")
        adapter = epitaxy.load(model(), written(state, tmp_path / f"{norm}.bin"))
        assert adapter.config[0]["method"] == "dense_moa"
        assert adapter.config[0]["at"] == role


def test_bitfit(tmp_path: Path) -> None:
    """Biases of linear maps and norms; a file against the base with the same values written in."""
    state = whole("adapters", {})
    short = {key.removeprefix("model.") for key in state if "head" not in key}
    chosen = sorted(key for key in short if key.endswith(".bias") and "patch" not in key)
    for key in chosen:
        value = state[key] + torch.randn_like(state[key])
        state[key] = state[f"model.{key}"] = value
    base, changed = model(), model()
    adapter = epitaxy.load(base, written(state, tmp_path / "best.pth"))
    assert {part["method"] for part in adapter.config} == {"bitfit", "norm_tuning", "head"}
    places = base_tensors(changed, base_names(changed))
    for key in chosen:
        path, leaf = places[key]
        changed.get_submodule(path).get_parameter(leaf).data.copy_(state[key])
    head = epitaxy.attach(changed, epitaxy.Head(labels=5, pool="all"))
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            getattr(head.edits[0].linear, leaf).copy_(state[f"classification_head.{leaf}"])
        x = golden("adapters")["input_values"]
        torch.testing.assert_close(base(x).logits, changed(x).logits, rtol=1e-4, atol=1e-5)
    assert_same(outgoing(base, tmp_path / "again"), state)


def test_an_adapter_of_our_own_goes_out(tmp_path: Path) -> None:
    """As the published class spells it; differences of norms become values."""
    base = model()
    method = epitaxy.LoRA(rank=4) + epitaxy.NormTuning(at="norm.final") + epitaxy.Head(labels=5, pool="all")
    adapter = epitaxy.attach(base, method)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    state = outgoing(base, tmp_path / "out")
    expected = state_of("LoRA")
    assert state.keys() == expected.keys()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    again = model()
    ast_petl.load(again, tmp_path / "out", options=Published(lora_scale=1.0))
    x = golden("adapters")["input_values"]
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, base(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (epitaxy.LoRA(at="mlp.up") + epitaxy.Head(pool="all"), "it has no equal of 'lora'"),
        (epitaxy.LoRA(), "it has no head that pools"),
        (epitaxy.Bottleneck.adaptformer(4) + epitaxy.Head(pool="all"), "it has no equal of 'bottleneck'"),
        (epitaxy.LoRA() + epitaxy.Head(), "it has no equal of 'head'"),
        (epitaxy.Convpass() + epitaxy.Head(pool="all"), "it has no equal of 'convpass'"),
        (epitaxy.Bottleneck(activation="relu") + epitaxy.Head(pool="all"), "it has no equal of 'bottleneck'"),
        (epitaxy.Bottleneck(activation="gelu", scale=2.0) + epitaxy.Head(pool="all"), "it has no equal of 'bottlen"),
        (epitaxy.Prefix(2, gated=True) + epitaxy.Head(pool="all"), "it has no equal of 'prefix'"),
    ],
)
def test_what_the_published_code_has_no_equal_of(method: Any, says: str, tmp_path: Path) -> None:
    base = model()
    epitaxy.attach(base, method)
    with pytest.raises(EpitaxyError, match=says):
        epitaxy.save(base, tmp_path / "out", format="ast_petl")
    assert not (tmp_path / "out").exists()


def spoil(change: Callable[[State], object]) -> State:
    state = state_of("LoRA")
    change(state)
    return state


FIRST = "encoder.layer.0.attention.attention"
SPOILED: dict[str, tuple[Callable[[State], object], str]] = {
    "an unknown key": (lambda state: state.update({"model.encoder.extra": torch.zeros(2)}), "'encoder.extra'"),
    "an unknown method": (
        lambda state: state.update({f"model.{FIRST}.lora_mid_q.weight": torch.zeros(2)}),
        "lora_mid_q.weight'",
    ),
    "one factor": (
        lambda state: [state.pop(f"{prefix}{FIRST}.lora_up_q.weight") for prefix in ("", "model.")],
        "lora_up_q.weight' is missing",
    ),
    "two values of one tensor": (
        lambda state: state.update({f"{FIRST}.lora_up_q.weight": torch.zeros(32, 4)}),
        "its other name hold different values",
    ),
    "another base": (
        lambda state: [
            state.update({f"{prefix}{FIRST}.query.weight": torch.zeros(32, 32)}) for prefix in ("", "model.")
        ],
        "made for another base, or the whole model was trained",
    ),
    "another size": (
        lambda state: [state.update({f"{prefix}{FIRST}.query.weight": torch.zeros(8, 8)}) for prefix in ("", "model.")],
        r"has shape \(8, 8\)",
    ),
    "no numbers": (
        lambda state: (
            [
                state.update({f"{prefix}{FIRST}.lora_up_q.weight": torch.full((32, 4), float("nan"))})
                for prefix in ("model.",)
            ]
            + [state.pop(f"{FIRST}.lora_up_q.weight")]
        ),
        "NaN",
    ),
    "another rank": (
        lambda state: [
            state.update({f"{prefix}encoder.layer.1.attention.attention.lora_down_q.weight": torch.zeros(3, 32)})
            for prefix in ("", "model.")
        ],
        r"has shape \(3, 32\)",
    ),
    "a layer too many": (
        lambda state: state.update({"encoder.layer.7.attention.attention.lora_up_q.weight": torch.zeros(32, 4)}),
        "have no place here, the first is 'encoder.layer.7",
    ),
    "no head weight": (lambda state: state.pop("classification_head.weight"), "classification_head.weight is missing"),
    "half a head": (lambda state: state.pop("classification_head.bias"), "classification_head.bias' is missing"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_files_leave_the_model_alone(what: str, tmp_path: Path) -> None:
    change, says = SPOILED[what]
    file = written(spoil(change), tmp_path / "best.pt")
    base = model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(EpitaxyError, match=says) as caught:
        ast_petl.load(base, file)
    assert str(caught.value).startswith(str(file))
    assert hosted(base) is None
    assert_same(base.state_dict(), before)


def test_positions_that_the_published_code_lost_are_reported(tmp_path: Path) -> None:
    state = state_of("LoRA")
    for prefix in ("model.", ""):
        state[f"{prefix}embeddings.position_embeddings"] = torch.zeros(1, 20, 32)
    with pytest.warns(UserWarning, match="position table .all zero"):
        epitaxy.load(model(), written(state, tmp_path / "best.pt"))


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("harm").write_text, ("done",))

    torch.save({"classification_head.weight": Harmful()}, tmp_path / "best.pt")
    with pytest.raises(EpitaxyError, match="not an adapter in a known format"):
        epitaxy.load(model(), tmp_path / "best.pt")
    with pytest.raises(EpitaxyError, match="not a readable file of plain tensors"):
        ast_petl.load(model(), tmp_path / "best.pt")
    assert not (tmp_path / "harm").exists()


def test_inspecting_needs_no_model(tmp_path: Path) -> None:
    found = epitaxy.inspect(written(state_of("deep prompts"), tmp_path / "best_model.pt"))
    assert (found.format, found.name) == ("ast_petl", "best_model")
    assert found.methods[0]["tokens"] == 4
    assert found.methods[0]["deep"] is True
    assert found.methods[1]["labels"] == 5
    assert found.parameters == 3 * 4 * 32 + 33 * 5
    assert not ast_petl.recognises(written({"weight": torch.zeros(2)}, tmp_path / "other.pt"))


def test_a_file_of_the_trained_tensors_alone(tmp_path: Path) -> None:
    base = set(golden("backbone/model"))
    state = {key: value for key, value in state_of("LoRA").items() if key.removeprefix("model.") not in base}
    loaded = model()
    ast_petl.load(loaded, written(state, tmp_path / "best.pt"), options=Published(lora_scale=1.0))
    with torch.no_grad():
        found = loaded(golden("lora_prompt_prefix")["input_values"]).logits
    assert float((found - golden("lora_prompt_prefix")["lora.main_QV.logits"]).abs().max()) <= 2e-5
