"""One process of a distributed run on the CPU: trains, breaks off where told, and writes down what it holds.

Started by ``torch.distributed.run``.
Usage: ``tests.train.two_processes FOLDER OUT DROPOUT BREAK_OFF METHOD OBJECTIVE SPOIL`` (break off at that loss, spoil
that loss of the second process, 0: never; METHOD of ``METHODS``, OBJECTIVE of ``OBJECTIVES``).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from epitaxy import Head, LoRA, TwoPass
from epitaxy.methods.mosa import MoSA
from epitaxy.train.loop import TrainConfig, train
from tests.train.small import BrokenOffError, Stopping, digest, small_run, without_times
from tests.train.test_skipping import Spoiled

SETTINGS = TrainConfig(
    steps=8, batch=6, accumulate=2, learning_rate=0.02, evaluate_every=3, log_every=2, keep_best=False, clip=0.3
)

METHODS = {
    "lora": lambda dropout: LoRA(rank=2, dropout=dropout),
    "mosa": lambda dropout: MoSA(bottleneck=6, parts=3, split="both", dropout=dropout, scale=1.0),
}
OBJECTIVES = {
    "plain": None,
    "decoupled": TwoPass(add=0.5),
    "joint": TwoPass(add=0.5, form="joint"),
    "lazy": TwoPass(every=2, consistency="mse", deep=1.0),
}


def main() -> None:
    """Run one process."""
    torch.set_num_threads(1)
    folder, out, dropout, stop = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    rank = os.environ.get("RANK", "alone")
    objective, spoil = OBJECTIVES[sys.argv[6]], int(sys.argv[7])
    method, _, draws = sys.argv[5].partition("-")
    method = METHODS[method](dropout) + Head()
    settings = replace(SETTINGS, own_draws=draws == "own")
    model, adapter, task, splits = small_run(folder / "data", method, dropout)
    if rank == "1":  # processes may start from different draws; the first one's count
        torch.manual_seed(77)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
    used = Spoiled(task, [spoil] if rank in ("1", "alone") else [])
    used = Stopping(used, stop) if stop else used
    data, shown = (splits.train, splits.validation), rank != "1"
    try:
        result = train(model, adapter, used, *data, settings, folder / out, objective, progress=shown)
    except BrokenOffError:
        os._exit(0)  # as abruptly as a failing node
    found = {
        "weights": digest(adapter.tensors()),
        "values": {key: tensor.flatten()[:4].tolist() for key, tensor in adapter.tensors().items()},
        "history": without_times(result.history),
        "resumed_at": result.resumed_at,
        "skipped": result.skipped_steps,
        "best": [result.best_step, result.best_metric],
    }
    (folder / f"{out}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
