"""(b) Many adapters on one base: a batch whose rows go through different ones, and the cost of holding them.

    python -m benchmarks.many_adapters [--quick] [--rounds 15] [--threads 1] [--clock cpu]

Routing: 32 rows through 32 LoRAs of rank 8 in one call, against 32 calls of one row each, against PEFT's
``adapter_names``, and against the same batch through one adapter, which is the least it could cost.
Holding: 1, 100 and 1,000 LoRAs on one model: time to add one more, to switch, and of a forward pass; memory of each.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import epitaxy
from benchmarks.bases import language_model
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import Case, Clock, interleave, memory, peak_of, quartiles, ratios, synchronise
from epitaxy.bench.tables import seconds, size, table

ROWS, RANK = 32, 8
METHOD = epitaxy.LoRA(("attention.q", "attention.v"), rank=RANK)


def fill(parameters: Any) -> None:
    """Random values: a fresh LoRA computes nothing that could be compared."""
    for parameter in parameters:
        nn.init.normal_(parameter.data, std=0.05)


def peft_config() -> Any:
    """PEFT's LoRA at the same places."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])


def peft_twin(model: nn.Module, base: nn.Module, names: list[str]) -> Any:
    """``base`` under PEFT with the same adapters as ``model`` has, values included."""
    from peft import get_peft_model

    wrapped = get_peft_model(base, peft_config(), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, peft_config())
    for name in names:
        for piece in epitaxy.adapters(model)[name].pieces:
            layer: Any = base.get_submodule(piece.path)
            layer.lora_A[name].weight.data = piece.module.down.data
            layer.lora_B[name].weight.data = piece.module.up.data
    return wrapped.eval()


def routing(quick: bool, rounds: int, length: int, clock: Clock) -> tuple[list[dict[str, Any]], float]:
    """Rows of the routing table for sequences of ``length``, and the largest difference between the ways."""
    rows = 4 if quick else ROWS
    shape = language_model(quick, rows, length)
    model, base = shape.model().eval(), shape.model().eval()
    for parameter, source in zip(base.parameters(), model.parameters(), strict=True):
        parameter.data = source.data
    names = [f"a{number}" for number in range(rows)]
    for name in names:
        fill(epitaxy.attach(model, METHOD, name).parameters())
    wrapped = peft_twin(model, base, names)
    tokens = shape.inputs()["input_ids"]
    outputs: dict[str, Tensor] = {}

    def routed() -> None:
        with torch.inference_mode(), epitaxy.route(model, names):
            outputs["route"] = model(input_ids=tokens).logits

    def inside() -> None:
        with torch.inference_mode():
            outputs["inside"] = model(input_ids=tokens).logits

    stack = ExitStack()

    def enter() -> None:
        stack.enter_context(epitaxy.route(model, names))
        inside()

    def separate() -> None:
        parts = []
        with torch.inference_mode():
            for number, name in enumerate(names):
                epitaxy.activate(model, name)
                parts.append(model(input_ids=tokens[number : number + 1]).logits)
        outputs["separate"] = torch.cat(parts)

    def named() -> None:
        with torch.inference_mode():
            outputs["peft"] = wrapped(input_ids=tokens, adapter_names=names).logits

    def single() -> None:
        epitaxy.activate(model, names[0])
        with torch.inference_mode():
            model(input_ids=tokens)

    cases: dict[str, Callable[[], Any] | Case] = {
        "route": routed,
        "route, block kept open": Case(inside, enter, stack.close),
        f"{rows} calls of one row": separate,
        "PEFT adapter_names": named,
        "one adapter for all rows": single,
    }
    spent = interleave(cases, rounds, clock=clock)
    apart = max(float((outputs["separate"] - outputs[way]).abs().max()) for way in ("route", "inside", "peft"))
    found = [
        {
            "rows x tokens": f"{rows} x {tokens.shape[1]}",
            "way": name,
            "time": seconds(quartiles(values)),
            "time / route": ratios(values, spent["route"]),
        }
        for name, values in spent.items()
    ]
    return found, apart / float(outputs["separate"].abs().max())


