"""One page about several runs: methods against each other, each over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import write_atomically
from epitaxy.report.charts import Mark, Series, line_chart, point_chart
from epitaxy.report.curves import points, validation_metric
from epitaxy.report.page import PAGE, render
from epitaxy.report.read import Run, read_run
from epitaxy.report.samples import samples_of

# Keys in which the runs of one method may differ: seeds (a method's own too), and the folds of a cross-validation.
FREE = {"name", "out", "samples", "train.seed", "data.seed", "data.shots_seed", "data.fold"}


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seed or fold alone; ``spread`` is the sample standard deviation."""

    title: str
    runs: Sequence[Run]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run."""
        return [float(result["test"]["accuracy"]) for result in self.results]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """Result of each run."""
        return [run.result for run in self.runs if run.result is not None]

    @property
    def accuracy(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """How much the accuracy varies from run to run; one run cannot tell."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def mean(self, key: str) -> float:
        """Mean of a number in the results."""
        return statistics.fmean(float(result[key]) for result in self.results)


def group_runs(paths: Iterable[Path]) -> list[Group]:
    """Read runs and put those of one recipe together, in the order they are met; unfinished runs are an error."""
    groups: dict[str, list[Run]] = {}
    for path in paths:
        run = read_run(path)
        if run.result is None:
            raise EpitaxyError(f"{path}: this run is not finished; finish it with epitaxy train")
        groups.setdefault(repr(sorted(_recipe_key(run.recipe))), []).append(run)
    if not groups:
        raise EpitaxyError("there are no runs to compare")
    methods = [_title(runs[0].result or {}) for runs in groups.values()]
    return [
        Group(method if methods.count(method) == 1 else f"{method}, {runs[0].name}", runs)
        for method, runs in zip(methods, groups.values(), strict=True)
    ]


def _title(result: Mapping[str, Any]) -> str:
    """The method, and the objective where it is not the plain loss."""
    objective = result.get("objective")
    return str(result["method"]) + ("" if objective is None else f", {objective}")


def _recipe_key(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _recipe_key(value, f"{dotted}.")
        elif dotted == "method":
            yield dotted, repr([{name: field for name, field in entry.items() if name != "seed"} for entry in value])
        elif dotted not in FREE:
            yield dotted, repr(value)


def build_comparison(paths: Sequence[Path], out: Path, title: str = "Comparison") -> Path:
    """Write the page about the runs in ``paths`` to ``out``; returns ``out``."""
    groups = group_runs(paths)
    best = max(groups, key=lambda group: group.accuracy)
    classes = {len(group.results[0]["data"]["classes"]) for group in groups}
    marks = [
        Mark(group.title, group.mean("trained_parameters"), group.accuracy, group.spread or 0.0, group.accuracies)
        for group in groups
    ]
    metric = validation_metric(groups[0].runs[0])
    page = render(
        "comparison.html.j2",
        title=title,
        groups=groups,
        best=best,
        setting=list(dict.fromkeys(_setting(group.results[0]) for group in groups)),
        chance=1 / classes.pop() if len(classes) == 1 else None,
        points=point_chart(marks, "Accuracy against trained parameters", "trained parameters", "test accuracy"),
        curves=line_chart(
            [Series(group.title, _mean_curve(group, metric)) for group in groups],
            f"Validation {metric} during training, mean over seeds",
            "share of training done",
            metric,
        ),
        samples=samples_of(best.runs[0]),
        links=[(group, [(run, _link(run.path, out)) for run in group.runs]) for group in groups],
        environment=groups[0].runs[0].environment,
    )
    write_atomically(out, page.encode())
    return out


def _setting(result: Mapping[str, Any]) -> str:
    """What was adapted, and to what."""
    base, data = result["base"], result["data"]
    return (
        f"{base['source']} ({base['parameters']:,} parameters) adapted to {data['source']}: {len(data['classes'])} "
        f"classes, {data['counts']['train']:,} training and {data['counts']['test']:,} test examples."
    )


def _mean_curve(group: Group, metric: str) -> list[tuple[float, float]]:
    """The metric at each evaluation that all seeds had, against the share of all steps."""
    curves = [points(run, f"validation_{metric}") for run in group.runs]
    length = min(len(curve) for curve in curves)
    steps = max((curve[-1][0] for curve in curves if curve), default=0.0)
    if not length or not math.isfinite(steps) or not steps:
        return []
    return [(curves[0][n][0] / steps, statistics.fmean(curve[n][1] for curve in curves)) for n in range(length)]


def _link(run: Path, out: Path) -> str | None:
    """The run's own page, relative to this one, if there is one."""
    page = run / PAGE
    if not page.is_file():
        return None
    try:
        return page.resolve().relative_to(out.resolve().parent).as_posix()
    except ValueError:
        return None
