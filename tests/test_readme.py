"""The README works as written: its Python runs, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

import epitaxy
from epitaxy.cli.app import app
from epitaxy.core import registry
from epitaxy.models.opening import open_classifier
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


SNIPPETS = [
    (page.relative_to(ROOT).as_posix(), code)
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(SNIPPETS)])
def test_the_snippets_of_the_docs_run(page: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped model; the layout of a model we do not know on a module with those names.

    Snippets for another kind of model say so after the language: ```` ```python needs an AST ````.
    """
    monkeypatch.setattr(registry, "_METHODS", registry.methods())  # loaded first: what loads later would be lost
    names = {
        "epitaxy": epitaxy,
        "model": _unknown() if "Layout(" in code else open_classifier("reference-vit", "ab").model,
    }
    exec(compile(code, page, "exec"), names)
    if "ScaledResidual" in names:
        epitaxy.attach(names["model"], names["ScaledResidual"](), name="scaled")
    assert epitaxy.explain(names["model"]).adapters


def _unknown() -> nn.Module:
    block = nn.ModuleDict(
        {
            "attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")}),
            "ff": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        }
    )
    return nn.ModuleDict({"blocks": nn.ModuleList([block])})


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
