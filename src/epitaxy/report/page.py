"""``report.html`` of one run: a single file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epitaxy.core.storage import write_atomically
from epitaxy.report import figures
from epitaxy.report.confusion import confusion_of
from epitaxy.report.curves import curves_of, update_charts
from epitaxy.report.experts import expert_use_of
from epitaxy.report.read import Run, read_run
from epitaxy.report.samples import samples_of

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
LISTED = 500  # examples that were left out; more are in result.json
KINDS = {"vision": "pictures", "audio": "sounds", "text": "texts"}


def build_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in directory ``run``; an unfinished run gets the part that is known.

    Returns the path of the page, by default ``report.html`` in the run directory.
    """
    page = out or run / PAGE
    write_atomically(page, render("run.html.j2", **content(read_run(run))).encode())
    return page


def content(run: Run) -> dict[str, Any]:
    """Everything the template of one run is filled with."""
    result, predictions = run.result, run.predictions
    confusion = confusion_of(predictions["classes"], predictions["confusion"]) if predictions else None
    return {
        "title": run.name,
        "run": run,
        "result": result,
        "facts": _facts(result) if result else [],
        "skipped": [tuple(entry) for entry in result["data"]["skipped"][:LISTED]] if result else [],
        "unlisted": max(0, len(result["data"]["skipped"]) - LISTED) if result else 0,
        "costs": _costs(result) if result else [],
        "curves": curves_of(run),
        "updates": update_charts(run),
        "expert_use": expert_use_of(run),
        "confusion": confusion,
        "samples": samples_of(run),
        "environment": list(_flat(run.environment)),
    }


def render(template: str, **values: Any) -> str:
    """A template as text; whatever is filled in is escaped."""
    return _templates().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("epitaxy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=figures.count, percent=figures.percent, size=figures.size, seconds=figures.seconds)
    return environment


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, base = result["data"], result["base"]
    counts = data["counts"]
    facts = [
        ("Method", result["method"]),
        ("Base", f"{base['source']} ({base['class']}, {base['parameters']:,} parameters, frozen)"),
        ("Data", f"{data['source']}: {len(data['classes'])} classes of {KINDS[data['modality']]}"),
        ("Examples", f"{counts['train']:,} training, {counts['validation']:,} validation, {counts['test']:,} test"),
        ("Seed", str(result["seed"])),
        ("Steps", _steps(result)),
    ]
    if result.get("objective"):
        facts.append(("Objective", str(result["objective"])))
    if result["method"] == "full fine-tuning":
        facts[1] = ("Base", f"{base['source']} ({base['class']}, {base['parameters']:,} parameters, all trained)")
    if "normalisation" in data:
        facts.append(("Normalisation of pixels", normalisation_shown(data["normalisation"])))
    if "groups" in result:
        own = (f"{name} {one['accuracy']:.2%} of {one['examples']:,}" for name, one in result["groups"].items())
        facts.append(("Sets", ", ".join(own)))
    return facts + [("Note", note) for note in data["notes"]]


def normalisation_shown(used: Mapping[str, Any]) -> str:
    """Which normalisation of pictures a result was got with, in a few words."""
    if used["mean"] is None:
        return "the model's own processor"
    name = {"processor": "the model's own processor", "model": "the model's own"}.get(used["name"], used["name"])
    return f"{name}: mean {', '.join(f'{n:g}' for n in used['mean'])}; std {', '.join(f'{n:g}' for n in used['std'])}"


def _steps(result: Mapping[str, Any]) -> str:
    text = f"{result['steps']:,}"
    if result["validation"]["step"] is not None:
        text += f", the best on validation after {result['validation']['step']:,}"
    if result.get("skipped_steps"):
        text += f", {result['skipped_steps']:,} skipped because loss or gradient was not finite"
    return text + (", stopped early" if result["stopped_early"] else "")


def _costs(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory, base = result["peak_memory"], result["base"]["parameters"]
    share = result["trained_parameters"] / base
    return [
        ("Trained parameters", f"{result['trained_parameters']:,} ({share:.3%} of the base's {base:,})"),
        ("Stored values", f"{result['stored_parameters']:,}"),
        ("File", f"{result['file']}: {result['file_bytes']:,} bytes ({figures.size(result['file_bytes'])})"),
        ("Training time", figures.seconds(result["train_seconds"])),
        ("Time in all", figures.seconds(result["seconds"])),
        ("Peak memory", f"{figures.size(memory['bytes'])}, {memory['what']}"),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield (
                f"{prefix}{key}".replace("_", " "),
                " ".join(map(str, value)) if isinstance(value, list) else str(value),
            )
