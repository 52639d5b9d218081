"""The training loop: knows neither modality nor method, can be killed at any moment and taken up exactly.

``metrics.jsonl`` in the output folder has one object per line: ``step``, ``epoch``, ``loss`` (mean since the line
before), ``lr``, ``grad_norm`` (before clipping), ``skipped_steps`` (so far), ``examples_per_second``, and at
evaluations ``validation_<metric>`` and ``update_norms`` (module -> root mean square of its change since the start).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import read_tensors
from epitaxy.tasks.objective import Objective
from epitaxy.tasks.random_state import seed_everything
from epitaxy.train import resume as resuming
from epitaxy.train.accelerating import make_accelerator, prepared
from epitaxy.train.checkpoint import (
    FOLDER,
    Checkpoint,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
    write_tensors,
)
from epitaxy.train.config import TrainConfig, TrainResult, count_steps, evaluation_interval
from epitaxy.train.feeding import batches
from epitaxy.train.metrics_log import MetricsLog, read_metrics
from epitaxy.train.order import Order
from epitaxy.train.progress import Progress
from epitaxy.train.session import LossFunction, Session, check_metric
from epitaxy.train.tracking import start_trackers, stop_trackers, track
from epitaxy.train.trainable import objective_for, trainable_of

__all__ = ["LossFunction", "Objective", "TrainConfig", "TrainResult", "count_steps", "read_metrics", "train"]

METRICS, INITIAL = "metrics.jsonl", "initial.safetensors"


def train(
    model: nn.Module,
    adapter: Adapter | None,
    task: Any,
    train_data: Any,
    validation_data: Any,
    config: TrainConfig,
    out: Path,
    objective: Objective | LossFunction | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train ``adapter`` (None: every parameter that asks for a gradient) and leave the model at its best state.

    ``task`` has ``batch(examples)``, ``loss(model, batch)`` and ``evaluate(model, data, batch_size)``.  ``objective``
    replaces the plain loss: a function of (model, batch, task loss), or an object with ``parts`` such as ``TwoPass``;
    a method may bring its own.  ``out`` receives
    ``metrics.jsonl`` and ``checkpoints/``; with ``resume`` a run found there is taken up where its last checkpoint
    stood, and a finished one is not repeated.  Torch, numpy and python are seeded from ``config.seed``.

    Raises ``StateError`` when the adapter cannot learn or the checkpoint is of another run, ``EpitaxyError`` when the
    settings do not fit or loss or gradient stay without finite values; the last checkpoint is then still there.
    """
    _check(task, train_data, validation_data, config)
    trainable_of(model, adapter)
    accelerator = make_accelerator(config, out)
    chosen = objective_for(adapter, objective)
    with prepared(accelerator, model, adapter, config.base_mode) as wrapped:
        trainable = trainable_of(model, adapter)
        steps = count_steps(config, len(train_data))
        session = Session(accelerator, wrapped, trainable, task, config, steps, chosen)
        who = resuming.identity(model, adapter, session, train_data, validation_data)
        checkpoint = _begin(session, who, out / FOLDER, resume)
        log = _Journal(session, who, out, 0 if checkpoint is None else int(checkpoint.facts["position"]))
        try:
            if not session.standing.finished:
                _loop(session, train_data, validation_data, log, progress)
                log.finish()
        finally:
            log.close()
    standing = session.standing
    return TrainResult(
        steps=standing.step,
        best_step=standing.best_step,
        best_metric=standing.best_metric,
        train_seconds=standing.seconds,
        stopped_early=standing.stopped_early,
        history=read_metrics(out / METRICS),
        trained_parameters=sum(parameter.numel() for parameter in trainable.parameters.values()),
        resumed_at=None if checkpoint is None else checkpoint.step,
        skipped_steps=standing.skipped,
    )


def _check(task: Any, train_data: Any, validation_data: Any, config: TrainConfig) -> None:
    if not len(train_data):
        raise EpitaxyError("there is nothing to train on: the training data are empty")
    if validation_data is None and config.patience is not None:
        raise EpitaxyError("train.patience: stopping early needs validation data")
    known = getattr(task, "metrics", None)
    if known is not None and validation_data is not None:
        check_metric(config.metric, tuple(known))


