"""Two processes that draw for themselves go where one process goes that computes both of their batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from epitaxy.methods.partition import split_parameters
from epitaxy.train.lazy_adam import LazyAdamW
from tests.train.drawing_processes import ACCUMULATE, PARTS, SETTINGS, STEPS, batch, branch, values

pytestmark = pytest.mark.slow
LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_draws_are_united_over_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHER, "-m", "tests.train.drawing_processes", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"drawing-{rank}.json").read_text()) for rank in (0, 1)]

    alone = branch()
    optimizer = LazyAdamW(alone.parameters(), partial(split_parameters, alone), **SETTINGS)
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            for rank in (0, 1):
                x, y, part = batch(step, micro, rank)
                alone.draw(part)
                (F.cross_entropy(alone(x), y) / ACCUMULATE / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank, held in enumerate(found):
        for name, expected in values(alone).items():
            torch.testing.assert_close(held["values"][name], expected, rtol=0, atol=1e-12, msg=name)
        assert held["counts"] == optimizer.state[alone.up.weight]["step"].tolist()
        for step, seen in enumerate(held["seen"]):  # before the step, a process knows of its own draws alone
            own = {batch(step, micro, rank)[2] for micro in range(ACCUMULATE)}
            assert seen == [part in own for part in range(PARTS)]
    assert found[0]["values"] == found[1]["values"]
    assert len(set(found[0]["counts"])) > 1
