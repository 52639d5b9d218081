"""SIGKILL at any moment: always resumable, nothing half-written, and the same bits in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are killed as forked processes")


def killing(mode: str, method: str, folder: Path, kills: int, seed: int) -> Any:
    """Run ``tests.train.killing`` as a program."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killing", mode, method, str(folder), str(kills), str(seed)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_random(found: Any, kills: int) -> None:
    assert found["kills"] == kills
    assert found["equal"] == [True] * found["runs"]
    assert any(stands for stands in found["stands"]), "no kill came after a checkpoint; the test would prove nothing"
    assert all(len(stands) <= 2 for stands in found["stands"])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    check_random(killing("random", "adapter", tmp_path, 4, 1), 4)


def test_killed_while_writing(tmp_path: Path) -> None:
    found = killing("writing", "adapter", tmp_path, 23, 0)
    assert found["kills"] >= 6
    assert found["equal"] == [True] * found["kills"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "full"])
def test_killed_at_twenty_random_moments(method: str, tmp_path: Path) -> None:
    check_random(killing("random", method, tmp_path, 20, 2), 20)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "every"), [("adapter", 1), ("full", 3)])
def test_killed_at_every_moment_of_writing(method: str, every: int, tmp_path: Path) -> None:
    """From the first folder of the run to the last byte of its result."""
    found = killing("writing", method, tmp_path, every, 0)
    assert found["kills"] >= 120 // every
    assert found["equal"] == [True] * found["kills"]
