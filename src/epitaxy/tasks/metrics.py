"""Metrics of a classifier, from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALARS = ("accuracy", "unweighted_accuracy", "macro_f1", "loss")
OTHER_NAMES = {"wa": "accuracy", "weighted_accuracy": "accuracy", "ua": "unweighted_accuracy"}
OTHER_NAMES |= dict.fromkeys(("uar", "balanced_accuracy", "mean_recall"), "unweighted_accuracy")


@dataclass(frozen=True)
class Metrics:
    """What a classifier scored; the lists run over the examples in the order of the data set.

    ``accuracy`` is the share of examples that are right (weighted accuracy, WA, in work on speech emotion);
    ``unweighted_accuracy`` (UA) the mean of the classes' own shares.  Both and ``macro_f1`` lie in [0, 1]; ``loss`` is
    the mean cross-entropy in nats; ``confusion`` counts examples by [target][prediction]; ``confidences`` are the
    probabilities of the predictions.
    """

    accuracy: float
    unweighted_accuracy: float
    macro_f1: float
    loss: float
    confusion: list[list[int]]
    predictions: list[int]
    targets: list[int]
    confidences: list[float]

    def scalars(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: getattr(self, name) for name in SCALARS}


def score(logits: Tensor, targets: Sequence[int]) -> Metrics:
    """Metrics of ``logits`` (``n classes``) against the true classes."""
    logits, truth = logits.double(), torch.tensor(targets, dtype=torch.long)
    classes = logits.shape[1]
    guesses = logits.argmax(1)
    confusion = torch.bincount(truth * classes + guesses, minlength=classes * classes).view(classes, classes)
    return Metrics(
        accuracy=float((guesses == truth).double().mean()),
        unweighted_accuracy=unweighted_accuracy(confusion),
        macro_f1=macro_f1(confusion),
        loss=float(F.cross_entropy(logits, truth)),
        confusion=confusion.tolist(),
        predictions=guesses.tolist(),
        targets=truth.tolist(),
        confidences=logits.softmax(1).amax(1).tolist(),
    )


def unweighted_accuracy(confusion: Tensor) -> float:
    """Mean recall over the classes that occur among the targets, given counts by [target][prediction]."""
    examples = confusion.sum(1).double()
    occurs = examples > 0
    return float((confusion.diagonal().double()[occurs] / examples[occurs]).mean())


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over the classes that occur among targets or predictions, given counts by [target][prediction]."""
    hits = confusion.diagonal().double()
    involved = (confusion.sum(0) + confusion.sum(1)).double()  # true + predicted = 2 TP + FP + FN
    occurs = involved > 0
    return float((2 * hits[occurs] / involved[occurs]).mean())
