"""``epitaxy plan``: what a recipe will cost and give, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epitaxy.cli import arguments

if TYPE_CHECKING:
    from epitaxy.train.plan import Objective, Plan


def command(
    recipe: arguments.Recipe,
    overrides: arguments.Overrides = None,
    probe: Annotated[bool, typer.Option(help="Measure a few steps for the estimates of time and memory.")] = True,
    json: arguments.Json = False,
) -> None:
    """Tell what a recipe will cost and give.

    Parameters, file size, memory, time, whether the result merges or folds, and to what it exports.
    """
    show(recipe, overrides or [], probe, json)


def show(recipe: str, overrides: Sequence[str], probe: bool = True, json: bool = False) -> None:
    """Print the plan of a recipe."""
    import epitaxy.interop  # noqa: F401  (registers the formats of other programs)
    from epitaxy.cli.console import say, say_json
    from epitaxy.train.plan import plan
    from epitaxy.train.recipe_files import load_recipe

    loaded = load_recipe(recipe, overrides)
    found = plan(loaded, measure=probe, progress=True)
    if json:
        say_json({**asdict(found), "recipe": loaded.to_dict()})
        return
    say(loaded.to_yaml())
    _print(found)


def _print(plan: Plan) -> None:
    from epitaxy.cli.console import facts, say
    from epitaxy.report.figures import size

    counts, share = plan.data["counts"], plan.trained_parameters / plan.base_parameters
    examples = ", ".join(f"{counts[part]:,} {part}" for part in ("train", "validation", "test"))
    classes, skipped = len(plan.data["classes"]), plan.data["skipped"]
    facts(
        [
            ("method", plan.title),
            ("base", f"{plan.base}, {plan.base_parameters:,} parameters, task head {plan.head}"),
            ("data", f"{plan.data['source']}: {classes} classes; examples: {examples}; {skipped} skipped"),
            *([("front end", _front_end(plan.data["front_end"]))] if plan.data["front_end"] else []),
            ("trains", f"{plan.trained_parameters:,} parameters, {share:.2%} of the base's number"),
            ("stores", f"{plan.stored_parameters:,} values, {plan.file_bytes:,} bytes ({size(plan.file_bytes)})"),
            ("steps", f"{plan.steps:,}"),
            *([("objective", _objective(plan.objective))] if plan.objective else []),
        ]
    )
    say("places")
    for place in plan.places:
        say(f"  {place}")
    for note in plan.data["notes"]:
        say(f"note: {note}")
    for name, why in plan.data["left_out"]:
        say(f"left out: {name}: {why}")
    _print_costs(plan)
    say(f"merges: {'yes' if plan.merge.possible else 'no'}, {plan.merge.reason}")
    say(f"folds: {'yes' if plan.fold.possible else 'no'}, {plan.fold.reason}")
    say("exports")
    for export in plan.exports:
        say(f"  {export.name}: {'yes' if export.possible else 'no'}" + (f", {export.reason}" if export.reason else ""))


def _objective(objective: Objective) -> str:
    return (
        f"{objective.title}; about {objective.work:.3g} times the work and {objective.activations:.3g} times the "
        "activations of a plain step"
    )


def _front_end(settings: Mapping[str, Any]) -> str:
    """The settings that are in force, in one line."""
    shown = {key: value for key, value in settings.items() if value is not None and value is not False}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _print_costs(plan: Plan) -> None:
    from epitaxy.cli.console import facts, say
    from epitaxy.report.figures import seconds, size

    memory = plan.memory
    parts = [
        ("base", size(memory.base)),
        ("trained", size(memory.trained)),
        ("gradients", size(memory.gradients)),
        ("optimizer", f"{size(memory.optimizer)} (AdamW, two moments)"),
    ]
    if memory.activations is None:
        parts.append(("activations", "not measured"))
    else:
        parts.append(("activations", f"{size(memory.activations)} (kept for backward, counted in one step)"))
    say(f"memory: about {size(memory.total)} of tensors on {plan.device}; the program itself comes on top")
    facts(parts, indent="  ")
    if plan.time is None:
        say("time: not measured")
        return
    time = plan.time
    say(
        f"time: about {seconds(time.total)}: {seconds(time.training)} training ({plan.steps:,} steps of "
        f"{time.step:.3f} s) and {seconds(time.evaluation)} evaluation"
    )
    say(f"  an estimate from {time.measured_steps} steps and one evaluated batch, measured now on this machine")
