"""From a data set to batches on their way to the device, in the exact order of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from epitaxy.core.errors import EpitaxyError
from epitaxy.train.order import Order
from epitaxy.train.session import Batch


class _Batches(Dataset[Any]):
    """Indexed by a list of rows.  Errors travel as values, so that a worker's message arrives as it was written."""

    def __init__(self, data: Any, task: Any) -> None:
        self.data, self.task = data, task

    def __getitem__(self, rows: Any) -> Batch | EpitaxyError:
        try:
            batch: Batch = self.task.batch([self.data[row] for row in rows])
        except EpitaxyError as error:
            return error
        return batch


def batches(data: Any, task: Any, order: Order, workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of ``order``; draws nothing from the global random generators."""
    loader: DataLoader[Any] = DataLoader(
        _Batches(data, task),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, EpitaxyError):
            raise batch
        yield batch
