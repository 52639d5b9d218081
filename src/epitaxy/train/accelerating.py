"""Accelerate, set up for one call of ``train`` and leaving the model as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.methods.draws import clocks
from epitaxy.methods.partition import split_parameters
from epitaxy.train.config import BaseMode, TrainConfig
from epitaxy.train.modes import training_modes
from epitaxy.train.tracking import check_trackers

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names of what it leaves to each process
PATCHED = ("forward", "_original_forward", "_is_accelerate_prepared", IGNORED)  # what is left on a model


def make_accelerator(config: TrainConfig, out: Path) -> Any:
    """An ``Accelerator`` for one process or distributed data parallel, on the device that accelerate finds.

    Raises ``EpitaxyError`` when batch, precision or trackers do not fit what is there.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        DistributedType,
        GradientAccumulationPlugin,
        ProjectConfiguration,
    )

    check_trackers(config.trackers)
    AcceleratorState._reset_state()  # an earlier call may have asked for another precision
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates by itself
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "trackers")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UnsupportedError(
            f"training under {accelerator.distributed_type.value} has no exact resume here; use one process or DDP, or "
            "call the task's loss from a loop of your own"
        )
    check_precision(config.precision, accelerator.device.type)
    if config.batch % accelerator.num_processes:
        raise EpitaxyError(
            f"train.batch: {config.batch} examples cannot be shared evenly among {accelerator.num_processes} processes"
        )
    return accelerator


def check_precision(precision: str, device: str) -> None:
    """Raise for a precision that the kind of device cannot train in."""
    if precision == "fp16" and device == "cpu":
        raise EpitaxyError("train.precision: fp16 needs a GPU, this is a CPU; use bf16 or no")


@contextmanager
def prepared(
    accelerator: Any, model: nn.Module, adapter: Adapter | None, base_mode: BaseMode = "eval"
) -> Iterator[nn.Module]:
    """The model as accelerate wraps it, its modes set for training; afterwards modes and methods are what they were."""
    before = set(model.__dict__)
    try:
        setattr(model, IGNORED, [*getattr(model, IGNORED, ()), *draws_in(model)])
        wrapped: nn.Module = accelerator.prepare(model)
        with training_modes(model, [] if adapter is None else [adapter], base_mode):
            yield wrapped
    finally:
        for name in PATCHED:
            if name not in before:
                model.__dict__.pop(name, None)


def draws_in(model: nn.Module) -> list[str]:
    """Names of the buffers in which adapters keep what this process drew, and when.

    DDP must not write the first process's over them: processes may draw for themselves, and the optimiser unites what
    they drew.
    """
    own = {id(clock.now) for clock in clocks(model)} | {id(used) for *_, used in split_parameters(model)}
    return [name for name, buffer in model.named_buffers() if id(buffer) in own]
