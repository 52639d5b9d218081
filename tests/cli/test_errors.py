"""Bad input: one sentence on stderr, an exit code that is not zero, no traceback, nothing written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from epitaxy.core.errors import FormatError
from epitaxy.train.run_directory import held
from tests.cli.conftest import Epitaxy, Outcome, only_line


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _fails(outcome: Outcome, *fragments: str) -> None:
    assert outcome.code == 1
    line = only_line(outcome.err)
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.learning_rat=1", ["override 'train.learning_rat=1'", "did you mean 'learning_rate'"]),
        ("train.epochs=many", ["train.epochs", "valid number", "'many'"]),
        ("train.epochs=-1", ["train.epochs must be above 0"]),
        ("method.rnk=4", ["method 'lora' has no field 'rnk'", "'rank'"]),
        ("method.rank=eight", ["lora.rank", "integer", "'eight'"]),
        ("method=lroa", ["no method is called 'lroa'", "'lora'"]),
        ("data.source=nowhere", ["nowhere"]),
        ("base=./nowhere", ["./nowhere", "no such directory"]),
        ("base.dtype=int4", ["base.dtype", "'float32'", "'int4'"]),
        ("method=lora", ["no task head", "method: [lora, head]"]),
        ("learning_rate", ["expected key=value"]),
        ("method=[{method: lora, at: attention.z}, head]", ["'attention.z'", "attention.q"]),
    ],
)
def test_bad_override(epitaxy: Epitaxy, recipe: Path, override: str, fragments: list[str]) -> None:
    _fails(epitaxy("train", recipe, override, "out=run"), *fragments)
    assert not Path("run").exists()


def test_bad_recipe_file(epitaxy: Epitaxy) -> None:
    Path("bad.yaml").write_text("base: reference-vit\nmethod: head\ndata: x\ntrain:\n  epoch: 3\n")
    _fails(epitaxy("plan", "bad.yaml"), "bad.yaml", "'train.epoch'", "'epochs'")
    _fails(epitaxy("train", "absent.yaml"), "absent.yaml", "no such recipe file")
    _fails(epitaxy("train", "demo/lorra"), "did you mean 'demo/lora'")


def test_another_recipe_does_not_go_into_a_run(epitaxy: Epitaxy, recipe: Path, finished: Path) -> None:
    before = (finished / "recipe.yaml").read_bytes()
    outcome = epitaxy("train", recipe, "train.learning_rate=0.5", "method.rank=4", f"out={finished}")
    _fails(outcome, "method.0.rank", "train.learning_rate", "out=")
    assert (finished / "recipe.yaml").read_bytes() == before


def test_two_processes_do_not_write_one_run(epitaxy: Epitaxy, recipe: Path) -> None:
    with held(Path("run")):
        outcome = epitaxy("train", recipe, "out=run")
        _fails(outcome, "run: another process is at work on this run")
        assert [path.name for path in Path("run").iterdir()] == [".lock"]
    assert epitaxy("train", recipe, "out=run", "train.epochs=1").code == 0


def test_foreign_directory_is_left_alone(epitaxy: Epitaxy, recipe: Path) -> None:
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    _fails(epitaxy("train", recipe, "out=full"), "full", "no run")
    assert [file.name for file in Path("full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["inspect", "absent"], ["absent", "no such file"]),
        (["report", "absent"], ["absent", "not a run directory"]),
        (["export", "absent", "--to", "peft", "--out", "x"], ["absent"]),
        (["export", "absent", "--to", "petf", "--out", "x"], ["no format is called 'petf'", "'peft'"]),
        (["merge", "reference-vit", "absent", "--out", "x"], ["absent"]),
        (["methods", "zzz*"], ["no method matches"]),
        (["eval", "reference-vit"], ["--data"]),
        (["eval", "reference-vit", "--data", "builtin:nothing"], ["nothing"]),
        (["eval", "reference-vit", "--data", "builtin:digits", "--split", "tset"], ["'tset'", "'test'"]),
        (["eval", "reference-vit", "--data", "builtin:digits", "--adapters", "absent"], ["absent", "no such file"]),
        (["demo", "--method", "lorra"], ["'lorra'", "'lora'"]),
        (["demo", "audoi"], ["no demo of 'audoi'", "'audio'"]),
    ],
)
def test_bad_arguments(epitaxy: Epitaxy, words: list[str], fragments: list[str]) -> None:
    _fails(epitaxy(*words), *fragments)


def test_wrong_usage_is_exit_code_2(epitaxy: Epitaxy) -> None:
    for words in (["frobnicate"], ["train"], ["export", "x"], ["demo", "--seeds", "0"]):
        outcome = epitaxy(*words)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert "Usage: epitaxy" in outcome.err


def test_merge_and_export_overwrite_nothing(epitaxy: Epitaxy, base: Path, finished: Path) -> None:
    Path("taken").mkdir()
    Path("taken/file").write_text("precious")
    _fails(epitaxy("merge", base, finished, "--out", "taken"), "taken", "not overwritten")
    _fails(epitaxy("export", finished, "--to", "epitaxy", "--out", "taken"), "taken", "not overwritten")
    assert Path("taken/file").read_text() == "precious"
    assert len(list(Path("taken").iterdir())) == 1


def test_a_pickle_is_not_opened(epitaxy: Epitaxy, finished: Path) -> None:
    import shutil

    import torch

    shutil.copytree(finished / "adapter", "poisoned")
    torch.save({"x": torch.zeros(1)}, "poisoned/adapter.safetensors")
    _fails(epitaxy("inspect", "poisoned"), "adapter.safetensors", "pickle")


@pytest.mark.parametrize(
    ("room", "named"),
    [
        (300, "recipe.yaml"),
        (1500, "checkpoints/initial.safetensors"),
        (4000, "checkpoints/step-"),
    ],
)
def test_a_full_disk_is_one_sentence_too(epitaxy: Epitaxy, recipe: Path, finished: Path, room: int, named: str) -> None:
    """With a limit on the size of files, writing fails half-way as on a full disk; afterwards the run goes on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        outcome = epitaxy("train", recipe, "out=run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith(f"error: run/{named}")
    assert "ile too large" in last
    assert "unexpected" not in last
    assert [path.name for path in Path("run").rglob(".*") if path.is_file()] in ([], [".lock"])
    assert epitaxy("train", recipe, "out=run").code == 0
    weights = [(folder / "adapter/adapter.safetensors").read_bytes() for folder in (Path("run"), finished)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "RECIPE", "out=file/run"],
        ["report", "RUN", "--out", "file/page.html"],
        ["eval", "RUN", "--out", "file/table.json"],
        ["merge", "BASE", "RUN", "--out", "file/model"],
        ["export", "RUN", "--to", "peft", "--out", "file/lora"],
    ],
)
def test_places_that_cannot_be_written(
    epitaxy: Epitaxy, words: list[str], recipe: Path, finished: Path, base: Path
) -> None:
    Path("file").write_text("precious")
    given = {"RECIPE": recipe, "RUN": finished, "BASE": base}
    outcome = epitaxy(*(given.get(word, word) for word in words))
    _fails(outcome, words[-1].removeprefix("out="), "not a directory")
    assert Path("file").read_text() == "precious"


def test_adapter_of_another_base(epitaxy: Epitaxy, finished: Path) -> None:
    _fails(epitaxy("merge", "reference-vit", finished, "--out", "x"), "adapter.safetensors", "other sizes")
    assert not Path("x").exists()


def test_adapter_of_other_classes(epitaxy: Epitaxy, base: Path, finished: Path) -> None:
    outcome = epitaxy("eval", base, "--adapters", finished, "--data", "builtin:fashion-unseen")
    _fails(outcome, "trained for 3 classes")


def test_traceback_only_on_demand(epitaxy: Epitaxy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in epitaxy("inspect", "absent").err
    with pytest.raises(FormatError, match="absent"):
        epitaxy("inspect", "absent", "--debug")
    with pytest.raises(FormatError, match="absent"):
        epitaxy("--debug", "inspect", "absent")


def test_an_unforeseen_error_is_one_sentence_too(epitaxy: Epitaxy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("epitaxy.interop.inspect", broken)
    _fails(epitaxy("inspect", "absent"), "RuntimeError: two lines", "--debug")
