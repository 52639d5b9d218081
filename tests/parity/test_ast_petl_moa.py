"""Mixtures of adapters against vectors of the published modules, and against the sums written out expert by expert."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import epitaxy
from epitaxy import DenseMoA, SoftMoA
from epitaxy.methods.dense_moa import DenseMixture
from epitaxy.methods.experts import Experts
from epitaxy.methods.mixture import Mixture
from epitaxy.methods.soft_moa import SoftMixture

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "ast_petl"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden vectors are not at {GOLDEN}")

EXPERTS, WIDTH, BOTTLENECK = 3, 32, 4
PRECISIONS = [(torch.float64, 1e-10, 1e-10), (torch.float32, 2e-5, 2e-4)]
STACKED = {  # ours: theirs, and whether a weight lies transposed
    "down": ("linear_downsample.weight", "adapter_down.weight", False),
    "down_bias": ("linear_downsample.bias", "adapter_down.bias", False),
    "up": ("linear_upsample.weight", "adapter_up.weight", True),
    "up_bias": ("linear_upsample.bias", "adapter_up.bias", False),
    "conv": ("", "adapter_conv.weight", False),
    "conv_bias": ("", "adapter_conv.bias", False),
}
SINGLE = {"phi": "slot_params", "scale": "scale", "router": "router.ff.weight", "router_bias": "router.ff.bias"}


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / file)


def stack(found: dict[str, Tensor], name: str, convpass: bool) -> Tensor:
    """A tensor in our layout, of the official ones (names without their case)."""
    if name in SINGLE:
        return found[SINGLE[name]]
    *names, transposed = STACKED[name.removeprefix("experts.")]
    parts = [found[f"moa.{expert}.{names[convpass]}"] for expert in range(EXPERTS)]
    return torch.stack([part.t() if transposed else part for part in parts])


def below(file: str, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors(file).items() if key.startswith(prefix)}


@torch.no_grad()
def fill(mixture: nn.Module, found: dict[str, Tensor], convpass: bool = False) -> None:
    for name, parameter in mixture.named_parameters():
        value = stack(found, name, convpass)
        assert parameter.shape == value.shape, name
        parameter.copy_(value)


def mixture_of(case: str, dtype: torch.dtype, **changed: Any) -> Mixture:
    convpass = "convpass" in case
    experts = Experts(EXPERTS, WIDTH, BOTTLENECK, WIDTH, "convpass" if convpass else "bottleneck", unused_conv=convpass)
    if case.startswith("dense"):
        mixture: Mixture = DenseMixture(experts)
    else:
        fields = {"slots": 2 if "_p2" in case else 1, "normalise": "norm" in case, "published_norm": "norm" in case}
        mixture = SoftMixture(experts, **{**fields, **changed})
    mixture.to(dtype)
    fill(mixture, below("modules.safetensors", f"{case}.param."), convpass)
    return mixture


MODULES = ["densemoa_bottleneck", "densemoa_convpass"] + [
    f"softmoa_{case}"
    for case in (
        "bottleneck_p1",
        "bottleneck_p2",
        "convpass_p1",
        "convpass_p2",
        "bottleneck_p1_norm_official",
        "bottleneck_p2_norm_official",
    )
]


@pytest.mark.parametrize(("dtype", "close", "close_gradient"), PRECISIONS)
@pytest.mark.parametrize("case", MODULES)
def test_modules(case: str, dtype: torch.dtype, close: float, close_gradient: float) -> None:
    golden = tensors("modules.safetensors")
    mixture = mixture_of(case, dtype)
    z = golden["z"].to(dtype, copy=True).requires_grad_(True)
    out = mixture(z)
    assert (out.double() - golden[f"{case}.out"]).abs().max() < close
    (out * golden["gout"].to(dtype)).sum().backward()
    assert z.grad is not None
    assert (z.grad.double() - golden[f"{case}.grad_in"]).abs().max() < close_gradient
    gradients = below("modules.safetensors", f"{case}.grad.")
    for name, parameter in mixture.named_parameters():
        expected = stack(gradients, name, "convpass" in case)
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found.double() - expected).abs().max() < close_gradient, name
    if isinstance(mixture, SoftMixture):
        logits, _ = mixture.logits(z)
        for name, value in zip(("logits", "dispatch", "combine"), (logits, *mixture.weights(logits)), strict=True):
            assert (value.unflatten(2, (EXPERTS, -1)).double() - golden[f"{case}.{name}"]).abs().max() < close, name


@pytest.mark.parametrize("slots", [1, 2])
def test_corrected_normalisation(slots: int) -> None:
    golden = tensors("modules.safetensors")
    case = f"softmoa_bottleneck_p{slots}_norm"
    mixture = mixture_of(f"{case}_official", torch.float64, published_norm=False)
    assert (mixture(golden["z"]) - golden[f"{case}_intended.out"]).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["official", "intended"])
@pytest.mark.parametrize(("dtype", "close", "close_gradient"), PRECISIONS)
def test_convpass_expert(name: str, dtype: torch.dtype, close: float, close_gradient: float) -> None:
    """A mixture of one expert is that expert; the published one leaves its convolution out."""
    golden, case = tensors("modules.safetensors"), f"convpass_{name}_eval"
    mixture = DenseMixture(Experts(1, WIDTH, BOTTLENECK, WIDTH, "convpass", unused_conv=name == "official")).to(dtype)
    inner = {ours: (theirs, transposed) for ours, (_, theirs, transposed) in STACKED.items()}
    for ours, (theirs, transposed) in inner.items():
        value = golden[f"{case}.param.{theirs}"]
        getattr(mixture.experts, ours).data[0] = value.t() if transposed else value
    z = golden["z"].to(dtype, copy=True).requires_grad_(True)
    out = mixture(z)
    assert (out.double() - golden[f"{case}.out"]).abs().max() < close
    (out * golden["gout"].to(dtype)).sum().backward()
    assert z.grad is not None
    assert (z.grad.double() - golden[f"{case}.grad_in"]).abs().max() < close_gradient
    for ours, (theirs, transposed) in inner.items():
        expected, found = golden[f"{case}.grad.{theirs}"], getattr(mixture.experts, ours).grad
        found = torch.zeros_like(expected) if found is None else found[0].double()
        assert (found - (expected.t() if transposed else expected)).abs().max() < close_gradient, ours


PLACES = {"Houlsby.both": ("attention", "mlp"), "Pfeiffer.MHSA": "attention", "Pfeiffer.FFN": "mlp"}


def small_ast(dtype: torch.dtype) -> nn.Module:
    from transformers import ASTModel

    return ASTModel.from_pretrained(GOLDEN / "backbone", dtype=dtype, attn_implementation="sdpa").eval()


def attached(model: nn.Module, kind: str, place: str, legacy: bool) -> epitaxy.Adapter:
    """The mixtures of the golden file on ``model``."""
    fields: dict[str, Any] = {"at": PLACES[place], "experts": EXPERTS, "bottleneck": BOTTLENECK, "legacy": legacy}
    adapter = epitaxy.attach(model, DenseMoA(**fields) if kind == "dense" else SoftMoA(**fields, slots=2))
    for piece in adapter.pieces:
        if piece.key is None:
            continue
        role, layer = piece.key.split(".")[1:3]
        side = {"attention": "mhsa", "mlp": "ffn"}[role]
        prefix = f"{kind}.params.encoder.layer.{layer}."
        found = below("moa.safetensors", f"{prefix}moa_{side}.")
        router = below("moa.safetensors", f"{prefix}router_{side}.")
        mixture = piece.module.module
        assert isinstance(mixture, Mixture)
        fill(mixture, {**found, **{f"router.{key}": value for key, value in router.items()}})
    return adapter


@torch.no_grad()
def logits_of(model: nn.Module, dtype: torch.dtype) -> Tensor:
    golden = tensors("moa.safetensors")
    states = model(input_values=golden["input_values"].to(dtype)).last_hidden_state
    return torch.nn.functional.linear(states.double().mean(1), golden["head.weight"], golden["head.bias"])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["dense", "soft"])
def test_whole_model(kind: str, place: str, dtype: torch.dtype, close: float) -> None:
    golden = tensors("moa.safetensors")
    twice, once = golden[f"{kind}.{place}.official.logits"], golden[f"{kind}.{place}.single_add"]
    for legacy, expected in ((True, twice), (False, once)):
        model = small_ast(dtype)
        attached(model, kind, place, legacy)
        assert (logits_of(model, dtype) - expected).abs().max() < close, legacy
    assert (float((twice - once).abs().max()) > 1e-3) == (place == "Pfeiffer.MHSA")  # what the switch is for
