"""(f) Training MoSA: against N literal copies, as it was published, and against the plain bottleneck.

    python -m benchmarks.mosa_training [--quick] [--rounds 10] [--threads 1] [--clock cpu]

The branch alone: forward and backward, without a norm and without the gradient of its input, at the width of ViT-B
(768), 64 hidden units, four parts, the tokens of four pictures.  The training step: ViT-B/16 with four of its twelve
blocks, four pictures, an AdaptFormer in every block; every side shares the same frozen weights.  Copies: a full copy of
the split projection for each part, one picked for each pass, gradients masked after the backward pass, AdamW.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tests.train.copies import Copies, copied
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import epitaxy
from benchmarks.bases import vit
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import interleave, most_kept, quartiles, ratios
from epitaxy.bench.tables import seconds, size, table
from epitaxy.methods.bottleneck import Bottleneck
from epitaxy.methods.mosa import MoSA
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.partition import split_parameters
from epitaxy.tasks.objective import Scores
from epitaxy.tasks.two_pass import TwoPass
from epitaxy.train.lazy_adam import LazyAdamW

COPIES, PLAIN = "N literal copies", "bottleneck"
METHODS: dict[str, Any] = {
    PLAIN: Bottleneck.adaptformer(),
    COPIES: MoSA.adaptformer(),
    "MoSA, element": MoSA.adaptformer(),
    "MoSA, out_slice": MoSA.adaptformer(partition="out_slice"),
    "MoSA, rank_slice": MoSA.adaptformer(partition="rank_slice"),
}
OBJECTIVES = {"one pass": None, "two, joint": TwoPass(form="joint"), "two, decoupled": TwoPass()}


def adapted(base: nn.Module, name: str, **changes: Any) -> nn.Module:
    """The base, its frozen weights shared, with one of ``METHODS`` attached, ``changes`` of its fields."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    torch.manual_seed(0)
    epitaxy.attach(model, replace(METHODS[name], **changes))
    if name == COPIES:
        copied(model)
    return model.train()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """Torch's AdamW, or where parameters are in parts the lazy one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(True for _ in split_parameters(model)):
        return LazyAdamW(trained, partial(split_parameters, model), lr=1e-3)
    return torch.optim.AdamW(trained, lr=1e-3)


def mask(model: nn.Module) -> None:
    """Of copies, keep of every gradient what the copy owns."""
    for module in model.modules():
        if isinstance(module, Copies):
            module.mask()


def training(model: nn.Module, batch: Any, objective: TwoPass | None, updates: Any) -> Callable[[], None]:
    """One training step."""
    task = Scores(
        lambda model, batch: model(batch["pixel_values"]).logits, lambda s, b: F.cross_entropy(s, b["labels"])
    )
    plain = TwoPass(every=10**9)  # a second pass at step 0 alone
    numbers = itertools.count(1)

    def step() -> None:
        (objective or plain).backward(model, batch, task, next(numbers))
        mask(model)
        updates.step()
        updates.zero_grad()

    return step


def branches(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module in the first block of each method."""
    for name in METHODS:
        model = adapted(base, name, norm="none", reads="sublayer")
        kinds = ("SparseMLP", "CopiedMLP", "TwoLayerMLP")
        found = next(module for module in model.modules() if type(module).__name__ in kinds)
        if isinstance(found, SparseMLP) or name == COPIES:
            found.clock.set(1)
        yield name, found


def of_the_branch(report: Report, base: nn.Module, x: Tensor, rounds: int, clock: Any) -> None:
    """Work and time of the branch alone."""
    modules = dict(branches(base))
    upstream = torch.randn_like(x)

    def step(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            module(x).backward(upstream)
            mask(module)

        return run

    work = {}
    for name, module in modules.items():
        with FlopCounterMode(display=False) as counter:
            step(module)()
        work[name] = counter.get_total_flops()
    spent = interleave({name: step(module) for name, module in modules.items()}, rounds, clock=clock)
    kept = {name: most_kept(step(module), module) for name, module in modules.items()}
    rows = [
        {
            "branch": name,
            "MFLOP": round(work[name] / 1e6, 1),
            "FLOP / bottleneck": work[name] / work[PLAIN],
            "forward and backward": seconds(quartiles(spent[name])),
            "time / bottleneck": ratios(spent[name], spent[PLAIN]),
            "kept for backward": size(kept[name]),
            "kept / bottleneck": kept[name] / kept[PLAIN],
        }
        for name in modules
    ]
    title = f"The branch of MoSA, {x.shape[0]} x {x.shape[1]} tokens of width {x.shape[2]}"
    report.add("mosa_branch", title, rows, table(rows))


def bytes_of(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def of_the_step(report: Report, base: nn.Module, batch: Any, rounds: int, clock: Any) -> None:
    """Time and memory of training steps."""
    models = {name: adapted(base, name) for name in METHODS}
    updates = {name: optimiser(model) for name, model in models.items()}
    cases = {
        (name, form): training(models[name], batch, objective, updates[name])
        for name in METHODS
        for form, objective in OBJECTIVES.items()
    }
    spent = interleave({f"{name}|{form}": step for (name, form), step in cases.items()}, rounds, 1, clock=clock)
    times = {(name, form): spent[f"{name}|{form}"] for name, form in cases}
    kept = {(name, form): most_kept(step, models[name]) for (name, form), step in cases.items()}
    rows = [
        {
            "passes": form,
            "adapter": name,
            "step": seconds(quartiles(times[name, form])),
            "time / copies": ratios(times[name, form], times[COPIES, form]),
            "time / bottleneck": ratios(times[name, form], times[PLAIN, form]),
            "time / bottleneck, one pass": ratios(times[name, form], times[PLAIN, "one pass"]),
            "most kept for backward": size(kept[name, form]),
            "kept / bottleneck, one pass": kept[name, form] / kept[PLAIN, "one pass"],
        }
        for form in OBJECTIVES
        for name in METHODS
    ]
    report.add("mosa_step", "A training step of MoSA", rows, table(rows))
    while any(0 in state["step"] for update in updates.values() for state in update.state.values()):
        for step in cases.values():  # until every part has been drawn
            step()
    held = {name: bytes_of(t for s in updates[name].state.values() for t in s.values()) for name in METHODS}
    weights = {name: bytes_of(p for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    rows = [
        {
            "adapter": name,
            "trained weights": size(weights[name]),
            "weights / bottleneck": weights[name] / weights[PLAIN],
            "optimiser state": size(held[name]),
            "state / bottleneck": held[name] / held[PLAIN],
        }
        for name in METHODS
    ]
    report.add("mosa_state", "What training MoSA holds", rows, table(rows))


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (2 if options.quick else 10)
    shape = vit(options.quick, batch=2 if options.quick else 4)
    base, batch = shape.model(2 if options.quick else 4), shape.inputs()
    width = base.config.hidden_size  # type: ignore[union-attr]
    tokens = (batch["pixel_values"].shape[-1] // 16) ** 2 + 1
    progress("the branch alone")
    of_the_branch(report, base, torch.randn(len(batch["labels"]), tokens, width), 2 * rounds, options.timer)
    progress("training steps")
    of_the_step(report, base, batch, rounds, options.timer)


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("mosa_training", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
