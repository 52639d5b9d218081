"""Adapters of other codes on the command line: told, and written as one of ours."""

from __future__ import annotations

from pathlib import Path

import torch

import epitaxy as library
from epitaxy.models.opening import open_classifier
from tests.cli.conftest import Epitaxy
from tests.interop.test_mosa import adapters, head
from tests.interop.vision_files import VPT, renamed, write
from tests.models.test_google_vit import checkpoint
from tests.models.test_vision_backbones import hub_in21k
from tests.models.vision import pictures


def test_a_file_of_mosa_on_a_trunk(epitaxy: Epitaxy, tmp_path: Path) -> None:
    """The head in the file tells how many classes the classifier on the trunk has."""
    _, base = hub_in21k(tmp_path / "base")
    opened = open_classifier(str(base), [f"LABEL_{number}" for number in range(4)])
    file = write(tmp_path / "run.pth", {**renamed(opened.model, VPT), **adapters(), **head()})
    told = epitaxy("inspect", file)
    assert told.code == 0
    assert "mosa" in told.out
    lost = epitaxy("export", file, "--to", "epitaxy", "--out", tmp_path / "own")
    assert lost.code != 0
    assert "name it with --base" in lost.err
    done = epitaxy("export", file, "--to", "epitaxy", "--out", tmp_path / "own", "--base", base)
    assert done.code == 0, done.err
    assert "exact, every value equal" in done.out
    library.load(opened.model, file, "theirs")
    again = open_classifier(str(base), [f"LABEL_{number}" for number in range(4)])
    library.load(again.model, tmp_path / "own")
    with torch.no_grad():
        found, expected = (model(pixel_values=pictures()).logits for model in (again.model, opened.model))
    assert torch.equal(found, expected)


def test_an_adapter_on_an_archive_of_google(epitaxy: Epitaxy, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "ViT.npz", **checkpoint())
    names = [f"LABEL_{number}" for number in range(4)]
    opened = open_classifier(str(tmp_path / "ViT.npz"), names)
    width = opened.model.config.hidden_size
    tensors = {"head.last_layer.weight": torch.ones(4, width), "head.last_layer.bias": torch.ones(4)}
    for number in range(2):
        place = f"enc.transformer.encoder.layer.{number}.attn.lora"
        tensors |= {f"{place}_A_q.weight": torch.ones(3, width), f"{place}_B_q.weight": torch.ones(width, 3)}
    file = write(tmp_path / "run.pth", tensors)
    done = epitaxy("export", file, "--to", "peft", "--out", tmp_path / "peft", "--base", tmp_path / "ViT.npz")
    assert done.code == 0, done.err
    assert "exact, every value equal" in done.out
