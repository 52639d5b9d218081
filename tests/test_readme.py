"""The README works as written: its Python runs, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epitaxy.cli.app import app
from epitaxy.train.recipe_files import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "adapters" / "flowers" / "adapter.safetensors").exists()
    assert "merged 'flowers'" in capsys.readouterr().out


def test_the_commands_exist() -> None:
    verbs = {command.name for command in app.registered_commands}
    lines = re.findall(r"^epitaxy (\S+) (\S+)", README, re.MULTILINE)
    assert len(lines) >= 3
    for verb, argument in lines:
        assert verb in verbs
        if verb in ("plan", "train"):
            load_recipe(argument)


def test_the_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
