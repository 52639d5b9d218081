"""Distributed data parallel on two CPU processes: one adapter, one log, and the same mathematics as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epitaxy.train.checkpoint import FOLDER, PATTERN
from epitaxy.train.loop import METRICS
from tests.train.small import small_data

pytestmark = pytest.mark.slow


def launch(
    folder: Path,
    out: str,
    processes: int,
    dropout: float = 0.0,
    stop: int = 0,
    method: str = "lora",
    objective: str = "plain",
    spoil: int = 0,
) -> list[Any]:
    """Run ``tests.train.two_processes`` and return what each process wrote down."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = [str(folder), out, str(dropout), str(stop), method, objective, str(spoil)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.train.two_processes", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = range(processes) if processes > 1 else ["alone"]
    files = [folder / f"{out}-{rank}.json" for rank in ranks]
    return [] if stop else [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("method", "objective", "spoil"),
    [
        ("lora", "plain", 0),
        ("lora", "plain", 6),
        ("mosa", "plain", 0),
        ("mosa", "decoupled", 0),
        ("mosa", "joint", 0),
        ("mosa", "lazy", 5),
    ],
)
def test_two_processes_train_one_adapter_as_one_process_does(
    method: str, objective: str, spoil: int, tmp_path: Path
) -> None:
    """With ``spoil`` one process meets a loss that is not finite, and both skip the step."""
    small_data(tmp_path / "data")
    first, second = launch(tmp_path, "two", 2, method=method, objective=objective, spoil=spoil)
    (alone,) = launch(tmp_path, "one", 1, method=method, objective=objective, spoil=spoil)
    assert first["skipped"] == second["skipped"] == alone["skipped"] == (1 if spoil else 0)
    assert first == second
    assert [line["step"] for line in first["history"]] == [2, 3, 4, 6, 8]
    assert len((tmp_path / "two" / METRICS).read_text().splitlines()) == 5
    assert len(list((tmp_path / "two" / FOLDER).glob(PATTERN))) == 1
    for key, values in alone["values"].items():
        assert first["values"][key] == pytest.approx(values, abs=2e-5), key
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        for key in ("loss", "grad_norm", "lr"):
            expected = theirs[key] if theirs[key] is None else pytest.approx(theirs[key], rel=1e-3)
            assert ours[key] == expected, key
        assert ours.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "objective", "stop"), [("lora", "plain", 9), ("mosa-own", "plain", 9), ("mosa-own", "decoupled", 18)]
)
def test_two_processes_resume_to_the_same_bits(method: str, objective: str, stop: int, tmp_path: Path) -> None:
    small_data(tmp_path / "data")
    whole = launch(tmp_path, "whole", 2, dropout=0.2, method=method, objective=objective)
    launch(tmp_path, "torn", 2, dropout=0.2, stop=stop, method=method, objective=objective)
    torn = launch(tmp_path, "torn", 2, dropout=0.2, method=method, objective=objective)
    assert torn[0]["resumed_at"] == 3
    for found, expected in zip(torn, whole, strict=True):
        assert {**found, "resumed_at": None} == expected
