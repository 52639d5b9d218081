"""The objective of MoSA against the golden vectors of ``shared/golden/mosa/loss.safetensors`` (float64)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from epitaxy import TwoPass
from epitaxy.tasks.consistency import distance, hidden_distance
from epitaxy.tasks.objective import Scores

FILE = Path(__file__).parents[2].parent / "shared/golden/mosa/loss.safetensors"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is missing")
EXACT = {"atol": 1e-10, "rtol": 1e-9}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """All tensors of the file."""
    return load_file(FILE)


class TwoScores(nn.Module):
    """Scores that a first and a second call return; further calls repeat the second, as a second pass does."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.scores = nn.ParameterList([nn.Parameter(first.clone()), nn.Parameter(second.clone())])
        self.calls = 0

    def forward(self, rows: int) -> Tensor:
        if rows > len(self.scores[0]):
            return torch.cat(list(self.scores))
        self.calls += 1
        return self.scores[min(self.calls, 2) - 1]


@pytest.mark.parametrize("form", ["joint", "decoupled"])
def test_value_and_gradients_of_both_forms(golden: dict[str, Tensor], form: str) -> None:
    model = TwoScores(golden["logits1"], golden["logits2"])
    task = Scores(lambda model, batch: model(len(batch["labels"])), lambda z, b: F.cross_entropy(z, b["labels"]))
    if form == "joint":
        task = Scores(lambda model, batch: model(len(batch["labels"])), task.criterion)
    found = TwoPass(form=form).backward(model, {"labels": golden["target"]}, task)  # type: ignore[arg-type]
    torch.testing.assert_close(found, golden["total"], **EXACT)
    torch.testing.assert_close(model.scores[0].grad, golden["grad_logits1"], **EXACT)
    torch.testing.assert_close(model.scores[1].grad, golden["grad_logits2"], **EXACT)


def test_the_terms(golden: dict[str, Tensor]) -> None:
    p, q = golden["logits1"], golden["logits2"]
    torch.testing.assert_close(F.cross_entropy(p, golden["target"]), golden["ce"], **EXACT)
    torch.testing.assert_close(distance("sym_kl", p, q), golden["sym_kl"], **EXACT)
    assert float(distance("sym_kl", p.float(), q.float())) == pytest.approx(float(golden["sym_kl"]), abs=1e-5)


def test_the_deep_term(golden: dict[str, Tensor]) -> None:
    one, other = list(golden["hidden1"]), list(golden["hidden2"])
    found = 0.01 * hidden_distance(one[:6], other[:6], len(one))
    torch.testing.assert_close(found, golden["deepreg"], **EXACT)
