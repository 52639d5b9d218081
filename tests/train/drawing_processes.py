"""One process of two under DDP, each with draws of its own; writes down where its parameters went.

Started by ``torch.distributed.run``.  Usage: ``tests.train.drawing_processes FOLDER``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from epitaxy.methods.partition import split_parameters
from epitaxy.train.accelerating import IGNORED, draws_in
from epitaxy.train.lazy_adam import LazyAdamW
from tests.train.copies import InParts, SplitBranch

STEPS, ACCUMULATE, ROWS, PARTS, WIDTH = 6, 2, 4, 5, 8
SETTINGS = {"lr": 0.05, "weight_decay": 0.1}


def branch() -> SplitBranch:
    """The same module in every process."""
    torch.manual_seed(2)
    down, up = nn.Linear(WIDTH, 6).double(), nn.Linear(6, WIDTH).double()
    pieces = [InParts(m, torch.arange(m.weight.numel()).view_as(m.weight) % PARTS, PARTS) for m in (down, up)]
    return SplitBranch(nn.LayerNorm(WIDTH).double(), *pieces, nn.Linear(WIDTH, 3).double())


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pictures, classes and the part drawn."""
    generator = torch.Generator().manual_seed(step * 100 + micro * 10 + rank)
    x = torch.randn(ROWS, 3, WIDTH, generator=generator, dtype=torch.double)
    return x, torch.randint(3, (ROWS,), generator=generator), (step // 3 + 2 * micro + rank) % PARTS


def values(model: nn.Module) -> dict[str, list[float]]:
    """Every parameter as plain numbers."""
    return {name: parameter.flatten().tolist() for name, parameter in model.named_parameters()}


def main() -> None:
    """Run one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), branch()
    setattr(model, IGNORED, draws_in(model))
    wrapped = DistributedDataParallel(model)
    optimizer = LazyAdamW(model.parameters(), partial(split_parameters, model), **SETTINGS)
    seen = []
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            x, y, part = batch(step, micro, rank)
            model.draw(part)
            loss = F.cross_entropy(wrapped(x), y) / ACCUMULATE
            if micro == ACCUMULATE - 1:
                seen.append(model.up.used.tolist())
                loss.backward()
            else:
                with wrapped.no_sync():
                    loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = optimizer.state[model.up.weight]["step"].tolist()
    found = {"values": values(model), "seen": seen, "counts": counts}
    (Path(sys.argv[1]) / f"drawing-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
