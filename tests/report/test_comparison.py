"""Several runs on one page: grouped over seeds, with mean and spread."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from epitaxy.core.errors import EpitaxyError
from epitaxy.report import build_comparison, build_report
from epitaxy.report.comparison import group_runs
from tests.report.conftest import MakeRun
from tests.report.page_parser import Page

ACCURACIES = (0.70, 0.76, 0.79)


@pytest.fixture
def runs(make_run: MakeRun) -> list[Path]:
    seeds = [make_run(f"lora-{seed}", seed=seed, accuracy=value) for seed, value in enumerate(ACCURACIES)]
    probe = make_run("probe-0", method="head", rank=1, parameters=300, accuracy=0.5)
    return [*seeds, probe]


def test_groups(runs: list[Path]) -> None:
    lora, probe = group_runs(runs)
    assert (lora.title, len(lora.runs)) == ("lora (rank 8) + head", 3)
    assert lora.accuracy == pytest.approx(statistics.mean(ACCURACIES))
    assert lora.spread == pytest.approx(statistics.stdev(ACCURACIES))
    assert (probe.title, probe.accuracy, probe.spread) == ("head", 0.5, None)


def test_runs_of_other_recipes_are_kept_apart(make_run: MakeRun) -> None:
    groups = group_runs([make_run("a", rank=4), make_run("b", rank=8)])
    assert [group.title for group in groups] == ["lora (rank 8) + head, a", "lora (rank 8) + head, b"]


def test_page(runs: list[Path], tmp_path: Path) -> None:
    for run in runs[:2]:
        build_report(run)
    page = Page(build_comparison(runs, tmp_path / "report.html", "Title & more"))
    assert page.faults == []
    assert "Title & more" in page.text
    assert "75.0 % ± 4.6" in page.text
    assert "50.0 % ±" not in page.text  # one run has no spread
    assert "50.0 %" in page.text
    assert "33.3 %" in page.text  # guessing
    assert "guessing" in page.text
    links = [attributes["href"] for attributes in page.named("a") if not attributes["href"].startswith("#")]
    assert links == ["lora-0/report.html", "lora-1/report.html"]
    assert all(reference.startswith(("#", "data:", "lora-")) for reference in page.references())
    plot, curves = (attributes["aria-label"] for attributes in page.named("svg")[:2])
    assert "lora (rank 8) + head: 0.75 at 12.3k; head: 0.5 at 300" in plot
    assert "lora (rank 8) + head from 0.2 to 0.6" in curves
    assert "http" not in page.source


def test_runs_of_different_data_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", rank=2)]
    assert "compare their accuracies with care" not in Page(build_comparison(runs, tmp_path / "same.html")).text
    file = runs[1] / "result.json"
    result = json.loads(file.read_text())
    result["data"] |= {"source": "elsewhere", "classes": ["x", "y"]}
    file.write_text(json.dumps(result))
    page = Page(build_comparison(runs, tmp_path / "other.html"))
    assert "adapted to elsewhere: 2 classes" in page.text
    assert "compare their accuracies with care" in page.text
    assert "guessing" not in page.text  # there is no one chance level


def test_unfinished_runs_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(EpitaxyError, match="half: this run is not finished"):
        build_comparison([make_run("half", finished=False)], tmp_path / "page.html")
    with pytest.raises(EpitaxyError, match="no runs"):
        build_comparison([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
