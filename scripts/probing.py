"""Judging frozen features on a labelled set: a linear probe and the nearest neighbours.

Every seed draws its own three quarters of the training examples.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
NEIGHBOURS = 5
SHARE_DRAWN = 0.75


@dataclass
class Split:
    """Inputs or features, and labels, of one part of a data set."""

    inputs: Tensor
    labels: Tensor


def fit_logistic(inputs: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Weights of a logistic regression, the last row being the bias, which is not penalised."""
    weight = torch.zeros(inputs.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss_with_gradient() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight[:-1] + weight[-1], labels)
        loss = loss + penalty * weight[:-1].square().sum() / 2
        loss.backward()
        return loss.item()

    optimizer.step(loss_with_gradient)
    return weight.detach()


def probe_accuracy(train: Split, val: Split, test: Split) -> float:
    """Logistic regression on standardised features; the penalty is chosen on the validation part."""
    mean, spread = train.inputs.mean(0), train.inputs.std(0) + 1e-6
    for_training, for_val, for_test = ((split.inputs - mean) / spread for split in (train, val, test))
    best_on_val, its_test = -1.0, 0.0
    for penalty in PENALTIES:
        weight = fit_logistic(for_training, train.labels, penalty)
        on_val, on_test = (
            ((inputs @ weight[:-1] + weight[-1]).argmax(1) == labels).float().mean().item()
            for inputs, labels in ((for_val, val.labels), (for_test, test.labels))
        )
        if on_val > best_on_val:
            best_on_val, its_test = on_val, on_test
    return its_test


def neighbour_accuracy(train: Split, test: Split) -> float:
    """Vote of the most similar training examples by cosine, weighted by similarity."""
    similarity = F.normalize(test.inputs, dim=1) @ F.normalize(train.inputs, dim=1).T
    nearest, rows = similarity.topk(NEIGHBOURS)
    votes = torch.zeros(len(test.labels), int(train.labels.max()) + 1)
    votes.scatter_add_(1, train.labels[rows], nearest)
    return (votes.argmax(1) == test.labels).float().mean().item()


def judge(seen: dict[str, Split], seed: int) -> tuple[float, float]:
    """Probe and neighbour accuracy on features, with one draw of the training examples."""
    random = torch.Generator().manual_seed(seed)
    count = len(seen["train"].labels)
    rows = torch.randperm(count, generator=random)[: int(SHARE_DRAWN * count)]
    drawn = Split(seen["train"].inputs[rows], seen["train"].labels[rows])
    return probe_accuracy(drawn, seen["val"], seen["test"]), neighbour_accuracy(drawn, seen["test"])


def show(values: list[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    return f"{100 * statistics.mean(values):5.1f} +- {100 * statistics.stdev(values):.1f}"
