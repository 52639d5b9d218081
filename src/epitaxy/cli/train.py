"""``epitaxy train``: carry out a recipe, or go on where it stopped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from epitaxy.cli import arguments


def command(
    recipe: arguments.Recipe,
    overrides: arguments.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")] = False,
) -> None:
    """Train an adapter, or the whole base, by a recipe.

    Everything is left in the run directory: recipe, log, checkpoints, adapter, result, report.  The same command
    again resumes a run that was stopped, and leaves a finished one alone.
    """
    if dry_run:
        from epitaxy.cli.plan import show

        show(recipe, overrides or [])
        return
    from epitaxy.cli.console import say
    from epitaxy.report import build_report
    from epitaxy.train.recipe_files import load_recipe
    from epitaxy.train.run import leads, run
    from epitaxy.train.run_directory import RESULT

    loaded = load_recipe(recipe, overrides or [])
    finished = (loaded.out / RESULT).exists()
    result = run(loaded)
    if not leads():
        return
    page = build_report(loaded.out)
    if finished:
        say(f"{loaded.out}: finished already; out=... starts another run")
    _summary(result)
    say(f"report    {page}")


def _left_out(result: dict[str, Any]) -> list[tuple[str, str]]:
    skipped = result["data"]["skipped"]
    if not skipped:
        return []
    name, why = skipped[0]
    return [("left out", f"{len(skipped):,} examples, the first is {name} ({why}); the report lists them")]


def _others(test: dict[str, Any]) -> str:
    unweighted = test.get("unweighted_accuracy")  # results of earlier versions have none
    return ("" if unweighted is None else f"unweighted {unweighted:.2%}, ") + f"macro F1 {test['macro_f1']:.3f}"


def _summary(result: dict[str, Any]) -> None:
    from epitaxy.cli.console import facts
    from epitaxy.report.figures import seconds, size

    test, counts = result["test"], result["data"]["counts"]
    facts(
        [
            ("method", result["method"]),
            (
                "accuracy",
                f"{test['accuracy']:.2%} on {counts['test']:,} test examples ({_others(test)})",
            ),
            *_left_out(result),
            ("trained", f"{result['trained_parameters']:,} parameters; the base has {result['base']['parameters']:,}"),
            ("file", f"{result['file']}, {size(result['file_bytes'])}"),
            *([("skipped", _skipped(result))] if result.get("skipped_steps") else []),
            ("time", f"{seconds(result['train_seconds'])} training, {seconds(result['seconds'])} in all"),
        ]
    )


def _skipped(result: dict[str, Any]) -> str:
    return f"{result['skipped_steps']:,} of {result['steps']:,} steps, whose loss or gradient was not finite"
