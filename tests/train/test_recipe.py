"""Recipes: what is refused and how it is said, what wins over what, and that a resolved recipe means the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from epitaxy.core.errors import EpitaxyError
from epitaxy.methods.lora import LoRA
from epitaxy.train.recipe import RecipeError, differences, from_dict
from epitaxy.train.recipe_files import change, find_recipe, load_recipe, shipped_recipes
from epitaxy.train.strict_yaml import parse

PLAIN = "base: reference-vit\nmethod: [{method: lora, rank: 4}, head]\ndata: pictures\ntrain: {epochs: 3}\n"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    file = tmp_path / "plain.yaml"
    file.write_text(PLAIN)
    return file


def _message(file: Path, *overrides: str) -> str:
    with pytest.raises(EpitaxyError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_short_forms_are_written_out(plain: Path) -> None:
    recipe = load_recipe(plain)
    assert recipe.base.source == "reference-vit"
    assert recipe.data.source == "pictures"
    assert [entry["method"] for entry in recipe.method] == ["lora", "head"]
    assert recipe.method[0]["rank"] == 4
    assert recipe.method[0]["at"] == ("attention.q", "attention.v")  # defaults are written out
    assert recipe.name == "plain"
    assert recipe.out == Path("runs/plain")
    assert recipe.adapter_method().parts[0] == LoRA(rank=4)


def test_a_resolved_recipe_is_a_recipe(plain: Path, tmp_path: Path) -> None:
    recipe = load_recipe(plain, ["train.learning_rate=3e-4", "data.validation=0.25", "method.head.labels=7"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    assert from_dict(recipe.to_dict(), "x") == recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=3e-4", "learning_rate", 3e-4),
        ("train.learning_rate=1", "learning_rate", 1.0),
        ("train.clip=null", "clip", None),
        ("train.keep_best=false", "keep_best", False),
        ("train.precision=no", "precision", "no"),
        ("train.trackers=[tensorboard, wandb]", "trackers", ("tensorboard", "wandb")),
        ("train.warmup=0.1", "warmup", 0.1),
        ("train.warmup=20", "warmup", 20),
        ("train={batch: 4, seed: 2}", "batch", 4),
    ],
)
def test_overrides_have_types(plain: Path, override: str, key: str, value: object) -> None:
    found = getattr(load_recipe(plain, [override]).train, key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_of_a_section_keeps_the_rest(plain: Path) -> None:
    assert load_recipe(plain, ["train={batch: 4}"]).train.epochs == 3


def test_method_overrides(plain: Path) -> None:
    assert load_recipe(plain, ["method.rank=16"]).method[0]["rank"] == 16
    assert load_recipe(plain, ["method.lora.layers=[0, 1]"]).method[0]["layers"] == (0, 1)
    assert load_recipe(plain, ["method.1.labels=5"]).method[1]["labels"] == 5
    assert [entry["method"] for entry in load_recipe(plain, ["method=[bitfit, head]"]).method] == ["bitfit", "head"]
    assert load_recipe(plain, ["method=full"]).full
    assert load_recipe(plain, ["method={method: lora, rank: 2}", "method.rank=3"]).method[0]["rank"] == 3


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.learning_rat=1", ["'train.learning_rat' is no key", "'learning_rate'"]),
        ("trian.epochs=1", ["'trian' is no key", "'train'"]),
        ("data.sorce=x", ["'data.sorce' is no key", "'source'"]),
        ("base.dtpe=x", ["'base.dtpe' is no key", "'dtype'"]),
        ("train.batch=2.5", ["train.batch", "integer", "2.5"]),
        ("train.batch=0", ["train.batch must be at least 1"]),
        ("train.batch.size=3", ["'train.batch' is one value"]),
        ("train=3", ["train", "3"]),
        ("train=null", ["train: expected keys and their values, found None"]),
        ("train.batch=true", ["train.batch: expected a number or a name, found true"]),
        ("samples=false", ["samples: expected a number or a name, found false"]),
        ("train.trackers=tensorboard", ["train.trackers: expected a list, found 'tensorboard'"]),
        ("train.warmup=.inf", ["train.warmup must not be negative and must be finite, got inf"]),
        ("train.seed=99999999999999999999", ["train.seed must be below 2^63"]),
        ("out=null", ["out: expected a path, found None"]),
        ("data=''", ["data.source: it is empty"]),
        ("base=' '", ["base.source: it is empty"]),
        ("train={[a]: 3}", ["not readable as YAML: a key must be a plain word"]),
        ("train={{a: 1}: 3}", ["not readable as YAML: a key must be a plain word"]),
        ("train.schedule=cosin", ["train.schedule", "'cosine'", "'cosin'"]),
        ("data.validation=1.5", ["data.validation", "1.5"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("samples=-1", ["samples", "-1"]),
        ("epochs", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("train..epochs=3", ["expected key=value"]),
        ("train.epochs=[", ["not readable as YAML"]),
        ("method.rnak=3", ["method 'lora' has no field 'rnak'", "'rank'"]),
        ("method.layers=[0]", ["2 methods of the recipe have that field", "method.0.layers or method.1.layers"]),
        ("method.bitfit.at=x", ["the recipe's method is lora + head"]),
        ("method.0.rank.x=3", ["method.FIELD or method.NAME.FIELD"]),
        ("method.rank=eight", ["lora.rank", "integer", "'eight'"]),
        ("method.rank=0.5", ["lora.rank", "integer", "0.5"]),
        ("method=lroa", ["no method is called 'lroa'", "'lora'"]),
        ("method=[]", ["at least one method"]),
        ("method=[full, head]", ["stands alone"]),
        ("method={rank: 3}", ["the key 'method'"]),
        ("method=3", ["found 3"]),
    ],
)
def test_bad_overrides(plain: Path, override: str, fragments: list[str]) -> None:
    message = _message(plain, override)
    assert message.startswith(f"override {override!r}")
    for fragment in fragments:
        assert fragment in message


def test_steps_and_epochs_exclude_each_other(plain: Path) -> None:
    assert "give one and let the other be null" in _message(plain, "train.steps=5")
    assert load_recipe(plain, ["train.epochs=null", "train.steps=5"]).train.steps == 5


def test_extends(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "deep").mkdir()
    child = tmp_path / "deep" / "child.yaml"
    child.write_text("extends: ../plain.yaml\ntrain: {batch: 4}\nmethod: [bitfit, head]\n")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: deep/child.yaml\ntrain: {epochs: 9}\nout: elsewhere\n")
    recipe = load_recipe(grandchild)
    assert (recipe.train.batch, recipe.train.epochs) == (4, 9)
    assert [entry["method"] for entry in recipe.method] == ["bitfit", "head"]
    assert recipe.data.source == "pictures"
    assert (recipe.name, recipe.out) == ("grandchild", Path("elsewhere"))


def test_extending_in_a_circle(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
    message = _message(tmp_path / "a.yaml")
    assert "circle: a.yaml -> b.yaml -> c.yaml -> a.yaml" in message
    (tmp_path / "self.yaml").write_text("extends: self.yaml\n")
    assert "circle: self.yaml -> self.yaml" in _message(tmp_path / "self.yaml")


def test_the_file_of_a_mistake_is_named(tmp_path: Path, plain: Path) -> None:
    """Not the file that was asked for, but the one in which the value or key stands."""
    child = tmp_path / "child.yaml"
    child.write_text("extends: plain.yaml\ntrain: {batch: many}\n")
    assert _message(child).startswith(f"{child}: train.batch: ")
    plain.write_text(PLAIN + "samples: few\n")
    child.write_text("extends: plain.yaml\ntrain: {batch: 4}\n")
    assert _message(child).startswith(f"{plain}: samples: ")
    plain.write_text(PLAIN + "sample: 3\n")
    assert _message(child).startswith(f"{plain}: 'sample' is no key of a recipe; did you mean 'samples'")
    plain.write_text(PLAIN.replace("rank: 4", "rank: four"))
    assert _message(child).startswith(f"{plain}: method: lora.rank: ")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["found nothing"]),
        ("- a\n- b\n", ["found list"]),
        ("base: reference-vit\ndata: x\n", ["'method' is missing"]),
        ("base: reference-vit\nmethod: head\n", ["'data' is missing"]),
        ("method: head\ndata: {kind: csv}\n", ["source", "missing"]),
        ("method: head\ndata: x\ndata: y\n", ["line 3", "'data' is given twice"]),
        ("method: head\ndata: x\ntrain: {batch: 3, batch: 4}\n", ["line 3", "'batch' is given twice"]),
        ("method: [head\n", ["line 2", "not readable as YAML"]),
        ("method: head\ndata: !!python/object/apply:os.system [ls]\n", ["not readable as YAML"]),
        ("extends: 3\nmethod: head\n", ["extends", "3"]),
        ("extends: absent.yaml\n", ["extends", "absent.yaml"]),
        ("extends: shipped:demo/lorra\n", ["extends", "no shipped recipe", "'demo/lora'"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, fragments: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    message = _message(file)
    assert message.startswith(str(file))
    for fragment in fragments:
        assert fragment in message


def test_not_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\x89PNG\xff\xfe")
    assert "UTF-8" in _message(file)
    assert "found a directory" in _message(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2024-13-45", "2024-13-45"),
        ("2024-01-05", "2024-01-05"),
        ("null", None),
        ("~", None),
        ("1.2.3", "1.2.3"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = parse(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_the_run_directory_may_be_in_the_home_directory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert load_recipe(plain, ["out=~/runs/one"]).out == Path("/home/ann/runs/one")


def test_differences(plain: Path) -> None:
    recipe = load_recipe(plain)
    assert differences(recipe, load_recipe(plain, ["out=other"])) == []
    other = load_recipe(plain, ["train.batch=4", "method.rank=9", "data.kind=csv"])
    assert differences(recipe, other) == ["method.0.rank", "data.kind", "train.batch"]
    fewer = load_recipe(plain, ["method=head"])
    assert "method.1.method" in differences(recipe, fewer)
    assert differences(recipe, load_recipe(plain, ["method=full"]))


def test_change(plain: Path) -> None:
    recipe = load_recipe(plain)
    assert change(recipe, ["train.batch=5"]).train.batch == 5
    with pytest.raises(RecipeError, match=r"train\.bach"):
        change(recipe, ["train.bach=5"])


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_manuals_that_load(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(f"shipped:{name}") == recipe
    header = find_recipe(name).read_text(encoding="utf-8").partition("\n\n")[0]
    assert header.startswith("# ")
    assert f"epitaxy train {name}" in header
    if not recipe.full:
        assert any(entry["method"] == "head" for entry in recipe.method)


def test_a_file_wins_over_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "lora").write_text(PLAIN)
    assert load_recipe("demo/lora").data.source == "pictures"
    assert load_recipe("shipped:demo/lora").data.source != "pictures"
