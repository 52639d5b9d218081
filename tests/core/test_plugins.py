"""A method from somebody else's package, found by its entry point; and methods that bring a generator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import epitaxy
from epitaxy.core.registry import from_config, method

PLUGIN = '''
"""Scale a sub-layer's output by a learned vector."""

from dataclasses import dataclass

import torch
from torch import nn

from epitaxy.core.edits import Branch
from epitaxy.core.registry import method


class Scaling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * self.scale.to(x.dtype)


@method("scaling", cannot={"merge": "the vector comes after the nonlinearity"})
@dataclass(frozen=True)
class Scaled:
    at: str = "mlp"

    def edits(self, site):
        yield Branch(Scaling(site.require_width()), reads="output")
'''

USE = """
import sys
import torch
import transformers
import epitaxy

config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
)
def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()

assert "scaling" in epitaxy.methods()
Scaled = epitaxy.methods()["scaling"]
model, x = vit(), torch.randn(2, 3, 16, 16)
adapter = epitaxy.attach(model, Scaled() + epitaxy.LoRA(), name="theirs")
for parameter in adapter.parameters():
    torch.nn.init.normal_(parameter)
y = model(pixel_values=x).logits
epitaxy.save(model, sys.argv[1])
other = vit()
epitaxy.load(other, sys.argv[1])
assert torch.equal(other(pixel_values=x).logits, y)
"""

USE_WITHOUT = """
import sys
import epitaxy
import torch, transformers

config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
)
torch.manual_seed(0)
try:
    epitaxy.load(transformers.ViTForImageClassification(config), sys.argv[1])
except epitaxy.EpitaxyError as error:
    print(error)
"""


def run(script: str, path: Path, argument: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{script}"
    done = subprocess.run([sys.executable, "-c", code, str(argument)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_from_another_package(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    (site / "their_package-1.0.dist-info").mkdir(parents=True)
    (site / "their_method.py").write_text(PLUGIN)
    (site / "their_package-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n"
    )
    (site / "their_package-1.0.dist-info" / "entry_points.txt").write_text(
        "[epitaxy.methods]\nscaling = their_method\n"
    )
    run(USE, site, tmp_path / "adapter")
    assert "no method is called 'scaling'" in run(USE_WITHOUT, tmp_path, tmp_path / "adapter")


def test_two_methods_of_one_name() -> None:
    from dataclasses import dataclass

    with pytest.raises(epitaxy.EpitaxyError, match="two methods are called 'lora'"):

        @method("lora")
        @dataclass(frozen=True)
        class Other:
            at: str = "mlp"

            def edits(self, site: object) -> list[object]:
                return []

    with pytest.raises(epitaxy.EpitaxyError, match="must be a frozen dataclass"):

        @method("nothing")
        class Nothing:
            pass


def test_methods_go_to_plain_data_and_back() -> None:
    for name, cls in epitaxy.methods().items():
        assert from_config({"method": name}) == cls()
    both = epitaxy.LoRA(rank=2) + epitaxy.BitFit()
    assert (
        from_config([{"method": "lora", "rank": 2, "at": ["attention.q", "attention.v"]}, {"method": "bitfit"}]) == both
    )
    assert (both + epitaxy.Head()).parts[-1] == epitaxy.Head()
    with pytest.raises(epitaxy.EpitaxyError, match="the key 'method'"):
        from_config({"rank": 2})
    with pytest.raises(epitaxy.EpitaxyError, match="at least one method"):
        from_config([])


def test_a_generator_belongs_to_the_adapter(tmp_path: Path) -> None:
    """A method may bring a network that binds tensors to its edits; it trains, saves and loads with the adapter."""
    import transformers

    from tests.core.generating import Generated

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    adapter = epitaxy.attach(model, Generated(), name="a")
    keys = [key for key, _ in adapter.named_parameters()]
    assert any("generator" in key for key in keys)
    context, pixels = torch.randn(2, 8), torch.randn(2, 3, 16, 16)
    generator = next(piece.module for piece in adapter.pieces if piece.slot_key.endswith("generator"))
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter)
    generator.bind(adapter, context)  # type: ignore[operator]
    logits = model(pixel_values=pixels).logits
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    swapped = model(pixel_values=pixels.flip(0)).logits.flip(0)
    assert not torch.allclose(logits, swapped)  # every row has the change of its own context
    epitaxy.save(model, tmp_path / "a")
    torch.manual_seed(0)
    again = transformers.ViTForImageClassification(config).eval()
    loaded = epitaxy.load(again, tmp_path / "a")
    twin = next(piece.module for piece in loaded.pieces if piece.slot_key.endswith("generator"))
    twin.bind(loaded, context)  # type: ignore[operator]
    assert torch.equal(again(pixel_values=pixels).logits, logits)
    with pytest.raises(epitaxy.EpitaxyError, match="needs a context"):
        epitaxy.merge(model)