class Ours:
    """A model that holds many of our adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def add(self, name: str) -> None:
        epitaxy.attach(self.model, METHOD, name)

    def switch(self, name: str) -> None:
        epitaxy.activate(self.model, name)

    def remove(self, name: str) -> None:
        epitaxy.detach(self.model, name)


class Pefts:
    """A model that holds many of PEFT's adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.wrapped = model, None

    def add(self, name: str) -> None:
        from peft import get_peft_model

        if self.wrapped is None:
            self.wrapped = get_peft_model(self.model, peft_config(), adapter_name=name)
        else:
            self.wrapped.add_adapter(name, peft_config())

    def switch(self, name: str) -> None:
        assert self.wrapped is not None
        self.wrapped.set_adapter(name)

    def remove(self, name: str) -> None:
        assert self.wrapped is not None
        self.wrapped.delete_adapter(name)


def spend(clock: Clock, action: Callable[..., Any], *given: Any) -> float:
    """Seconds of one call."""
    start = clock()
    action(*given)
    synchronise()
    return clock() - start


def holding(side: str, counts: list[int], quick: bool, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Rows of the holding table for one side."""
    shape = language_model(quick, batch=1, length=16)
    model = shape.model().eval()
    holder: Ours | Pefts = Ours(model) if side == "ours" else Pefts(model)
    tokens = shape.inputs()["input_ids"]
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    held: list[str] = []
    first = spend(clock, holder.add, "a0")
    for count in counts:
        for number in range(max(1, len(held)), count):
            holder.add(f"a{number}")
        held = [f"a{number}" for number in range(count)]
        switches = [spend(clock, holder.switch, chance.choice(held)) for _ in range(max(5, rounds))]
        passes = [spend(clock, _forward, model, tokens) for _ in range(max(5, rounds) + 2)][2:]
        additions = []
        for number in range(5):
            additions.append(spend(clock, holder.add, "extra"))
            holder.switch(held[number % count])
            holder.remove("extra")
        rows.append(
            {
                "side": side,
                "held": count,
                "add one": seconds(quartiles(additions)),
                "switch": seconds(quartiles(switches)),
                "forward pass": seconds(quartiles(passes)),
                "memory of each": _memory_of_each(side, count, quick),
            }
        )
    rows[0]["add one"] += f" (first: {first * 1e3:.3g} ms)"
    values = sum(parameter.numel() for name, parameter in model.named_parameters() if "a0" in name.split("."))
    rows[0]["memory of each"] = f"{size(4 * values)} of parameters"
    return rows


def _memory_of_each(side: str, count: int, quick: bool) -> str:
    if count == 1 or sys.platform != "linux":
        return ""
    flags = ["--memory", side, "--held", str(count), *(["--quick"] if quick else [])]
    return size(peak_of(["-m", "benchmarks.many_adapters", *flags])["each"])


def grow(side: str, count: int, quick: bool) -> None:
    """Run in a process of its own, whose memory nothing else has used: print what each adapter after the first adds."""
    model = language_model(quick, batch=1, length=16).model().eval()
    holder: Ours | Pefts = Ours(model) if side == "ours" else Pefts(model)
    holder.add("a0")
    gc.collect()
    before = memory("VmRSS")
    for number in range(1, count):
        holder.add(f"a{number}")
    gc.collect()
    print("each", (memory("VmRSS") - before) / (count - 1))


def _forward(model: nn.Module, tokens: Tensor) -> None:
    with torch.inference_mode():
        model(input_ids=tokens)


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (3 if options.quick else 15)
    rows: list[dict[str, Any]] = []
    worst = 0.0
    for length in (16, 1):
        progress(f"routing, {length} tokens")
        found, apart = routing(options.quick, rounds, length, options.timer)
        rows += found
        worst = max(worst, apart)
    note = f"largest relative difference between the ways: {worst:.1e}"
    report.add("routing", f"A batch of rows with an adapter each ({note})", rows, table(rows))
    counts = [1, 3, 9] if options.quick else [1, 100, 1000]
    progress("holding, ours")
    held = holding("ours", counts, options.quick, rounds, options.timer)
    peers = [count for count in counts if count <= options.peft_limit]
    progress("holding, PEFT")
    held += holding("PEFT", peers, options.quick, rounds, options.timer)
    report.add("holding", "Holding many adapters", held, table(held))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peft-limit", type=int, default=100, help="most adapters to add to PEFT's side")
    parser.add_argument("--memory", choices=("ours", "PEFT"), help=argparse.SUPPRESS)
    parser.add_argument("--held", type=int, help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.memory:
        grow(options.memory, options.held, options.quick)
        return
    report = Report("many_adapters", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
