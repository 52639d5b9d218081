"""(e) A training step of each adapter on a frozen AST, against the least that any adapter could cost.

    python -m benchmarks.adapter_training [--quick] [--rounds 10] [--threads 1] [--clock cpu]

The least: the frozen forward pass, and the backward pass through its activations down to the first block, without the
gradient of a single weight.  AST of published width (768) with four of its twelve blocks, two clips of four seconds.

Two methods cost more than that least in any form, so they stand beside the plainest one written by hand: BitFit by
unfreezing the base's own biases, whose gradients sum over all tokens, and prompts by one concatenation, since 25 tokens
more are 5 % more work.  Memory: what autograd keeps for the backward pass, exact; and the peak of a process of its own
in three training steps with AdamW, less the peak of one that only runs the frozen model forward.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import epitaxy
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import interleave, kept_for_backward, peak_of, quartiles, ratios
from epitaxy.bench.tables import seconds, size, table

FORWARD, FULL = "frozen forward alone", "full fine-tuning"
PROMPTS = 25
BOUND = "frozen forward, activations backward"
METHODS: dict[str, Any] = {
    "LoRA, rank 6": epitaxy.LoRA(rank=6),
    "bottleneck 12, Pfeiffer": epitaxy.Bottleneck(bottleneck=12, activation="gelu"),
    "bottleneck 12, Houlsby": epitaxy.Bottleneck(at=("attention", "mlp"), bottleneck=12, activation="gelu"),
    "Conformer 8, kernel 31": epitaxy.Conformer(bottleneck=8, kernel=31),
    "grid convolution 8": epitaxy.GridConv(bottleneck=8),
    "Dense-MoA, 7 experts": epitaxy.DenseMoA(experts=7, bottleneck=6),
    "Soft-MoA, 7 experts": epitaxy.SoftMoA(experts=7, bottleneck=6),
    "BitFit": epitaxy.BitFit(),
    "deep prompts, 25": epitaxy.Prompt(tokens=PROMPTS, deep=True),
    "prefix, 12 rows": epitaxy.Prefix(tokens=12),
}


def base(quick: bool) -> nn.Module:
    """An AST with random weights; always the same."""
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    width, depth, frames = (32, 2, 64) if quick else (768, 4, 400)
    heads = 2 if quick else 12
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return ASTForAudioClassification(
        ASTConfig(**sizes, intermediate_size=4 * width, max_length=frames, attn_implementation="sdpa")
    )


def bound(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """One step of the least work: no weight asks for a gradient, the embedded patches do."""
    model.requires_grad_(False).train()
    embeddings: Any = model.get_submodule("audio_spectrogram_transformer.embeddings")
    embeddings.register_forward_hook(lambda _module, _given, output: output.requires_grad_())

    def step() -> None:
        model(inputs).logits.sum().backward()

    return step


def adapted(model: nn.Module, inputs: Tensor, method: Any) -> Callable[[], None]:
    """One training step of an adapter with AdamW; None: of every weight."""
    trained = list(model.parameters()) if method is None else list(epitaxy.attach(model, method).parameters())
    model.train()
    return _stepping(model, inputs, trained)


def biases_by_hand(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """BitFit without us: the base's own biases ask for gradients, all but the task head's."""
    model.requires_grad_(False).train()
    trained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not name.startswith("classifier.dense."):
            trained.append(parameter.requires_grad_())
    return _stepping(model, inputs, trained)


def prompts_by_hand(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """Shallow prompts without us: put before the sequence once and never taken out."""
    model.requires_grad_(False).train()
    embeddings: Any = model.get_submodule("audio_spectrogram_transformer.embeddings")
    prompts = nn.Parameter(0.02 * torch.randn(1, PROMPTS, model.config.hidden_size))  # type: ignore[union-attr]
    embeddings.register_forward_hook(
        lambda _module, _given, output: torch.cat([prompts.expand(len(output), -1, -1), output], dim=1)
    )
    return _stepping(model, inputs, [prompts])


def _stepping(model: nn.Module, inputs: Tensor, trained: list[nn.Parameter]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(inputs).logits.sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


BY_HAND: Mapping[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
    "BitFit by hand, in the base": biases_by_hand,
    f"shallow prompts by hand, {PROMPTS}": prompts_by_hand,
}
CASES = (BOUND, *METHODS, *BY_HAND, FULL)


def clips(quick: bool) -> Tensor:
    """The batch."""
    return torch.randn(2, 64 if quick else 400, 128)


def prepared(name: str, model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """One step of the case called ``name``."""
    if name == BOUND:
        return bound(model, inputs)
    if name in BY_HAND:
        return BY_HAND[name](model, inputs)
    return adapted(model, inputs, METHODS.get(name))


def peak(name: str, quick: bool) -> None:
    """Run in a process of its own: print the most resident memory it ever had."""
    model, inputs = base(quick), clips(quick)
    if name == FORWARD:
        model.requires_grad_(False)
        with torch.no_grad():
            for _ in range(3):
                model(inputs)
    else:
        step = prepared(name, model, inputs)
        for _ in range(3):
            step()
    unit = 1 if sys.platform == "darwin" else 1024
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def peaks(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Rows of the memory table: the peak of each case over that of the frozen forward pass, a process for each."""
    found: dict[str, list[float]] = {name: [] for name in (FORWARD, *CASES)}
    for number in range(repeats):
        for name, values in found.items():
            progress(f"peak {number + 1} of {repeats}: {name}")
            flags = ["--peak", name, *(["--quick"] if quick else [])]
            values.append(peak_of(["-m", "benchmarks.adapter_training", *flags])["peak"])
    over = {
        name: [value - least for value, least in zip(values, found[FORWARD], strict=True)]
        for name, values in found.items()
    }
    return [
        {
            "method": name,
            "over the frozen forward": size(max(quartiles(over[name]).median, 0.0)),
            "/ full fine-tuning": ratios(over[name], over[FULL]),
        }
        for name in CASES
    ]


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (2 if options.quick else 10)
    inputs = clips(options.quick)
    models = {name: base(options.quick) for name in CASES}
    steps = {name: prepared(name, model, inputs) for name, model in models.items()}
    progress("training steps of each method")
    spent = interleave(steps, rounds, warmup=1, clock=options.timer)
    rows = [
        {
            "method": name,
            "step": seconds(quartiles(spent[name])),
            "bound / step": ratios(spent[BOUND], spent[name]),
            "kept for backward": size(kept_for_backward(lambda model=model: model(inputs).logits, model)),  # type: ignore[misc]
        }
        for name, model in models.items()
    ]
    report.add(
        "training", "Training an adapter of an audio transformer against the least it could cost", rows, table(rows)
    )
    rows = peaks(options.quick, 1 if options.quick else 3)
    title = "Peak memory of training an adapter of an audio transformer, over running the frozen model"
    report.add("peak", title, rows, table(rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peak", choices=(FORWARD, *CASES), help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.peak:
        peak(options.peak, options.quick)
        return
    report = Report("adapter_training", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
