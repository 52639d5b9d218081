"""``epitaxy demo``: several ways to adapt a shipped model to classes it has not seen, side by side."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epitaxy.data.splits import Splits
    from epitaxy.report.comparison import Group
    from epitaxy.train.recipe import Recipe

PAGE = "report.html"


@dataclass(frozen=True)
class Demo:
    """One demonstration: recipes in ``folder`` of the shipped ones; ``short`` is what stands for them all.

    The first run of ``folded`` is shown as a plain model in the end, too.
    """

    folder: str
    recipes: tuple[str, ...]
    short: tuple[str, ...]
    title: str
    folded: str | None = None


DEMOS = {
    "vision": Demo(
        "demo",
        ("linear-probe", "bitfit", "deep-prompt", "bottleneck", "bottleneck-consistency", "mosa", "lora", "full"),
        ("linear-probe", "lora", "mosa"),
        "Ways to adapt a frozen ViT",
        "mosa",
    ),
    "audio": Demo(
        "demo/audio",
        ("linear-probe", "lora", "bottleneck", "conformer", "grid-conv", "soft-moa", "full"),
        ("linear-probe", "lora", "conformer"),
        "Ways to adapt a frozen audio spectrogram transformer",
    ),
}


def command(
    system: Annotated[str, typer.Argument(help=f"What to show: {', '.join(DEMOS)}.")] = "vision",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The directory for all runs and the report.", show_default="demo-run/SYSTEM"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each method.")] = 3,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this one; may be repeated.", show_default="all")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="One seed of the two or three methods that tell most.")
    ] = False,
) -> None:
    """Adapt a small shipped model in several ways, print one table.

    Accuracy with its spread over seeds, trained parameters, file size and time; the page has more.

    A few minutes on two cores.  The same command again goes on where it was stopped.
    """
    from epitaxy.cli.console import say
    from epitaxy.core.errors import EpitaxyError, nearest
    from epitaxy.report import build_comparison
    from epitaxy.report.comparison import group_runs
    from epitaxy.report.figures import seconds

    if system not in DEMOS:
        raise EpitaxyError(f"there is no demo of {system!r}{nearest(system, DEMOS)}")
    demo = DEMOS[system]
    for name in methods or ():
        if name not in demo.recipes:
            raise EpitaxyError(f"the demo of {system} has no method {name!r}{nearest(name, demo.recipes)}")
    chosen = [name for name in demo.recipes if name in (methods or (demo.short if short else demo.recipes))]
    out = Path("demo-run") / system if out is None else out
    began = time.perf_counter()
    runs = _run_all([f"{demo.folder}/{name}" for name in chosen], 1 if short else seeds, out)
    page = build_comparison(runs, out / PAGE, demo.title)
    _print(group_runs(runs))
    if demo.folded in chosen:
        _show_folded(next(run for run in runs if run.name == f"{demo.folded}-seed0"))
    say(f"\n{len(runs)} runs in {seconds(time.perf_counter() - began)}; report: {page}")


def _run_all(names: Sequence[str], seeds: int, out: Path) -> list[Path]:
    """Carry out every run that is not finished yet; returns the run directories."""
    from epitaxy.cli.console import say
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.data.splits import load_splits
    from epitaxy.report import build_report
    from epitaxy.report.figures import seconds
    from epitaxy.train.checkpoint import FOLDER
    from epitaxy.train.recipe_files import load_recipe
    from epitaxy.train.run import run
    from epitaxy.train.run_directory import RESULT

    if out.exists() and not out.is_dir():
        raise EpitaxyError(f"{out}: expected a directory for the demo, found a file")
    plans = [_seeded(load_recipe(f"shipped:{name}"), seed, out) for name in names for seed in range(seeds)]
    data: dict[str, Splits] = {}
    for number, recipe in enumerate(plans, start=1):
        if not (recipe.out / RESULT).exists() and recipe.data.source not in data:
            data[recipe.data.source] = load_splits(recipe.data)
        result = run(recipe, data.get(recipe.data.source), progress=sys.stderr.isatty())
        shutil.rmtree(recipe.out / FOLDER, ignore_errors=True)  # of no use any more, and large for the full model
        build_report(recipe.out)
        say(
            f"[{number}/{len(plans)}] {recipe.name}: accuracy {result['test']['accuracy']:.1%}, "
            f"{seconds(result['train_seconds'])}"
        )
    return [recipe.out for recipe in plans]


def _seeded(recipe: Recipe, seed: int, out: Path) -> Recipe:
    name = f"{recipe.name}-seed{seed}"
    method = tuple({**entry, "seed": seed} if "seed" in entry else entry for entry in recipe.method)
    train = replace(recipe.train, seed=seed)
    return recipe.model_copy(update={"name": name, "out": out / name, "method": method, "train": train})


def _show_folded(run: Path) -> None:
    """Fold the adapter of a run into a plain model and compare both on the test split."""
    import torch

    from epitaxy import fold
    from epitaxy.cli.console import say
    from epitaxy.core.files import load
    from epitaxy.data.splits import load_splits
    from epitaxy.models.opening import open_classifier
    from epitaxy.tasks.classification import Classification
    from epitaxy.train.run_directory import ADAPTER, read_recipe

    recipe = read_recipe(run)
    splits = load_splits(recipe.data)
    opened = open_classifier(recipe.base.source, splits.classes)
    adapter = load(opened.model, run / ADAPTER)
    own = sum(tensor.numel() for tensor in opened.model.state_dict().values())
    plain = fold(opened.model.eval()).eval()
    task = Classification(opened, splits.classes)
    batch = task.batch([splits.test[number] for number in range(0, len(splits.test), 5)])
    with torch.inference_mode():
        scores, folded = (task.logits(model, batch) for model in (opened.model, plain))
    same = int((scores.argmax(-1) == folded.argmax(-1)).sum())
    say(
        f"\n{run.name} folded into a plain {type(plain).__name__}: "
        f"{sum(tensor.numel() for tensor in plain.state_dict().values()):,} parameters and no adapter, where base and "
        f"adapter have {own:,} ({adapter.size():,} of them the adapter's); on {len(scores)} test pictures "
        f"{same} of the answers are the same, and scores differ by at most {(scores - folded).abs().max():.0e}"
    )


def _print(groups: Sequence[Group]) -> None:
    from epitaxy.cli.console import say, table
    from epitaxy.report.figures import count, seconds, size

    first = groups[0].results[0]
    classes, test = len(first["data"]["classes"]), first["data"]["counts"]["test"]
    say(
        f"\n{first['base']['source']} ({first['base']['parameters']:,} parameters) on {first['data']['source']}: "
        f"{classes} unseen classes, accuracy on {test:,} test examples (guessing: {1 / classes:.1%})\n"
    )
    numbers = ("accuracy", "spread", "trained parameters", "file", "training time")
    table(
        ["method", *numbers],
        [
            [
                group.title,
                f"{group.accuracy:.1%}",
                "one seed" if group.spread is None else f"± {100 * group.spread:.1f}",
                count(group.mean("trained_parameters")),
                size(group.mean("file_bytes")),
                seconds(group.mean("train_seconds")),
            ]
            for group in groups
        ],
        numbers,
    )
