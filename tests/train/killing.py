"""Whole runs that are killed with SIGKILL, at random moments or at every single step of writing, and taken up again.

A program of its own: it imports everything once and forks a child for each attempt, so that an attempt costs
milliseconds.  Usage: ``python -m tests.train.killing random|writing adapter|full FOLDER KILLS SEED``; prints one JSON
object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from epitaxy.core.files import inspect
from epitaxy.core.storage import read_tensors
from epitaxy.train.checkpoint import FOLDER, PATTERN
from epitaxy.train.loop import METRICS, read_metrics
from epitaxy.train.metrics_log import MetricsLog
from epitaxy.train.recipe import Recipe, from_dict
from epitaxy.train.run import run
from epitaxy.train.run_directory import ADAPTER, MODEL, PREDICTIONS, RECIPE, RESULT, read_json, read_recipe
from tests.train.small import digest, small_data, small_model, without_times

TRAIN = {
    "steps": 18,
    "batch": 5,
    "accumulate": 2,
    "learning_rate": 0.02,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "log_every": 2,
    "warmup": 3,
}
METHODS: dict[str, Any] = {"adapter": [{"method": "lora", "rank": 2, "dropout": 0.2}, "head"], "full": "full"}
CLOCK = ("seconds", "train_seconds", "peak_memory")  # what depends on the machine and its mood
Attempt = Callable[[str], None]


def make_attempt(folder: Path, method: str) -> Attempt:
    """Write the base and the data that every attempt reads; returns what carries out a run of the given name."""
    opened = small_model()
    opened.model.save_pretrained(folder / "base")  # type: ignore[operator]
    opened.processor.save_pretrained(folder / "base")
    small_data(folder / "data")

    def recipe(name: str) -> Recipe:
        values = {"base": str(folder / "base"), "data": str(folder / "data"), "method": METHODS[method], "samples": 3}
        return from_dict({**values, "train": TRAIN, "out": folder / name}, "killing")

    def attempt(name: str) -> None:
        """Carry out the run, from wherever it stands, and write down the exact outcome."""
        out = folder / name
        result = run(recipe(name), progress=False)
        weights = {file.name: digest(read_tensors(file)[0]) for file in out.glob("[am]*/*.safetensors")}
        outcome = {
            "weights": weights,
            "result": {key: value for key, value in result.items() if key not in CLOCK},
            "predictions": read_json(out / PREDICTIONS),
            "history": without_times(read_metrics(out / METRICS)),
            "files": sorted(str(path.relative_to(out)) for path in proper_files(out)),
        }
        assert len(weights) == 1
        (folder / f"{name}.json").write_text(json.dumps(outcome))

    return attempt


def proper_files(out: Path) -> list[Path]:
    """The files of a run; hidden ones are drafts that a kill left behind."""
    hidden = [path for path in out.rglob("*") if any(part.startswith(".") for part in path.relative_to(out).parts)]
    return [path for path in out.rglob("*") if path.is_file() and path not in hidden]


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


def finish(folder: Path, name: str, attempt: Attempt) -> dict[str, Any]:
    """Let a run come to its end and return the outcome."""
    _, status = os.waitpid(fork(lambda: attempt(name)), 0)
    assert status == 0, f"the run {name} did not end well: {status}"
    outcome: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return outcome


def require_whole(out: Path) -> None:
    """Every file with a proper name can be read in full, and once there was a checkpoint there always is one."""
    for path in proper_files(out):
        if path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix == ".json":
            read_json(path)
    if (out / RECIPE).exists():
        read_recipe(out)
    if (out / ADAPTER / "adapter.safetensors").exists():
        inspect(out / ADAPTER)
    if (out / MODEL).exists():
        assert {"config.json", "model.safetensors"} <= {path.name for path in (out / MODEL).iterdir()}
    if (out / RESULT).exists():
        assert (out / PREDICTIONS).exists()
        assert (out / ADAPTER).exists() or (out / MODEL).exists()
    steps = [line["step"] for line in read_metrics(out / METRICS)]
    assert max(steps, default=0) <= 3 or list((out / FOLDER).glob(PATTERN)), "a checkpoint went before the next came"


def at_random(folder: Path, attempt: Attempt, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times after a random wait; a run that reached its end is compared, and another one begins."""
    finish(folder, "warm", attempt)
    began = time.monotonic()
    expected = finish(folder, "reference", attempt)
    duration = time.monotonic() - began
    dice = random.Random(seed)
    killed, number, runs, stands = 0, 0, [], []
    while killed < kills:
        name = f"run{number}"
        child = fork(lambda name=name: attempt(name))
        time.sleep(dice.uniform(0.02, 0.8) * duration)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"an attempt failed by itself: {status}"
            runs.append(finish(folder, name, attempt))
            number += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        require_whole(folder / name)
        stands.append(sorted(path.name for path in (folder / name / FOLDER).glob(PATTERN)))
    runs.append(finish(folder, f"run{number}", attempt))
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
    os.mkdir, tempfile.mkstemp, tempfile.mkdtemp = around(os.mkdir), around(tempfile.mkstemp), around(tempfile.mkdtemp)
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


def while_writing(folder: Path, attempt: Attempt, every: int) -> dict[str, Any]:
    """Kill a fresh run at each moment of writing in turn (or each ``every``-th), and let it go on."""
    expected = finish(folder, "reference", attempt)
    moment, kills, equal = 1, 0, []
    while True:
        name = f"moment{moment}"

        def work(moment: int = moment, name: str = name) -> None:
            die_at(moment)
            attempt(name)

        _, status = os.waitpid(fork(work), 0)
        if status == 0:
            return {"moments": moment - 1, "kills": kills, "equal": equal}
        assert os.WIFSIGNALED(status), f"an attempt failed by itself: {status}"
        kills += 1
        require_whole(folder / name)
        equal.append(finish(folder, name, attempt) == expected)
        shutil.rmtree(folder / name, ignore_errors=True)
        moment += every


def main() -> None:
    """Run what the command line asks for."""
    torch.set_num_threads(1)
    mode, method, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    kills, seed = int(sys.argv[4]), int(sys.argv[5])
    attempt = make_attempt(folder, method)
    found = at_random(folder, attempt, kills, seed) if mode == "random" else while_writing(folder, attempt, kills)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
