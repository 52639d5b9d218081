"""The shipped audio model carries over to sounds it never heard."""

from __future__ import annotations

import pytest
import torch
from transformers import ASTForAudioClassification

from epitaxy.data.splits import DataSpec, load_splits
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification, Examples

soundfile = pytest.importorskip("soundfile")


@torch.inference_mode()
def pooled(task: Classification, model: torch.nn.Module, examples: Examples, per_class: int) -> torch.Tensor:
    """Features ``classes per_class width``, centred on nothing, scaled to unit length."""
    labels = torch.tensor(list(examples.labels))
    rows = torch.cat([(labels == label).nonzero()[:per_class, 0] for label in range(len(task.classes))])
    batch = task.batch([examples[row] for row in rows.tolist()])
    features = model.audio_spectrogram_transformer(batch["input_values"]).pooler_output
    return torch.nn.functional.normalize(features, dim=1).unflatten(0, (-1, per_class))


@pytest.mark.parametrize("name", ["words-unseen", "instruments-unseen"])
def test_unseen_sounds_lie_nearer_to_their_own_kind_than_with_random_weights(name: str) -> None:
    splits = load_splits(DataSpec(f"builtin:{name}"))
    opened = open_classifier("reference-ast", splits.classes)
    task = Classification(opened, splits.classes)
    untrained = ASTForAudioClassification(opened.model.config)
    scores = []
    for model in (opened.model.eval(), untrained.eval()):
        centres = pooled(task, model, splits.train, 6).mean(1)
        heard = pooled(task, model, splits.test, 4)
        nearest = torch.cdist(heard, centres[None].expand(len(heard), -1, -1)).argmin(-1)
        scores.append((nearest == torch.arange(len(heard))[:, None]).float().mean().item())
    assert scores[0] > scores[1] + 0.15, scores
