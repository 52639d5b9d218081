"""What the lower half of a network's blocks puts out, kept while the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from epitaxy.core.anatomy import describe
from epitaxy.core.edits.edit import output_tensor
from epitaxy.core.errors import UnsupportedError
from epitaxy.core.host import hosted, unwrap

_BLOCKS: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()  # finding them takes longer than a small step


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of all blocks, in the order of the network; raises ``UnsupportedError`` for a model without known ones."""
    model = unwrap(model)
    if model not in _BLOCKS:
        record = hosted(model)
        anatomy = describe(model) if record is None else record.anatomy
        paths = [spot.path for spot in anatomy.roles.get("block", ())]
        if len(paths) < 2:
            raise UnsupportedError(
                f"objective.deep: {type(model).__name__} has {len(paths)} blocks that are known; leave it 0"
            )
        _BLOCKS[model] = paths
    return _BLOCKS[model]


@contextmanager
def lower_half(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the ``with`` block a call of ``model`` fills the list with the outputs of the first half of its blocks."""
    model, paths = unwrap(model), blocks_of(model)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output_tensor(output))

    handles = [model.get_submodule(path).register_forward_hook(keep) for path in paths[: len(paths) // 2]]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
