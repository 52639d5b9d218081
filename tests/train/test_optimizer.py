"""The optimiser's settings reach it: betas, epsilon, and what decays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epitaxy.core.errors import EpitaxyError
from epitaxy.train.config import TrainConfig
from epitaxy.train.loop import train
from epitaxy.train.session import Session
from tests.train.small import small_run


@pytest.mark.parametrize(("decay", "resting"), [("matrices", {0.0}), ("everything", set())])
def test_settings_reach_the_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: Any, resting: set[float]
) -> None:
    groups: list[dict[str, Any]] = []
    step = Session.step

    def noted(self: Session, batches: Any) -> Any:
        groups.extend(dict(group) for group in self.optimizer.param_groups)
        return step(self, batches)

    monkeypatch.setattr(Session, "step", noted)
    model, adapter, task, splits = small_run(tmp_path / "data")
    config = TrainConfig(steps=1, batch=4, weight_decay=0.1, decay=decay, betas=(0.8, 0.98), epsilon=1e-6)
    train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.98), 1e-6)}
    assert {group["weight_decay"] for group in groups} == {0.1} | resting


def test_betas_are_bounded() -> None:
    with pytest.raises(EpitaxyError, match=r"train.betas lie in \[0, 1\), got \[0.9, 1.0\]"):
        TrainConfig(betas=(0.9, 1.0))
