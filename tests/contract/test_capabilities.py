"""The published page is what the matrix gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import capabilities
from tests.contract.capabilities import expected, fill, pages, probe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_published_pages_are_current() -> None:
    """Every cell is a test of its own, so what they must give is what the pages must say."""
    for page, text in pages(DOCS, expected()).items():
        assert page.read_text() == text, f"{page.name} is out of date: run `{capabilities.MADE_BY}`"


def test_the_page_is_made_from_what_cells_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing finds what is declared, and a method that breaks a promise stops it."""
    places = [("identity", "plain", name) for name in ("lora", "prefix", "bitfit")]
    assert probe(places) == {place: expected()[place] for place in places}
    from epitaxy.core.edits import Delta

    monkeypatch.setattr(Delta, "after", lambda edit, host, x, y: y + 1e-3)
    with pytest.raises(AssertionError, match="identity-plain-lora: DifferenceError"):
        probe(places)


def test_nothing_is_written_when_a_promise_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pool:
        def __init__(self, jobs: int) -> None:
            pass

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def map(self, work: object, parts: object) -> object:
            raise AssertionError("identity-vit-lora: the output differs")

    monkeypatch.setattr(capabilities, "ProcessPoolExecutor", Pool)
    assert capabilities.main(["--write", str(tmp_path)]) == 1
    assert "nothing written: identity-vit-lora" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_probing_one_family_gives_its_part_of_the_page() -> None:
    places = [place for place in expected() if place[1] == "plain"]
    assert probe(places) == {place: expected()[place] for place in places}


def test_filling_a_page_touches_nothing_else() -> None:
    assert fill("a\n<!-- x -->\nold\n<!-- end -->\nb", "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- end -->\nb"
    with pytest.raises(AssertionError, match="missing"):
        fill("a", "x", "new")
    with pytest.raises(AssertionError, match="never closed"):
        fill("<!-- x -->\n", "x", "new")
