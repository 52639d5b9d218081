"""Optional trackers (TensorBoard, Weights & Biases, Trackio ...), through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.train.config import TrainConfig


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise for a tracker that accelerate does not know or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    installed = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise EpitaxyError(f"train.trackers: no tracker is called {name!r}{nearest(name, known)}")
        if name not in installed:
            raise EpitaxyError(f"train.trackers: the package of {name!r} is not installed")


def start_trackers(accelerator: Any, config: TrainConfig) -> None:
    """Open the trackers and give them the configuration."""
    if config.trackers:
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in asdict(config).items()
        }
        accelerator.init_trackers("epitaxy", config=plain)


def track(accelerator: Any, config: TrainConfig, record: Mapping[str, Any]) -> None:
    """Send the numbers of one line of the log."""
    if config.trackers:
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        accelerator.log(numbers, step=record["step"])


def stop_trackers(accelerator: Any, config: TrainConfig) -> None:
    """Close them; the process group stays, it belongs to the caller."""
    if config.trackers:
        for tracker in accelerator.trackers:
            tracker.finish()
