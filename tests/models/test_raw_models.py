"""Models that read raw sound: an example's scores do not depend on what else is in its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from epitaxy import Head, LoRA, attach
from epitaxy.data.audio.front_end import build
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.audio.waveform import Waveform
from epitaxy.data.splits import Example
from epitaxy.models.opening import InputSize, open_classifier

FAMILIES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}


def sounds() -> list[Example]:
    rng = np.random.default_rng(0)
    shapes = ((16000, 16000), (9000, 8000), (500, 16000), (40000, 22050))
    return [Example(Waveform(rng.normal(0.2, 0.1, n).astype(np.float32), rate), 0, str(n)) for n, rate in shapes]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [True, False])
def test_scores_do_not_depend_on_the_batch(family: str, masked: bool, tmp_path: Any) -> None:
    name = FAMILIES[family]
    norm = {"feat_extract_norm": "layer" if masked else "group"}  # group: statistics over time, padding included
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **norm, initializer_range=0.3)
    getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(tmp_path)
    opened = open_classifier(str(tmp_path), ["one", "two"], size=InputSize(frames=120))
    attach(opened.model, LoRA(rank=2) + Head())
    opened.model.eval()
    front_end = build(AudioSpec(frames=120), opened.processor)
    with torch.no_grad():
        together = opened.model(**front_end.inputs(sounds())).logits
        alone = [opened.model(**front_end.inputs([sound])).logits for sound in sounds()]
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)
    assert together.std(0).min() > 1e-2
    inputs = front_end.inputs(sounds())
    assert ("attention_mask" in inputs) == masked
    assert inputs["input_values"].shape[1] == 19200
