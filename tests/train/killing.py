"""Runs that are killed with SIGKILL, at random moments or at every single step of writing, and taken up again.

A program of its own: it imports everything once and forks a child for each attempt, so that an attempt costs
milliseconds.  Usage: ``python -m tests.train.killing random|writing FOLDER KILLS SEED``; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from epitaxy.core.files import read_tensors
from epitaxy.train.checkpoint import FOLDER, PATTERN
from epitaxy.train.loop import METRICS, TrainConfig, read_metrics, train
from epitaxy.train.metrics_log import MetricsLog
from tests.train.small import digest, small_run, without_times

SCHEDULE = TrainConfig(
    steps=18, batch=5, accumulate=2, learning_rate=0.02, evaluate_every=4, checkpoint_every=3, log_every=2, warmup=3
)


def attempt(folder: Path, name: str) -> None:
    """Train in ``folder/name`` to the end, from wherever it stands, and write down the exact outcome."""
    model, adapter, task, splits = small_run(folder / "data")
    result = train(model, adapter, task, splits.train, splits.validation, SCHEDULE, folder / name, progress=False)
    outcome = {
        "weights": digest(adapter.tensors()),
        "best": [result.best_step, result.best_metric],
        "history": without_times(result.history),
    }
    (folder / f"{name}.json").write_text(json.dumps(outcome))


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; returns its process number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def finish(folder: Path, name: str) -> dict[str, Any]:
    """Let a run come to its end and return the outcome."""
    _, status = os.waitpid(fork(lambda: attempt(folder, name)), 0)
    assert status == 0, f"the run {name} did not end well: {status}"
    outcome: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return outcome


def require_whole(out: Path) -> None:
    """Every file with a proper name can be read in full, and once there was a checkpoint there always is one."""
    for path in (out / FOLDER).glob("*.safetensors"):
        read_tensors(path)
    steps = [line["step"] for line in read_metrics(out / METRICS)]
    assert max(steps, default=0) <= 3 or list((out / FOLDER).glob(PATTERN)), "a checkpoint went before the next came"


def at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times after a random wait; a run that reached its end is compared, and another one begins."""
    began = time.monotonic()
    expected = finish(folder, "reference")
    duration = time.monotonic() - began
    dice = random.Random(seed)
    killed, number, runs, stands = 0, 0, [], []
    while killed < kills:
        name = f"run{number}"
        child = fork(lambda name=name: attempt(folder, name))
        time.sleep(dice.uniform(0.02, 0.6) * duration)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"an attempt failed by itself: {status}"
            runs.append(finish(folder, name))
            number += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        require_whole(folder / name)
        stands.append(sorted(path.name for path in (folder / name / FOLDER).glob(PATTERN)))
    runs.append(finish(folder, f"run{number}"))
    return {"kills": killed, "runs": len(runs), "equal": [run == expected for run in runs], "stands": stands}


def die_at(moment: int) -> None:
    """Make this process kill itself at the n-th thing it does to its files, half-way through where that is possible."""
    count = 0

    def reached() -> bool:
        nonlocal count
        count += 1
        return count == moment

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Any) -> Any:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if reached():
                die()
            value = function(*args, **kwargs)
            if reached():
                die()
            return value

        return patched

    os.replace, os.fsync, os.unlink = around(os.replace), around(os.fsync), around(os.unlink)
    Path.unlink = around(Path.unlink)  # type: ignore[method-assign]
    save_file = safetensors.torch.save_file

    def save_half(tensors: Any, filename: Any, metadata: Any = None) -> None:
        save_file(tensors, filename, metadata)
        if reached():
            os.truncate(filename, os.path.getsize(filename) // 2)
            die()

    safetensors.torch.save_file = save_half
    write = MetricsLog.write

    def write_half(self: MetricsLog, record: dict[str, Any]) -> None:
        if reached():
            self._stream.write(json.dumps(record).encode()[:20])
            self._stream.flush()
            die()
        write(self, record)

    MetricsLog.write = write_half  # type: ignore[method-assign]


def while_writing(folder: Path, every: int) -> dict[str, Any]:
    """Kill a fresh run at each moment of writing in turn (or each ``every``-th), and let it go on."""
    expected = finish(folder, "reference")
    moment, kills, equal = 1, 0, []
    while True:
        name = f"moment{moment}"

        def work(moment: int = moment, name: str = name) -> None:
            die_at(moment)
            attempt(folder, name)

        _, status = os.waitpid(fork(work), 0)
        if status == 0:
            return {"moments": moment - 1, "kills": kills, "equal": equal}
        assert os.WIFSIGNALED(status), f"an attempt failed by itself: {status}"
        kills += 1
        require_whole(folder / name)
        equal.append(finish(folder, name) == expected)
        shutil.rmtree(folder / name)
        moment += every


def main() -> None:
    """Run what the command line asks for."""
    torch.set_num_threads(1)
    mode, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    found = at_random(folder, kills, seed) if mode == "random" else while_writing(folder, kills)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
