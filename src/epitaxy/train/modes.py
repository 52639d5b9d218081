"""Which modules are in training mode while an adapter trains: its own, and not those of the frozen base.

Dropout, stochastic depth and random masking of the base regularise weights that do not move here.  Gradient
checkpointing of transformers works in training mode only, so layers that use it keep the mark and lose it for the
time of their own computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.train.config import BaseMode

CHECKPOINTED = "_gradient_checkpointing_func"


@contextmanager
def training_modes(model: nn.Module, adapters: Sequence[Adapter], base_mode: BaseMode = "eval") -> Iterator[None]:
    """Inside the ``with`` block ``model`` is ready to train ``adapters``; afterwards all modes are what they were.

    Full fine-tuning (no ``adapters``) and ``base_mode="train"`` put everything into training mode, but for batch
    norms that do not learn: they keep the statistics they came with.
    """
    modes = {module: module.training for module in model.modules()}
    checkpointed: dict[nn.Module, Any] = {}
    try:
        if not adapters or base_mode == "train":
            model.train()
            freeze_statistics(model)
        else:
            model.eval()
            for piece in (piece for adapter in adapters for piece in adapter.pieces):
                piece.module.train()
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False) and hasattr(module, CHECKPOINTED):
                    checkpointed[module] = getattr(module, CHECKPOINTED)
                    module.training = True
                    setattr(module, CHECKPOINTED, _in_evaluation_mode(module, checkpointed[module]))
        yield
    finally:
        for module, checkpoint in checkpointed.items():
            setattr(module, CHECKPOINTED, checkpoint)
        for module, training in modes.items():
            module.training = training


def freeze_statistics(model: nn.Module) -> None:
    """Batch norms of the frozen base keep the statistics they came with."""
    for module in model.modules():
        learns = any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not learns:
            module.eval()


def _in_evaluation_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint(function, ...)`` with ``layer`` in evaluation mode whenever ``function`` computes, or recomputes."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def computed(*inputs: Any, **named: Any) -> Any:
            before, layer.training = layer.training, False
            try:
                return function(*inputs, **named)
            finally:
                layer.training = before

        return checkpoint(computed, *args, **kwargs)

    return run
