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
    folder: Path, out: str, processes: int, dropout: float = 0.0, stop: int = 0, method: str = "lora"
) -> list[Any]:
    """Run ``tests.train.two_processes`` and return what each process wrote down."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "tests.train.two_processes",
            str(folder),
            out,
            str(dropout),
            str(stop),
            method,
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = range(processes) if processes > 1 else ["alone"]
    files = [folder / f"{out}-{rank}.json" for rank in ranks]
    return [] if stop else [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("method", ["lora", "mosa"])
def test_two_processes_train_one_adapter_as_one_process_does(tmp_path: Path, method: str) -> None:
    small_data(tmp_path / "data")
    first, second = launch(tmp_path, "two", 2, method=method)
    (alone,) = launch(tmp_path, "one", 1, method=method)
    assert first == second
    assert [line["step"] for line in first["history"]] == [2, 3, 4, 6, 8]
    assert len((tmp_path / "two" / METRICS).read_text().splitlines()) == 5
    assert len(list((tmp_path / "two" / FOLDER).glob(PATTERN))) == 1
    for key, values in alone["values"].items():
        assert first["values"][key] == pytest.approx(values, abs=2e-5), key
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
        assert ours.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "mosa-own"])
def test_two_processes_resume_to_the_same_bits(tmp_path: Path, method: str) -> None:
    small_data(tmp_path / "data")
    whole = launch(tmp_path, "whole", 2, dropout=0.2, method=method)
    launch(tmp_path, "torn", 2, dropout=0.2, stop=9, method=method)
    torn = launch(tmp_path, "torn", 2, dropout=0.2, method=method)
    assert torn[0]["resumed_at"] == 3
    for found, expected in zip(torn, whole, strict=True):
        assert {**found, "resumed_at": None} == expected


def test_processes_that_draw_for_themselves_train_one_adapter(tmp_path: Path) -> None:
    small_data(tmp_path / "data")
    first, second = launch(tmp_path, "own", 2, method="mosa-own")
    same, _ = launch(tmp_path, "same", 2, method="mosa")
    assert first == second
    assert first["weights"] != same["weights"]
