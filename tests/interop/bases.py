"""The models of the contract, with what PEFT users adapt in them, and a few that are odd for PEFT's ways of naming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import epitaxy
from tests.contract.families import FAMILIES, Family, noise

torch.set_num_threads(2)


class OddNames(nn.Module):
    """Module names that are also names of roles (conv, linear) and endings of one another (mid, block.mid)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6, 8)
        self.mid = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"mid": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3, padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)  # b t c
        x = self.block["mid"](torch.relu(self.mid(self.linear(x))))
        y: Tensor = self.block["conv"](x.transpose(1, 2))
        return y


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


EXTRA = {
    family.name: family
    for family in (
        Family("resnet", resnet, lambda batch: {"pixel_values": noise(batch, 3, 32, 32)}),
        Family("odd names", OddNames, lambda batch: {"x": noise(batch, 3, 16, 16)}),
    )
}
TARGETS = {
    "vit": ["q_proj", "v_proj"],
    "dinov2": ["q_proj", "fc1"],
    "swin": ["q_proj", "v_proj"],
    "ast": ["k_proj", "o_proj"],
    "wav2vec2": ["q_proj", "out_proj", "intermediate_dense"],
    "whisper": ["q_proj", "fc2"],
    "bert": ["query", "value"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "sd15": ["to_q", "to_out.0", "conv1", "conv_shortcut"],
    "plain": ["query", "ff.0"],
    "resnet": ["convolution"],
    "odd names": ["conv", "linear", "mid"],
}
BASES = {name: {**FAMILIES, **EXTRA}[name] for name in TARGETS}


def randomise(named: Any, marker: str = "") -> None:
    """Fill parameters with random numbers large enough to change every output by much."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in named:
        if marker in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def close(found: Tensor, expected: Tensor) -> None:
    """Assert equality up to the rounding of another order of summation."""
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 3e-5 * scale


def differs(found: Tensor, other: Tensor) -> None:
    """Assert a difference far above rounding."""
    assert found.shape != other.shape or float((found - other).abs().max()) > 1e-2 * float(other.abs().max())


@torch.no_grad()
def run(family: Family, model: nn.Module) -> Tensor:
    """The family's output in inference."""
    return family.run(model.eval())


def written_by_peft(
    family: Family, folder: Path, bin_file: bool = False, change: Callable[[Any], None] | None = None, **config: Any
) -> Tensor:
    """Let PEFT make, randomise and save a LoRA; return the output of PEFT's own model with it."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family.name], **config}
    model = peft.get_peft_model(family.model(), peft.LoraConfig(**settings))
    randomise(model.named_parameters(), "lora_")
    randomise(model.named_parameters(), "modules_to_save")
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(str(folder), safe_serialization=not bin_file)
    return run(family, model)


def with_adapter(family: Family, method: Any, name: str = "default") -> nn.Module:
    """A base with a randomised adapter of ours."""
    model = family.model()
    adapter = epitaxy.attach(model, method, name, layout=family.layout)
    randomise(adapter.named_parameters())
    return model


def photograph(model: nn.Module) -> Callable[[], None]:
    """Photograph a model; the returned function asserts that nothing about it has changed since."""

    def look() -> tuple[Mapping[str, Tensor], Any]:
        record = model.__dict__.get("_epitaxy")
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        known = None if record is None else (sorted(record.adapters), record.state.active)
        return {key: value.clone() for key, value in model.state_dict().items()}, (hooks, trained, known)

    weights, rest = look()

    def compare() -> None:
        after, others = look()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[key], weights[key]) for key in weights)
        assert others == rest

    return compare
