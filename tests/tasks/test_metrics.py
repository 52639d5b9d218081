"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from epitaxy.core.errors import EpitaxyError
from epitaxy.tasks.metrics import SCALARS, macro_f1, score, unweighted_accuracy
from epitaxy.train.session import check_metric


def test_a_small_case_by_hand() -> None:
    #               predicted: 0, 1, 1, 2, 0
    logits = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    found = score(logits, [0, 1, 2, 2, 1])
    assert found.predictions == [0, 1, 1, 2, 0]
    assert found.targets == [0, 1, 2, 2, 1]
    assert found.confusion == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.unweighted_accuracy == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # class 0: precision 1/2, recall 1; class 1: 1/2, 1/2; class 2: 1, 1/2
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    right = [math.exp(3) / (math.exp(3) + 2), math.exp(2) / (math.exp(2) + 2)]
    wrong = 1 / (math.e + 2)
    losses = [-math.log(right[0]), -math.log(right[1]), -math.log(wrong), -math.log(math.e * wrong), -math.log(wrong)]
    assert found.loss == pytest.approx(sum(losses) / 5)
    assert found.confidences[0] == pytest.approx(right[0])
    assert tuple(found.scalars()) == SCALARS == ("accuracy", "unweighted_accuracy", "macro_f1", "loss")
    assert all(value == getattr(found, name) for name, value in found.scalars().items())


def test_classes_that_never_occur_do_not_count() -> None:
    assert macro_f1(torch.tensor([[2, 0, 0], [0, 3, 0], [0, 0, 0]])) == 1.0
    # class 2 is predicted once, so it occurs: F1 of 4/5, 1 and 0
    assert macro_f1(torch.tensor([[2, 0, 1], [0, 3, 0], [0, 0, 0]])) == pytest.approx((4 / 5 + 1 + 0) / 3)


def test_unweighted_accuracy_is_the_mean_recall_of_the_classes_there_are() -> None:
    # 90 of 100 right in class 0, 1 of 4 in class 1, class 2 is only guessed
    assert unweighted_accuracy(torch.tensor([[90, 0, 10], [3, 1, 0], [0, 0, 0]])) == pytest.approx((0.9 + 0.25) / 2)
    balanced = torch.tensor([[3, 1], [2, 2]])
    assert unweighted_accuracy(balanced) == pytest.approx(5 / 8)  # classes of one size: accuracy itself


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("weighted_accuracy", "accuracy"),
        ("WA", "accuracy"),
        ("UA", "unweighted_accuracy"),
        ("UAR", "unweighted_accuracy"),
    ],
)
def test_other_names_of_metrics_are_told_apart(name: str, meant: str) -> None:
    with pytest.raises(EpitaxyError, match=f"no metric is called '{name}'; did you mean '{meant}'"):
        check_metric(name, SCALARS)
