"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from epitaxy.tasks.metrics import macro_f1, score


def test_a_small_case_by_hand() -> None:
    #               predicted: 0, 1, 1, 2, 0
    logits = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    found = score(logits, [0, 1, 2, 2, 1])
    assert found.predictions == [0, 1, 1, 2, 0]
    assert found.targets == [0, 1, 2, 2, 1]
    assert found.confusion == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert found.accuracy == pytest.approx(3 / 5)
    # class 0: precision 1/2, recall 1; class 1: 1/2, 1/2; class 2: 1, 1/2
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    right = [math.exp(3) / (math.exp(3) + 2), math.exp(2) / (math.exp(2) + 2)]
    wrong = 1 / (math.e + 2)
    losses = [-math.log(right[0]), -math.log(right[1]), -math.log(wrong), -math.log(math.e * wrong), -math.log(wrong)]
    assert found.loss == pytest.approx(sum(losses) / 5)
    assert found.confidences[0] == pytest.approx(right[0])
    assert found.scalars() == {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss}


def test_classes_that_never_occur_do_not_count() -> None:
    assert macro_f1(torch.tensor([[2, 0, 0], [0, 3, 0], [0, 0, 0]])) == 1.0
    # class 2 is predicted once, so it occurs: F1 of 4/5, 1 and 0
    assert macro_f1(torch.tensor([[2, 0, 1], [0, 3, 0], [0, 0, 0]])) == pytest.approx((4 / 5 + 1 + 0) / 3)
