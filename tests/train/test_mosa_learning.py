"""What MoSA learns on a real task with a really pretrained base: acceptance tests 16 and 17.

The shipped reference ViT, frozen, at the 48 pixels it was trained at; ten pictures of each class of the shipped emoji,
drawn anew for every seed.  All rows have the same steps, five seeds each, and a learning rate from one list, the better
on validation with the first seed.  A seed means the same pictures in the same order and the same start in every row.
The parts of the same trained MoSA are merged by their mean and by their union.

Gates: MoSA far above the linear probe; non-inferior to the dense adapter by a margin of one point; the union, N times
the change that training expects, below the mean.  The controls print beside it: part of what MoSA gains may come from
the two passes.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from scripts.assets.reference_vit_48 import write

from epitaxy import Bottleneck, Head, MoSA, attach
from epitaxy.core.host import detach
from epitaxy.data.splits import DataSpec, Splits, load_splits
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification
from epitaxy.tasks.two_pass import TwoPass
from epitaxy.train.loop import TrainConfig, train

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2, 3, 4)
CONFIG = TrainConfig(
    steps=300,
    batch=8,
    warmup=0.1,
    evaluate_every=300,
    evaluation_batch=100,
    keep_best=False,
)
RATES = (3e-3, 1e-2)
MARGIN = 1.0  # points that MoSA may be below the dense adapter
FAR = 3.0  # points that MoSA must be above the linear probe
DENSE = Bottleneck(bottleneck=16, activation="gelu", dropout=0.1)
PARTS = MoSA(bottleneck=16, parts=4, scale=1.0, dropout=0.1)
ROWS = {
    "linear probe": (None, None),
    "dense": (DENSE, None),
    "dense + KL": (DENSE, TwoPass(form="joint")),
    "MoSA + KL": (PARTS, TwoPass(form="joint")),
}
UNION = "MoSA + KL, union"


@dataclass(frozen=True)
class Scores:
    """Test accuracy in percent, by row, in the order of the seeds."""

    of: dict[str, list[float]]

    def minus(self, row: str, other: str) -> tuple[float, float]:
        """Mean of the paired differences in points, and its standard error."""
        differences = [a - b for a, b in zip(self.of[row], self.of[other], strict=True)]
        return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5

    def __str__(self) -> str:
        return "\n".join(
            f"{row:18s} {statistics.fmean(values):5.1f} ± {statistics.stdev(values):3.1f}   minus dense + KL "
            "{:+.1f} ± {:.1f}".format(*self.minus(row, "dense + KL"))
            for row, values in self.of.items()
        )


def _test(task: Classification, model: torch.nn.Module, splits: Splits) -> float:
    return 100 * task.evaluate(model, splits.test, 100).accuracy


def _run(row: str, seed: int, rate: float, base: Path, splits: Splits, out: Path) -> tuple[float, dict[str, float]]:
    """Train one row with one seed; its validation score and its test score, of MoSA also the union of its parts."""
    method, objective = ROWS[row]
    if isinstance(method, MoSA):
        method = replace(method, seed=seed)
    torch.manual_seed(seed)
    opened = open_classifier(str(base), splits.classes)
    model, task = opened.model, Classification(opened, splits.classes)
    adapter = attach(model, Head() if method is None else method + Head(), "one")
    config = replace(CONFIG, seed=seed, learning_rate=rate)
    data = (splits.train, splits.validation)
    result = train(model, adapter, task, *data, config, out, objective, progress=False)
    validated = next(line["validation_accuracy"] for line in result.history if "validation_accuracy" in line)
    found = {row: _test(task, model, splits)}
    if isinstance(method, MoSA):
        trained = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
        detach(model, "one")
        union = attach(model, replace(method, merge="union") + Head(), "one")
        fresh = union.tensors()
        assert fresh.keys() == trained.keys()
        with torch.no_grad():
            for name, tensor in fresh.items():
                tensor.copy_(trained[name])
        found[UNION] = _test(task, model.eval(), splits)
    return validated, found


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    folder = tmp_path_factory.mktemp("learning")
    write(folder / "base")
    data = [load_splits(DataSpec("builtin:emoji-unseen", shots=10, shots_seed=seed)) for seed in SEEDS]
    found: dict[str, list[float]] = {row: [] for row in (*ROWS, UNION)}
    for row in ROWS:
        tried = {rate: _run(row, SEEDS[0], rate, folder / "base", data[0], folder / f"{row}-{rate}") for rate in RATES}
        rate = max(RATES, key=lambda one: tried[one][0])
        runs = [tried[rate]]
        for seed, splits in zip(SEEDS[1:], data[1:], strict=True):
            runs.append(_run(row, seed, rate, folder / "base", splits, folder / f"{row}-{seed}"))
        for _, scores_of in runs:
            for name, score in scores_of.items():
                found[name].append(score)
    return Scores(found)


def test_mosa_learns_as_a_dense_adapter_does(scores: Scores, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nTen pictures of each of ten things, test accuracy in percent over {len(SEEDS)} seeds\n{scores}")
    above, error = scores.minus("MoSA + KL", "linear probe")
    assert above > FAR
    assert above > 3 * error
    assert scores.minus("MoSA + KL", "dense")[0] > -MARGIN


def test_the_union_of_parts_scores_below_their_mean(scores: Scores) -> None:
    """A part is trained to act alone at its full strength: all of them at once are N times what training expects."""
    difference, error = scores.minus("MoSA + KL", UNION)
    assert difference > 2 * error
    assert difference > 0
