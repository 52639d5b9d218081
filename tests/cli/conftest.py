"""A tiny base, a few pictures, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from epitaxy.cli import main
from tests.data.makers import picture

ODD = '<b>green & "gold"'  # a class name that a careless page would take for markup
COLOURS = {"blue": (40, 40, 200), "red": (200, 40, 40), ODD: (40, 200, 40)}
SIZES = {"train": 8, "val": 4, "test": 5}


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


Epitaxy = Callable[..., Outcome]


@pytest.fixture
def epitaxy(capfd: pytest.CaptureFixture[str]) -> Epitaxy:
    """Run one command in this process."""

    def call(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of a few thousand parameters with its picture processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    folder = tmp_path_factory.mktemp("base") / "tiny-vit"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours in train, val and test."""
    root = tmp_path_factory.mktemp("data") / "colours"
    for part, count in SIZES.items():
        for place, (name, colour) in enumerate(COLOURS.items()):
            for number in range(count):
                seed = 1000 * place + 100 * len(part) + number
                picture(root / part / name / f"{number}.png", colour, seed=seed)
    return root


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """A recipe on the tiny base that learns the colours in a few seconds."""
    file = tmp_path_factory.mktemp("recipes") / "colours.yaml"
    file.write_text(
        f"base: {base}\nmethod: [{{method: lora, rank: 2}}, head]\ndata: {data}\n"
        "train: {epochs: 8, batch: 8, learning_rate: 3e-2, log_every: 2}\nsamples: 6\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The directory of a finished run of the recipe."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    assert main(["train", str(recipe), f"out={out}"]) == 0
    return out


def only_line(text: str) -> str:
    """The one line that ``text`` consists of."""
    lines: Sequence[str] = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]
