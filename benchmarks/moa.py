"""(d) Mixtures of adapters: our stacked form against the formula written out expert by expert.

    python -m benchmarks.moa [--quick] [--rounds 20] [--threads 1] [--clock cpu]

One module at the width of ViT-B and AST (768), forward and backward, the same weights on every side.

Dense-MoA: "stacked outputs" runs every expert on all tokens, holds the E results side by side and weights them;
"running sum" adds each weighted result to the last one.  Soft-MoA: "slot by slot" writes every slot's average and
every slot's share of the output by itself; "expert by expert" takes all averages in one product and all shares in
another, and only the experts one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import Clock, interleave, kept_for_backward, quartiles, ratios
from epitaxy.bench.tables import seconds, size, table
from epitaxy.methods.dense_moa import DenseMixture
from epitaxy.methods.experts import Experts
from epitaxy.methods.mixture import Mixture
from epitaxy.methods.soft_moa import SoftMixture

BATCH, TOKENS, WIDTH, BOTTLENECK = 2, 590, 768, 6  # 590 tokens: five seconds of sound in AST


class Expert(nn.Module):
    """One bottleneck adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, BOTTLENECK), nn.Linear(BOTTLENECK, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(F.gelu(self.down(x)))
        return out


class Written(nn.Module):
    """Experts as separate modules, with the weights of ``mixture``; ``gate`` maps features to one number per slot."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        stacked = mixture.experts
        width, count = stacked.down.shape[2], stacked.count
        self.experts = nn.ModuleList(Expert(width) for _ in range(count))
        self.gate = nn.Linear(width, count, bias=isinstance(mixture, DenseMixture))
        with torch.no_grad():
            for number, expert in enumerate(self.experts):
                expert.down.weight.copy_(stacked.down[number])
                expert.down.bias.copy_(stacked.down_bias[number])
                expert.up.weight.copy_(stacked.up[number].t())
                expert.up.bias.copy_(stacked.up_bias[number])
            if isinstance(mixture, DenseMixture):
                self.gate.weight.copy_(mixture.router)
                self.gate.bias.copy_(mixture.router_bias)
            elif isinstance(mixture, SoftMixture):
                self.gate.weight.copy_(mixture.phi.flatten(1).t())


class StackedOutputs(Written):
    """``sum_j P_j A_j(u)`` over the outputs of all experts side by side."""

    def forward(self, u: Tensor) -> Tensor:
        shares = torch.softmax(self.gate(u), -1)
        outputs = torch.stack([expert(u) for expert in self.experts], dim=2)  # b n e d
        return (shares.unsqueeze(-1) * outputs).sum(2)


class RunningSum(Written):
    """``sum_j P_j A_j(u)``, one expert added to the last."""

    def forward(self, u: Tensor) -> Tensor:
        shares = torch.softmax(self.gate(u), -1)
        out = torch.zeros_like(u)
        for number, expert in enumerate(self.experts):
            out = out + shares[..., number : number + 1] * expert(u)
        return out


class SlotBySlot(Written):
    """``S_i = sum_m D_mi u_m`` and ``sum_i C_mi A_i(S_i)``, one slot at a time."""

    def forward(self, u: Tensor) -> Tensor:
        logits = self.gate(u)
        dispatch, combine = torch.softmax(logits, 1), torch.softmax(logits, 2)
        out = torch.zeros_like(u)
        for number, expert in enumerate(self.experts):
            read = (dispatch[..., number : number + 1] * u).sum(1)
            out = out + combine[..., number : number + 1] * expert(read).unsqueeze(1)
        return out


class ExpertByExpert(Written):
    """The same with all averages in one product and all sums in one."""

    def forward(self, u: Tensor) -> Tensor:
        logits = self.gate(u)
        dispatch, combine = torch.softmax(logits, 1), torch.softmax(logits, 2)
        read = torch.einsum("bnd,bne->bed", u, dispatch)
        said = torch.stack([expert(read[:, number]) for number, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bed,bne->bnd", said, combine)


def sides(kind: str, count: int, width: int) -> dict[str, nn.Module]:
    """The ways to compute one mixture, ours first; all have the same weights."""
    torch.manual_seed(0)
    experts = Experts(count, width, BOTTLENECK, width)
    nn.init.normal_(experts.up, std=0.02)  # zero would hide a difference
    if kind == "Dense-MoA":
        dense = DenseMixture(experts)
        return {"ours": dense, "stacked outputs": StackedOutputs(dense), "running sum": RunningSum(dense)}
    soft = SoftMixture(experts)
    return {"ours": soft, "slot by slot": SlotBySlot(soft), "expert by expert": ExpertByExpert(soft)}


def compare(
    kind: str, count: int, shape: tuple[int, int, int], rounds: int, clock: Clock
) -> tuple[list[dict[str, Any]], float]:
    """A row for each way, and the largest difference between their outputs."""
    modules = sides(kind, count, shape[2])
    u, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            u.grad = None
            module.zero_grad()
            module(u).backward(upstream)

        return run

    with torch.no_grad():
        outputs = {name: module(u) for name, module in modules.items()}
    difference = max(float((output - outputs["ours"]).abs().max()) for output in outputs.values())
    spent = interleave({name: step(module) for name, module in modules.items()}, rounds, clock=clock)
    kept = {name: kept_for_backward(step(module), module) for name, module in modules.items()}
    rows = [
        {
            "mixture": kind,
            "experts": count,
            "way": name,
            "forward and backward": seconds(quartiles(spent[name])),
            "time / ours": ratios(spent[name], spent["ours"]),
            "kept for backward": size(kept[name]),
            "kept / ours": kept[name] / kept["ours"],
        }
        for name in modules
    ]
    return rows, difference


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (2 if options.quick else 20)
    shape = (2, 64, 128) if options.quick else (BATCH, TOKENS, WIDTH)
    rows, difference = [], 0.0
    for kind in ("Dense-MoA", "Soft-MoA"):
        for count in (7, 14):
            progress(f"{kind}, {count} experts")
            found, differs = compare(kind, count, shape, rounds, options.timer)
            rows += found
            difference = max(difference, differs)
    title = (
        f"Mixtures of adapters, width {shape[2]}, bottleneck {BOTTLENECK}, {shape[0]} x {shape[1]} tokens, against the "
        f"formula written out (largest difference between the ways {difference:.1e})"
    )
    report.add("moa", title, rows, table(rows))


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("moa", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
