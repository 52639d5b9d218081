"""Whisper tiny.en from its package: skipped where the package is not installed."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts.assets.whisper_tiny import PACKAGE, convert, find_weights, read_ctranslate2

from epitaxy.models.opening import InputSize, open_classifier

installed = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} with Whisper's weights is not installed"
)


@installed
@pytest.mark.slow
def test_the_encoder_opens_as_a_classifier_of_short_clips(tmp_path: Path) -> None:
    convert(find_weights(), tmp_path)
    opened = open_classifier(str(tmp_path / "classifier"), ["yes", "no", "up"], size=InputSize(100))
    assert sum(parameter.numel() for parameter in opened.model.encoder.parameters()) == 8_208_384  # type: ignore[union-attr]
    wave = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    features = opened.processor(wave, sampling_rate=16000, return_tensors="pt", padding="max_length", max_length=16000)
    assert features["input_features"].shape == (1, 80, 100)
    with torch.no_grad():
        assert opened.model(**features).logits.shape == (1, 3)
    table = opened.model.encoder.embed_positions.weight  # type: ignore[union-attr]
    half = table.shape[1] // 2  # Whisper's positions are sinusoids, which tells whether the file was read right
    scale = torch.exp(-torch.arange(half) * np.log(10000) / (half - 1))
    angles = torch.arange(1500)[:, None] * scale
    assert torch.allclose(table, torch.cat([angles.sin(), angles.cos()], 1), atol=1e-3)


def test_the_container_is_read_by_its_own_rules(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    entry = text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, array.nbytes) + array.tobytes()
    whole = struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 3, 1) + entry
    (tmp_path / "model.bin").write_bytes(whole + struct.pack("<I", 1) + text("b/weight") + text("a/weight"))
    found = read_ctranslate2(tmp_path / "model.bin")
    assert found.keys() == {"a/weight", "b/weight"}
    assert np.array_equal(found["b/weight"], array)
    (tmp_path / "model.bin").write_bytes(whole[:-3])
    with pytest.raises(SystemExit, match="ends within the array a/weight"):
        read_ctranslate2(tmp_path / "model.bin")
