"""``epitaxy eval``: measure many adapters on one base, which is opened once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epitaxy.cli import arguments

if TYPE_CHECKING:
    from epitaxy.train.recipe import Recipe

OVERRIDE = re.compile(r"[a-z_]+(\.[A-Za-z0-9_]+)*=.*")
SPLITS = ("train", "validation", "test")


def command(
    target: Annotated[str, typer.Argument(metavar="BASE|RECIPE|RUN", help="A base, a recipe, or a run directory.")],
    overrides: arguments.Overrides = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapters", metavar="PATH...", help="Adapters or run directories, as many as there are."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The data, when TARGET is a base: a folder, a table, builtin:NAME.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batch: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 64,
    json: arguments.Json = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure many adapters on one base.

    Accuracy, unweighted accuracy, macro F1 and loss of each, and of the base alone where it has a head for these
    classes.
    """
    from epitaxy.cli.console import say, say_json, table
    from epitaxy.cli.opening import adapter_in
    from epitaxy.core.errors import EpitaxyError, nearest
    from epitaxy.train.evaluate import evaluate
    from epitaxy.train.run_directory import write_json

    if split not in SPLITS:
        raise EpitaxyError(f"no split is called {split!r}{nearest(split, SPLITS)}")
    recipe, paths = _understand(target, overrides or [], adapters or [], data)
    rows = [asdict(row) for row in evaluate(recipe, [adapter_in(path) for path in paths], split, batch, progress=True)]
    found = {"base": recipe.base.source, "data": recipe.data.source, "split": split, "results": rows}
    if out is not None:
        write_json(out, found)
    if json:
        say_json(found)
        return
    say(f"base {recipe.base.source}, data {recipe.data.source}, {rows[0]['examples']:,} examples of the {split} split")
    numbers = ("accuracy", "unweighted", "macro F1", "loss", "parameters", "seconds")
    table(
        ["adapter", "method", *numbers],
        [
            [
                row["adapter"] or "(none)",
                row["method"],
                f"{row['accuracy']:.4f}",
                f"{row['unweighted_accuracy']:.4f}",
                f"{row['macro_f1']:.4f}",
                f"{row['loss']:.4f}",
                f"{row['parameters']:,}",
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ],
        numbers,
    )


def spread(words: Sequence[str]) -> list[str]:
    """``--adapters a b c`` as ``--adapters a --adapters b --adapters c``, the only form that Typer knows."""
    result: list[str] = []
    listing = False
    for word in words:
        if word.startswith("-") or OVERRIDE.fullmatch(word):
            listing = word == "--adapters"
            if not listing:
                result.append(word)
        elif listing:
            result += ["--adapters", word]
        else:
            result.append(word)
    return result


def _understand(
    target: str, overrides: Sequence[str], adapters: Sequence[Path], data: str | None
) -> tuple[Recipe, list[Path]]:
    """The recipe whose base and data are meant, and the adapters."""
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.train.recipe import from_dict
    from epitaxy.train.recipe_files import change, load_recipe, shipped_recipes
    from epitaxy.train.run_directory import ADAPTER, MODEL, RECIPE, is_run

    run = Path(target)
    if is_run(run):
        recipe = _on(load_recipe(run / RECIPE, overrides), data)
        if recipe.full:
            recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"source": str(run / MODEL)})})
        return recipe, list(adapters) or ([] if recipe.full else [run / ADAPTER])
    if target.endswith((".yaml", ".yml")) or (not run.exists() and target in shipped_recipes()):
        recipe = _on(load_recipe(target, overrides), data)
        return recipe, list(adapters) or [recipe.out / ADAPTER]
    if data is None:
        raise EpitaxyError(f"{target}: taken as a base; say with --data what to evaluate it on")
    recipe = from_dict({"base": target, "method": "head", "data": data}, "command line")
    return change(recipe, overrides), list(adapters)


def _on(recipe: Recipe, data: str | None) -> Recipe:
    return recipe if data is None else recipe.model_copy(update={"data": replace(recipe.data, source=data)})
