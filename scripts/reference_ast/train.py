"""Train the reference audio spectrogram transformer from scratch.

Four losses.  On the pooled token, which is what the classifier reads: the class of the sound, the voice or recording it
comes from (a second head, thrown away afterwards), and the direction of the teacher's features averaged over the clip
(a third, thrown away).  On the patches, averaged over the mel bands: the teacher's features at that time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scripts.reference_ast.assets import DEFAULT_CACHE
from scripts.reference_ast.data import (
    NO_LABEL,
    TEACHER_DIMENSIONS,
    Batch,
    draw_batch,
    identity_names,
    label_names,
    load_pool,
    statistics,
)
from scripts.reference_ast.model import CLIP_FRAMES, PATCH, build_model, export
from torch import Tensor, nn

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "src" / "epitaxy" / "models" / "reference_ast"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    steps: int = 2000
    batch: int = 96
    peak_rate: float = 1e-3
    warm_up: int = 120
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    identity_weight: float = 0.3
    pooled_weight: float = 1.0
    patches_weight: float = 2.0
    average_decay: float = 0.998


class Student(nn.Module):
    """The exported model plus the heads that only help its training."""

    def __init__(self, labels: list[str], identities: int, seed: int) -> None:
        super().__init__()
        self.model = build_model(labels, seed)
        width = self.model.config.hidden_size
        self.identity = nn.Linear(width, identities)
        self.pooled_to_teacher = nn.Linear(width, TEACHER_DIMENSIONS)
        self.patches_to_teacher = nn.Linear(width, TEACHER_DIMENSIONS)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores ``n classes``, scores ``n identities``, and teacher's features ``n d`` and ``n columns d``."""
        tokens = self.model.audio_spectrogram_transformer(inputs).last_hidden_state
        pooled = tokens[:, :2].mean(1)
        # Patches come frequency major: all columns of the lowest band first.
        columns = tokens[:, 2:].unflatten(1, (-1, CLIP_FRAMES // PATCH)).mean(1)
        return (
            self.model.classifier(pooled),
            self.identity(pooled),
            self.pooled_to_teacher(pooled),
            self.patches_to_teacher(columns),
        )


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warm_up:
        return recipe.peak_rate * (step + 1) / recipe.warm_up
    progress = (step - recipe.warm_up) / (recipe.steps - recipe.warm_up)
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(student: Student, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, norms and position embeddings are not decayed."""
    decayed = [p for name, p in student.named_parameters() if p.ndim >= 2 and "embeddings" not in name]
    chosen = {id(p) for p in decayed}
    rest = [p for p in student.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98))


def compute_losses(student: Student, batch: Batch, recipe: Recipe) -> list[Tensor]:
    """Class, identity, pooled and patches loss, in this order, each already weighted."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student(batch.inputs)
    by_label, by_identity, pooled, columns = (output.float() for output in outputs)

    def classify(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, ignore_index=NO_LABEL, label_smoothing=recipe.label_smoothing)

    return [
        classify(by_label, batch.label),
        recipe.identity_weight * classify(by_identity, batch.identity),
        recipe.pooled_weight * (1 - F.cosine_similarity(pooled, batch.teacher.mean(1), dim=-1)).mean(),
        recipe.patches_weight * (1 - F.cosine_similarity(columns, batch.teacher, dim=-1)).mean(),
    ]


@torch.no_grad()
def update_average(average: dict[str, Tensor], student: Student, step: int, decay: float) -> None:
    """Move the running average of the weights towards the present ones, quickly at first."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in student.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write next to the target and rename, so that an interruption never leaves half a file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(cache: Path, output: Path, recipe: Recipe, save_every: int) -> None:
    """Run, or continue, the training and export the averaged weights."""
    torch.use_deterministic_algorithms(True)
    pool = load_pool(cache, recipe.seed)
    normal = statistics(pool)
    student = Student(label_names(cache), len(identity_names(cache)), recipe.seed)
    optimizer = build_optimizer(student, recipe)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    start, seconds = 0, 0.0
    checkpoint = cache / f"checkpoint-{recipe.seed}-{recipe.steps}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    parameters = sum(p.numel() for p in student.model.parameters())
    print(
        json.dumps({"sounds": len(pool.label), "parameters": parameters, "normal": normal, "from": start}), flush=True
    )

    clock = time.perf_counter()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        losses = compute_losses(student, draw_batch(pool, step, recipe.seed, recipe.batch, normal), recipe)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_average(average, student, step, recipe.average_decay)
        done = step + 1
        if done % 20 == 0:
            spent = seconds + time.perf_counter() - clock
            values = [round(loss.item(), 4) for loss in losses]
            print(json.dumps({"step": done, "losses": values, "seconds": round(spent, 1)}), flush=True)
        if done % save_every == 0 or done == recipe.steps:
            spent = seconds + time.perf_counter() - clock
            parts = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save_checkpoint(checkpoint, {**parts, "step": done, "seconds": spent})
    student.load_state_dict(average)
    export(student.model, normal, output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the model is written")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps)
    train(arguments.cache, arguments.output, recipe, arguments.save_every)


if __name__ == "__main__":
    main()
