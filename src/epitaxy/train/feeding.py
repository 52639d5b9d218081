"""From a data set to batches on their way to the device, in the exact order of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from epitaxy.core.errors import EpitaxyError
from epitaxy.train.order import Order
from epitaxy.train.session import Batch


class _Batches(Dataset[Any]):
    """Indexed by a list of places.  Errors travel as values, so that a worker's message arrives as it was written.

    A task that leaves something to chance has ``training_batch``, which takes a draw for each example.
    """

    def __init__(self, data: Any, task: Any, order: Order) -> None:
        self.data, self.task, self.order = data, task, order

    def __getitem__(self, places: Any) -> Batch | EpitaxyError:
        found = [self.order.locate(place) for place in places]
        try:
            examples = [self.data[row] for _, row in found]
            if hasattr(self.task, "training_batch"):
                draws = [(self.order.seed, epoch, row) for epoch, row in found]
                return self.task.training_batch(examples, draws)  # type: ignore[no-any-return]
            return self.task.batch(examples)  # type: ignore[no-any-return]
        except EpitaxyError as error:
            return error


class _Places(Sampler[list[int]]):
    """The batches of an order, to be handed to the workers as places."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.places()

    def __len__(self) -> int:
        return len(self.order)


def batches(data: Any, task: Any, order: Order, workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of ``order``; draws nothing from the global random generators."""
    loader: DataLoader[Any] = DataLoader(
        _Batches(data, task, order),
        batch_size=None,
        sampler=_Places(order),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, EpitaxyError):
            raise batch
        yield batch
