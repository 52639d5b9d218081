"""Every example runs, and says what it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one example's ``main`` and return what it printed."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    return capsys.readouterr().out


def test_vision(capsys: pytest.CaptureFixture[str]) -> None:
    last = run("vision", capsys).splitlines()[-1]
    before, after = (float(part.split()[-1]) for part in last.replace("test accuracy", "").split(";"))
    assert before > 0.4  # four classes, a quarter by chance
    assert abs(before - after) < 0.01


def test_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert float(run("trainer", capsys).split()[-1]) > 0.4  # four classes


def test_language(capsys: pytest.CaptureFixture[str]) -> None:
    assert "learned: True" in run("language", capsys)


def test_audio(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [float(word.strip(",")) for word in run("audio", capsys).split() if word[0].isdigit()]
    assert min(numbers) > 0.9


def test_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("diffusion", capsys)
    assert "changes nothing: True" in output
    assert "the base is back: True" in output


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
