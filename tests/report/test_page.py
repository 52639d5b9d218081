"""The page of a run: every section there, nothing loaded from outside, everything escaped, readable without eyes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from epitaxy.core.errors import EpitaxyError
from epitaxy.report import build_report
from tests.report.conftest import CLASSES, MakeRun
from tests.report.page_parser import Page

SECTIONS = ["result", "curves", "updates", "confusion", "samples", "cost", "recipe", "environment"]


@pytest.fixture
def page(make_run: MakeRun) -> Page:
    return Page(build_report(make_run()))


def test_every_section(page: Page) -> None:
    assert [attributes["id"] for attributes in page.named("section")] == SECTIONS
    for expected in (
        "80.0 %",
        "12,345",
        "0.790",
        "50.4 kB",
        "1 min 01 s",
        "512 MB, resident, of the whole process",
        "the best on validation after 20, stopped early",
        "Examples that were left out, and why",
        "broken.png",
        "the file is <empty>",
        "validation was cut from train",
        "lora.attention.q",
        "rank: 8",
        "epitaxy <x>",
    ):
        assert expected in page.text, expected


def test_curves_come_from_the_log(page: Page) -> None:
    charts = [attributes["aria-label"] for attributes in page.named("svg")]
    assert any(label.startswith("Training loss.") and "from 0.2 to 0.0667" in label for label in charts)
    assert any(label.startswith("Validation accuracy.") and "from 0.2 to 0.6" in label for label in charts)
    assert any(label.startswith("Learning rate.") and "from 0.03 to 0.01" in label for label in charts)
    updates = next(label for label in charts if label.startswith("Change of lora.attention.q"))
    assert "3 bars, the largest 0.06 at 2" in updates  # of step 20, the state that was kept, not of step 30


def test_confusion_matrix(page: Page) -> None:
    cells = [attributes["title"] for attributes in page.named("td") if "title" in attributes]
    assert len(cells) == 9
    assert cells[0] == f"{CLASSES[0]} taken for {CLASSES[0]}: 4"
    assert cells[3] == f"{CLASSES[1]} taken for {CLASSES[0]}: 2"
    assert "66.7 %" in page.text  # precision of the first class: 4 of 6
    assert f"{CLASSES[1]} taken for {CLASSES[0]}: 2" in page.text.replace("\n", " ")


def test_samples(page: Page) -> None:
    figures = page.named("figure")
    assert [attributes["class"] for attributes in figures] == ["wrong", "right", "wrong", "wrong"]
    (image,) = page.named("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == f"Test picture: {CLASSES[0]}, taken for {CLASSES[1]}"
    assert "x/4.png" in page.text
    assert "/somewhere" not in page.text
    assert "samples/absent.png is gone" in page.text
    assert "<b>bold claims</b>" in page.text
    assert any("Sound of 1.5 s" in attributes["aria-label"] for attributes in page.named("svg"))


def test_nothing_is_loaded(page: Page) -> None:
    for reference in page.references():
        assert reference.startswith(("#", "data:")), reference
    assert not page.named("script")
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http://" not in page.source
    assert "https://" not in page.source


def test_everything_is_escaped(page: Page) -> None:
    assert page.faults == []
    assert "<script>" not in page.source
    assert CLASSES[0] in page.text
    assert CLASSES[1] in page.text


def test_readable_without_eyes(page: Page) -> None:
    assert page.named("html")[0]["lang"] == "en"
    assert len(page.named("h1")) == 1
    headings = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(attributes.get("alt") for attributes in page.named("img"))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.named("svg"))
    assert all("scope" in attributes for attributes in page.named("th"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert "prefers-color-scheme: dark" in page.source
    assert {f"#{name}" for name in SECTIONS} == {attributes["href"] for attributes in page.named("a")}


def test_expert_use_of_a_mixture(make_run: MakeRun) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text())
    place = {"experts": 3, "weight": [0.5, 0.48, 0.02], "first": [0.6, 0.4, 0.0], "entropy": 0.71, "tokens": 9}
    other = {**place, "weight": [0.3, 0.3, 0.4], "dead": [], "dispatch_entropy": [0.2, 0.4, 0.6]}
    result["expert_use"] = {
        "soft_moa.attention.0": {**place, "dead": [2], "dispatch_entropy": [0.5, 0.7, 0.9]},
        "soft_moa.attention.10": other,
        "dense_moa.mlp.3": {**place, "dead": [2]},
    }
    (run / "result.json").write_text(json.dumps(result))
    page = Page(build_report(run))
    assert page.faults == []
    assert [attributes["id"] for attributes in page.named("section")] == [*SECTIONS[:3], "experts", *SECTIONS[3:]]
    told = [attributes["title"] for attributes in page.named("td") if "expert" in attributes.get("title", "")]
    assert len(told) == 9
    assert told[2] == "layer 0, expert 2: weight 2.0 %, first choice of 0.0 % of the tokens"
    for expected in ("soft_moa.attention: 3 experts", "dense_moa.mlp: 3 experts", "0.71", "0.70", "0.40", "none"):
        assert expected in page.text, expected


def test_unfinished_run(make_run: MakeRun) -> None:
    page = Page(build_report(make_run(finished=False)))
    assert page.faults == []
    assert [attributes["id"] for attributes in page.named("section")] == SECTIONS
    assert "not finished" in page.text
    assert any(attributes["aria-label"].startswith("Training loss.") for attributes in page.named("svg"))


def test_run_that_has_only_begun(make_run: MakeRun) -> None:
    run = make_run(finished=False)
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    page = Page(build_report(run))
    assert page.faults == []
    assert "nothing was recorded" in page.text


def test_torn_last_line_of_the_log_is_left_out(make_run: MakeRun) -> None:
    run = make_run(finished=False)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 40, "lo')
    assert "nothing was recorded" not in Page(build_report(run)).text


def test_many_classes(make_run: MakeRun) -> None:
    run = make_run()
    count = 30
    predictions = json.loads((run / "predictions.json").read_text())
    predictions["classes"] = [f"class {number}" for number in range(count)]
    predictions["confusion"] = [[int(a == b) * 3 + int(a == b + 1) for b in range(count)] for a in range(count)]
    (run / "predictions.json").write_text(json.dumps(predictions))
    page = Page(build_report(run))
    assert page.faults == []
    assert len([1 for attributes in page.named("td") if "title" in attributes]) == count * count
    assert "matrix dense" in page.source


def test_bad_input(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(EpitaxyError, match=r"recipe\.yaml is missing"):
        build_report(tmp_path / "absent")
    run = make_run()
    (run / "result.json").write_text("{")
    with pytest.raises(EpitaxyError, match=r"result\.json: not readable as JSON"):
        build_report(run)
    assert not (run / "report.html").exists()
    run = make_run("second")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(["{", *lines]))
    with pytest.raises(EpitaxyError, match=r"metrics\.jsonl, line 1"):
        build_report(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", b"\xff\xfe", "not a text file in UTF-8"),
        ("metrics.jsonl", b"\xff\n{}\n", "not a text file in UTF-8"),
        ("metrics.jsonl", b"[1]\n", "line 1: expected an object"),
        ("environment.json", b"[1]", "expected an object with named fields, found list"),
        ("result.json", b"{}", "not what a run writes, 'method' is missing"),
        ("predictions.json", b"3", "expected an object with named fields, found int"),
        ("predictions.json", b"{}", "not what a run writes, 'classes' is missing"),
    ],
)
def test_damaged_files_of_a_run_are_named(make_run: MakeRun, name: str, content: bytes, message: str) -> None:
    run = make_run()
    (run / name).write_bytes(content)
    with pytest.raises(EpitaxyError, match=message) as caught:
        build_report(run)
    assert name in str(caught.value)
    assert not (run / "report.html").exists()


def test_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    assert build_report(run, tmp_path / "pages" / "one.html") == tmp_path / "pages" / "one.html"
    assert not (run / "report.html").exists()
