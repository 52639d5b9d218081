"""(e) A training step of each adapter on a frozen AST, against the least that any adapter could cost.

    python -m benchmarks.adapter_training [--quick] [--rounds 10] [--threads 1] [--clock cpu]

The least: the frozen forward pass, and the backward pass through its activations down to the first block, without the
gradient of a single weight.  AST of published width (768) with four of its twelve blocks, two clips of four seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import epitaxy
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import interleave, kept_for_backward, quartiles, ratios
from epitaxy.bench.tables import seconds, size, table

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
    "deep prompts, 25": epitaxy.Prompt(tokens=25, deep=True),
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
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step() -> None:
        model(inputs).logits.sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (2 if options.quick else 10)
    inputs = torch.randn(2, 64 if options.quick else 400, 128)
    models = {name: base(options.quick) for name in [BOUND, *METHODS, "full fine-tuning"]}
    steps = {
        name: bound(model, inputs) if name == BOUND else adapted(model, inputs, METHODS.get(name))
        for name, model in models.items()
    }
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


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("adapter_training", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
