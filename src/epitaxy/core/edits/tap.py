"""Tap: keeps a tensor that passes one module until an edit on a later module of the same block reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit, first_tensor, output_tensor
from epitaxy.core.errors import UnsupportedError
from epitaxy.core.route import Route


class Memo:
    """Holds one tensor between two modules of one forward pass, and nothing at rest.

    A pass that stops halfway, as recomputed blocks do, may leave a tensor behind; it is not copied with the model.
    ``cut`` says that the tensor was computed without a graph, as in a block under reentrant checkpointing.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.cut = False

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None, "cut": False}

    def take(self) -> Tensor:
        """Return the tensor and forget it; raises ``UnsupportedError`` when the tapped module was left out."""
        value, self.value = self.value, None
        if value is None:
            raise UnsupportedError(
                "a module that an adapter reads did not run before the one that needs it; where the model drops "
                "layers in training, set its `layerdrop` to 0"
            )
        return value


class Tap(Edit):
    """Records the input or the output of its host; changes nothing."""

    rowwise = False

    def __init__(self, memo: Memo, reads: Literal["input", "output"]) -> None:
        super().__init__()
        self.memo, self.reads = memo, reads
        self.acts_before = reads == "input"
        self.acts_after = reads == "output"

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        for tap in group.values():
            assert isinstance(tap, Tap)
            tap.memo.value = first_tensor(call)
        return call

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        for tap in group.values():
            assert isinstance(tap, Tap)
            tap.memo.value = output_tensor(output)
        return output
