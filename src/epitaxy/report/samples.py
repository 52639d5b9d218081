"""The grid of examples: what was shown to the model, what it said, and what was right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from epitaxy.report.charts import waveform
from epitaxy.report.figures import percent
from epitaxy.report.read import Run, data_uri


@dataclass(frozen=True)
class Sample:
    """One example, ready for the page."""

    name: str
    content: Markup
    right: bool
    target: str
    said: str
    confidence: str


def samples_of(run: Run) -> list[Sample]:
    """The stored examples of a run, mistakes first."""
    if run.predictions is None:
        return []
    return [_sample(run, run.predictions, entry) for entry in run.predictions.get("samples", [])]


def _sample(run: Run, found: Mapping[str, Any], entry: Mapping[str, Any]) -> Sample:
    place, classes = entry["index"], found["classes"]
    target, said = classes[found["targets"][place]], classes[found["predictions"][place]]
    name, right = str(found["names"][place]), target == said
    verdict = f"{target}, recognised" if right else f"{target}, taken for {said}"
    name = "/".join(name.replace("\\", "/").split("/")[-2:])  # class folder and file
    return Sample(name, _content(run, entry, verdict), right, target, said, percent(found["confidences"][place], 0))


def _content(run: Run, entry: Mapping[str, Any], verdict: str) -> Markup:
    if entry["kind"] == "text":
        return Markup("<blockquote>{}</blockquote>").format(entry["text"])
    if entry["kind"] == "audio":
        return waveform(entry["envelope"], f"Sound of {entry['seconds']:g} s: {verdict}")
    uri = data_uri(run.path / entry["file"])
    if uri is None:
        return Markup('<p class="note">the picture {} is gone</p>').format(entry["file"])
    return Markup('<img src="{}" alt="{}">').format(uri, f"Test picture: {verdict}")
