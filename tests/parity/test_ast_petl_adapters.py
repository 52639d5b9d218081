"""Bottleneck, Conformer and Convpass adapters against the official modules, alone and in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import epitaxy
from epitaxy import Bottleneck, Conformer, NormTuning
from epitaxy.methods.bottleneck import TwoLayerMLP
from epitaxy.methods.conformer import ConformerConvolution
from epitaxy.methods.convpass import ConvolutionalBypass
from tests.parity.ast_petl import (
    BACKWARD,
    BOTTLENECK,
    CONFORMER,
    CONVPASS,
    FORWARD,
    GOLDEN,
    PRECISIONS,
    backbone,
    branches,
    close,
    fill_adapter,
    fill_module,
    golden,
    needs_golden,
    official_prefix,
    under,
)

pytestmark = [needs_golden, pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])]

SIDES: dict[str, Any] = {"Pfeiffer": "mlp", "Houlsby": ("attention", "mlp")}


def conformer(kernel: int, legacy: bool) -> nn.Module:
    return ConformerConvolution(32, 4, 32, kernel, bypass_norm=legacy, zero_init=False)


MODULES: dict[str, tuple[Any, dict[str, str]]] = {
    "bottleneck": (lambda: TwoLayerMLP(32, 4, 32, "gelu", 0.0), BOTTLENECK),
    "conformer_ast_odd_eval": (lambda: conformer(31, legacy=True), CONFORMER),
    "conformer_ast_even_eval": (lambda: conformer(8, legacy=True), CONFORMER),
    "conformer_ast_even_train": (lambda: conformer(8, legacy=True), CONFORMER),
    "conformer_w2v_odd_eval": (lambda: conformer(31, legacy=False), CONFORMER),
    "conformer_w2v_even_eval": (lambda: conformer(8, legacy=False), CONFORMER),
    "conformer_w2v_even_train": (lambda: conformer(8, legacy=False), CONFORMER),
    "convpass_official_eval": (lambda: ConvolutionalBypass(32, 4, 32, dead=True), CONVPASS),
    "convpass_intended_eval": (lambda: ConvolutionalBypass(32, 4, 32), CONVPASS),
}
OWN = ("bottleneck", "conformer_", "convpass_")


def cases(name: str, ending: str) -> list[str]:
    """The golden cases of our modules; empty where the golden vectors are absent."""
    if not GOLDEN.is_dir():
        return []
    return sorted(key.removesuffix(ending) for key in golden(name) if key.endswith(ending) and key.startswith(OWN))


def test_every_golden_module_is_compared(dtype: torch.dtype) -> None:
    assert [name for name in cases("modules", ".out") if name not in MODULES and "w2v" not in name] == []


@pytest.mark.parametrize("case", [name for name in MODULES if not GOLDEN.is_dir() or name in cases("modules", ".out")])
def test_module(case: str, dtype: torch.dtype) -> None:
    make, names = MODULES[case]
    module = make().to(dtype).train(case.endswith("_train"))
    fill_module(module, under(f"{case}.param.", "modules"), names)
    x = golden("modules")["z"].detach().to(dtype, copy=True).requires_grad_()
    output = module(x)
    (output * golden("modules")["gout"].to(dtype)).sum().backward()
    close(output, golden("modules")[f"{case}.out"], FORWARD[dtype], "output")
    assert x.grad is not None
    close(x.grad, golden("modules")[f"{case}.grad_in"], BACKWARD[dtype], "gradient of the input")
    compared = assert_gradients(module, under(f"{case}.grad.", "modules"), names, BACKWARD[dtype])
    assert compared == len(list(module.parameters()))
    for key, expected in under(f"{case}.after.bnorm.", "modules").items():
        close(module.inner_norm.get_buffer(key), expected, FORWARD[dtype], key)


def assert_gradients(module: nn.Module, expected: dict[str, Tensor], names: dict[str, str], tolerance: float) -> int:
    """Gradients by official name; what gets none there (stored as zeros) may have none here."""
    for key, gradient in expected.items():
        part, _, leaf = key.rpartition(".")
        parameter = module.get_parameter(f"{names[part]}.{leaf}")
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        close(found.reshape(gradient.shape), gradient, tolerance, f"gradient of {key}")
    return len(expected)


def method(block: str, at: Any, order: Any, residual: bool, legacy: bool) -> Any:
    """The method of one golden case: reduction rate 8, kernel 8."""
    if block == "bottleneck":
        return Bottleneck(at=at, reduction=8, order=order, residual=residual, activation="gelu")
    return Conformer(at=at, reduction=8, kernel=8, order=order, residual=residual, zero_init=False, legacy=legacy)


def logits(model: nn.Module, name: str, pool: str, dtype: torch.dtype) -> Tensor:
    """The golden head on the pooled tokens."""
    weight, bias = (golden(name)[f"head.{key}"].to(dtype) for key in ("weight", "bias"))
    hidden = model(golden(name)["input_values"].to(dtype)).last_hidden_state
    return F.linear(hidden[:, 0] if pool == "CLS" else hidden.mean(dim=1), weight, bias)


def attached(folder: str, name: str, block: str, chosen: Any, dtype: torch.dtype) -> nn.Module:
    """A golden backbone with the golden adapter parameters of ``block``."""
    model = backbone(folder, dtype)
    adapter = epitaxy.attach(model, chosen, name="a")
    model.to(dtype)
    fill_adapter(adapter, under(f"params_{block}.", name), BOTTLENECK if block == "bottleneck" else CONFORMER)
    return model


@pytest.mark.parametrize("case", cases("adapters", ".logits"))
def test_adapter_in_ast(case: str, dtype: torch.dtype) -> None:
    block, kind, order, residual, pool = case.split(".")
    chosen = method(block, SIDES[kind], order, residual == "res1", legacy=True)
    model = attached("backbone", "adapters", block, chosen, dtype)
    with torch.no_grad():
        close(logits(model, "adapters", pool, dtype), golden("adapters")[f"{case}.logits"], FORWARD[dtype], case)


@pytest.mark.parametrize("side", ["FFN", "MHSA"])
@pytest.mark.parametrize(
    ("pattern", "order", "residual"),
    [
        ("parallel.before", "parallel", False),
        ("parallel.after", "sequential", True),
        ("sequential.before", "before", False),
        ("sequential.after", "sequential", True),
    ],
)
def test_ablation_in_ast(side: str, pattern: str, order: Any, residual: bool, dtype: torch.dtype) -> None:
    model = backbone("backbone", dtype)
    chosen = method("bottleneck", "mlp" if side == "FFN" else "attention", order, residual, legacy=True)
    adapter = epitaxy.attach(model, chosen, name="a")
    model.to(dtype)
    fill_adapter(adapter, under("params_bottleneck.", "adapters"), BOTTLENECK, mhsa="adapter_module_FFN")
    expected = golden("adapters")[f"ablation.{side}.{pattern}.logits"]
    with torch.no_grad():
        close(logits(model, "adapters", "ALL", dtype), expected, FORWARD[dtype], pattern)


@pytest.mark.parametrize("case", cases("wav2vec2", ".logits"))
def test_adapter_in_wav2vec2(case: str, dtype: torch.dtype) -> None:
    block, kind, order, residual = case.split(".")
    chosen = method(block, SIDES[kind], order, residual == "res1", legacy=False)
    model = attached("backbone_wav2vec2", "wav2vec2", block, chosen, dtype)
    with torch.no_grad():
        close(logits(model, "wav2vec2", "ALL", dtype), golden("wav2vec2")[f"{case}.logits"], FORWARD[dtype], case)


@pytest.mark.parametrize("case", ["conformer.Pfeiffer", "bottleneck.Houlsby"])
def test_training_step(case: str, dtype: torch.dtype) -> None:
    """One step of AdamW with weight decay on everything, on the values of the trained norms themselves."""
    block, kind = case.split(".")
    names = BOTTLENECK if block == "bottleneck" else CONFORMER
    norms = ("norm.mlp", "norm.attention", "norm.final") if kind == "Houlsby" else ("norm.mlp", "norm.final")
    model = backbone("backbone", dtype)
    chosen = method(block, SIDES[kind], "parallel", False, legacy=True) + NormTuning(at=norms, legacy=True)
    adapter = epitaxy.attach(model, chosen, name="a")
    model.to(dtype)
    fill_adapter(adapter, under(f"{case}.params.", "training_step"), names)
    head = nn.Linear(32, 5, dtype=dtype)
    head.load_state_dict({key: golden("training_step")[f"head.{key}"] for key in ("weight", "bias")})

    def predict() -> Tensor:
        hidden = model(golden("training_step")["input_values"].to(dtype)).last_hidden_state
        return head(hidden.mean(dim=1))

    trained = [*adapter.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=0.005, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    model.train()
    loss = F.cross_entropy(predict(), golden("training_step")["labels"].long())
    loss.backward()
    close(loss, golden("training_step")[f"{case}.loss"].reshape(()), FORWARD[dtype], "loss")
    official = official_names(adapter, head, names)
    gradients = under(f"{case}.grad.", "training_step")
    for key, expected in gradients.items():
        tensor = official[key]
        found = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        close(found.reshape(expected.shape), expected, BACKWARD[dtype], f"gradient of {key}")
    assert {key for key, tensor in official.items() if tensor.requires_grad} == set(gradients)
    optimiser.step()
    after = under(f"{case}.after.", "training_step")
    for key, expected in after.items():
        close(official[key].reshape(expected.shape), expected, BACKWARD[dtype], f"{key} after the step")
    assert official.keys() == after.keys()
    model.eval()
    with torch.no_grad():
        close(predict(), golden("training_step")[f"{case}.logits_after_eval"], BACKWARD[dtype], "logits after the step")


def official_names(adapter: epitaxy.Adapter, head: nn.Linear, names: dict[str, str]) -> dict[str, Tensor]:
    """Every trained tensor and running statistic by its official name."""
    official = {f"classification_head.{key}": value for key, value in head.named_parameters()}
    theirs = {ours: name for name, ours in names.items()}
    stem = {"encoder.layer.0.adapter_module_FFN.x": torch.empty(0)}
    for side, piece in branches(adapter):
        prefix = official_prefix(stem, piece.path, f"adapter_module_{'MHSA' if side == 'attention' else 'FFN'}")
        for key, tensor in piece.module.module.state_dict(keep_vars=True).items():
            part, _, leaf = key.rpartition(".")
            official[f"model.{prefix}{theirs[part]}.{leaf}"] = tensor
    for piece in adapter.pieces:
        if piece.part == "norm_tuning":
            path = piece.path.replace("layers.", "encoder.layer.")
            official.update({f"model.{path}.{key}": value for key, value in piece.module.named_parameters()})
    return official
