"""From a session to a checkpoint and back: what exact resumption needs, and whether a checkpoint fits the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import StateError
from epitaxy.core.fingerprint import fingerprint
from epitaxy.tasks import random_state
from epitaxy.tasks.objective import Objective
from epitaxy.train.checkpoint import Checkpoint
from epitaxy.train.config import FREE
from epitaxy.train.session import Session, Standing


def identity(
    model: nn.Module, adapter: Adapter | None, session: Session, train_data: Any, validation_data: Any
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be the same run: configuration, method, base, data, processes."""
    config = {f"train.{key}": value for key, value in asdict(session.config).items() if key not in FREE}
    return {
        **config,
        "objective": _named(session.objective),
        "method": "full fine-tuning" if adapter is None else adapter.config,
        "base": fingerprint(model).weights if adapter is not None else fingerprint(model).shapes,
        "parameters": {key: list(p.shape) for key, p in session.trainable.parameters.items()},
        "training data": _digest(train_data),
        "validation data": _digest(validation_data),
        "processes": session.accelerator.num_processes,
    }


def _named(objective: Any) -> dict[str, Any] | None:
    """An objective with its settings; functions are not told apart."""
    if not isinstance(objective, Objective):
        return None
    return {"kind": type(objective).__name__, **(asdict(objective) if is_dataclass(objective) else {})}


def _digest(data: Any) -> list[Any] | None:
    """Size of a data set and a digest of its labels, where it has some."""
    if data is None:
        return None
    labels = ",".join(str(label) for label in getattr(data, "labels", ()))
    return [len(data), hashlib.sha256(labels.encode()).hexdigest()[:16]]


def require_same_run(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ``StateError`` naming the first thing in which the run of a checkpoint differs from the one asked for."""
    for key, value in expected.items():
        if key not in found or found[key] != _as_json(value):
            shown = "" if key in ("parameters",) else f": {found.get(key)!r} there, {value!r} now"
            raise StateError(
                f"{path}: this checkpoint belongs to a run that differs in {key}{shown}; "
                "choose another output folder, or start anew with resume=False"
            )


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def capture(session: Session, who: Mapping[str, Any], position: int) -> Checkpoint:
    """The whole state of a run under way; every process must call it, and all get the same."""
    from accelerate.utils import gather_object

    accelerator = session.accelerator
    own = (*random_state.capture(accelerator.device), float(session.window))
    ranks = gather_object([own]) if accelerator.num_processes > 1 else [own]
    tensors = _prefixed("state", session.trainable.tensors()) | _prefixed("best", session.best)
    optimizer = session.optimizer.optimizer
    for key, parameter in session.trainable.parameters.items():
        tensors |= _prefixed(f"optimizer/{key}", optimizer.state.get(parameter, {}))
    for rank, (states, _, _) in enumerate(ranks):
        tensors |= _prefixed(f"random/{rank}", states)
    facts = {
        "run": dict(who),
        "standing": asdict(session.standing),
        "position": position,
        "window_steps": session.window_steps,
        "processes": [{"random": plain, "window": window} for _, plain, window in ranks],
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    return Checkpoint(session.standing.step, tensors, facts)


def capture_finished(session: Session, who: Mapping[str, Any], position: int) -> Checkpoint:
    """What a finished run keeps: its final state and result."""
    facts = {"run": dict(who), "standing": asdict(session.standing), "position": position}
    return Checkpoint(session.standing.step, _prefixed("state", session.trainable.tensors()), facts)


def restore(session: Session, checkpoint: Checkpoint, path: Path) -> None:
    """Put ``session`` where the checkpoint was taken."""
    session.trainable.fill(checkpoint.group("state"), str(path))
    session.standing = Standing(**checkpoint.facts["standing"])
    if session.standing.finished:
        return
    session.best = checkpoint.group("best")
    _restore_optimizer(session, checkpoint)
    accelerator = session.accelerator
    rank = accelerator.process_index
    process = checkpoint.facts["processes"][rank]
    random_state.restore(checkpoint.group(f"random/{rank}"), process["random"], accelerator.device)
    session.window.fill_(process["window"])
    session.window_steps = checkpoint.facts["window_steps"]
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.facts["scaler"])


def _restore_optimizer(session: Session, checkpoint: Checkpoint) -> None:
    optimizer = session.optimizer.optimizer
    names = {id(parameter): key for key, parameter in session.trainable.parameters.items()}
    plain = optimizer.state_dict()
    numbers = [number for group in plain["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        held = checkpoint.group(f"optimizer/{names[id(parameter)]}")
        if held:
            state[number] = held
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": torch.as_tensor(tensor) for key, tensor in tensors.items()}