def _begin(session: Session, who: dict[str, Any], folder: Path, resume: bool) -> Checkpoint | None:
    """Take up the newest checkpoint, or begin anew."""
    accelerator = session.accelerator
    path = latest_checkpoint(folder) if resume else None
    accelerator.wait_for_everyone()
    if path is not None:
        checkpoint = read_checkpoint(path)
        resuming.require_same_run(path, checkpoint.facts["run"], who)
        resuming.restore(session, checkpoint, path)
        session.start, _ = read_tensors(folder / INITIAL)
        return checkpoint
    seed_everything(session.config.seed + accelerator.process_index)
    if accelerator.is_main_process:
        remove_checkpoints(folder)
        write_tensors(folder / INITIAL, session.start, {})
    return None


def _loop(session: Session, train_data: Any, validation_data: Any, journal: _Journal, shown: bool) -> None:
    config, standing, accelerator = session.config, session.standing, session.accelerator
    interval = evaluation_interval(config, len(train_data))
    order = Order(
        len(train_data),
        config.batch,
        config.accumulate,
        config.seed,
        standing.step,
        session.steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    feed = batches(train_data, session.task, order, config.workers, accelerator.device)
    bar = Progress(session.steps, standing.step, shown and accelerator.is_main_process)
    try:
        while standing.step < session.steps and not standing.stopped_early:
            began = time.perf_counter()
            norm = session.step([next(feed) for _ in range(config.accumulate)])
            last = standing.step == session.steps
            evaluating = validation_data is not None and (last or standing.step % interval == 0)
            record = None
            if evaluating or last or standing.step % config.log_every == 0:
                record = session.train_record(norm)
            journal.count(config.batch * config.accumulate, time.perf_counter() - began)
            if record is not None:
                record |= session.evaluate(validation_data) if evaluating else {}
                record = journal.write(record, standing.step * config.batch * config.accumulate / len(train_data))
            bar.update(standing.step, record)
            if standing.step % (config.checkpoint_every or interval) == 0 and not last and not standing.stopped_early:
                journal.checkpoint()
    finally:
        bar.close()


class _Journal:
    """What a run leaves behind in its folder; only the main process writes."""

    def __init__(self, session: Session, who: dict[str, Any], out: Path, position: int) -> None:
        self.session, self.who, self.folder = session, who, out / FOLDER
        self.main = session.accelerator.is_main_process
        self.log = MetricsLog(out / METRICS, position) if self.main else None
        self.examples, self.busy = 0, 0.0
        self.began = time.perf_counter() - session.standing.seconds
        start_trackers(session.accelerator, session.config)

    def count(self, examples: int, seconds: float) -> None:
        """Note work done since the last line of the log."""
        self.examples += examples
        self.busy += seconds

    def write(self, record: dict[str, Any], epoch: float) -> dict[str, Any]:
        """Write one line of the log; returns it in full."""
        rate = round(self.examples / max(self.busy, 1e-9), 2)
        step = self.session.standing.step
        record = {"step": step, "epoch": round(epoch, 4), **record, "examples_per_second": rate}
        self.examples, self.busy = 0, 0.0
        if self.log is not None:
            self.log.write(record)
        track(self.session.accelerator, self.session.config, record)
        return record

    def checkpoint(self) -> None:
        """Save the whole state of the run."""
        self.session.require_finite_parameters()
        self._save(resuming.capture)

    def finish(self) -> None:
        """Return to the best state, and save what a finished run keeps."""
        session = self.session
        if session.config.keep_best and session.best:
            session.trainable.fill(session.best, "the best state")
        session.require_finite_parameters()
        session.standing.finished = True
        self._save(resuming.capture_finished)

    def _save(self, capture: Any) -> None:
        self.session.standing.seconds = time.perf_counter() - self.began
        state = capture(self.session, self.who, 0 if self.log is None else self.log.position())
        if self.main:
            write_checkpoint(self.folder, state)
        self.session.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Close the log and the trackers."""
        if self.log is not None:
            self.log.close()
        stop_trackers(self.session.accelerator, self.session.config)
