"""Few-shot training splits: the published rule, random draws, and classes with too few examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.few_shot import select
from epitaxy.data.splits import DataSpec, Splits, load_splits
from epitaxy.train.recipe_files import change, load_recipe
from tests.data import audio_trees as trees
from tests.data.makers import pictures

GOLDEN = Path(__file__).parents[2].parent / "shared/golden/ast_petl/frontend.safetensors"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden vectors are not beside this checkout")
@pytest.mark.parametrize("shots", [1, 2, 5, 64])
def test_the_published_rule(shots: int) -> None:
    golden = load_file(GOLDEN)
    assert select(golden["fewshot.labels"].tolist(), shots) == golden[f"fewshot.selected_k{shots}"].tolist()


def test_random_draws_are_seeded_nested_and_class_by_class() -> None:
    labels = [number % 3 for number in range(60)]
    draw = select(labels, 4, seed=1)
    assert draw == select(labels, 4, seed=1)
    assert draw != select(labels, 4, seed=2)
    assert Counter(labels[place] for place in draw) == {0: 4, 1: 4, 2: 4}
    assert set(draw) < set(select(labels, 8, seed=1))
    assert [labels[place] for place in draw] == sorted(labels[place] for place in draw)


def load(root: Path, **more: Any) -> Splits:
    return load_splits(DataSpec(str(root), kind="esc50", fold=1, verify=False, **more))


def test_only_training_is_reduced_in_the_order_of_the_table(tmp_path: Path) -> None:
    root = trees.esc50(tmp_path / "ESC-50")
    table = root / "meta/esc50.csv"
    head, *lines = table.read_text().splitlines()
    table.write_text("\n".join([head, *reversed(lines)]))
    whole, few = load(root), load(root, shots=2)
    assert sorted(Path(name).name for name in few.train.names) == [
        "4-4001-A-0.wav",
        "4-4001-B-0.wav",
        "4-4101-A-1.wav",
        "4-4101-B-1.wav",
    ]
    assert (few.validation.names, few.test.names) == (whole.validation.names, whole.test.names)
    assert few.classes == whole.classes
    drawn = {tuple(load(root, shots=2, shots_seed=seed).train.names) for seed in range(4)}
    assert len(drawn) > 1
    assert all(len(names) == 4 for names in drawn)


def test_folders_have_a_few_shot_protocol_too(tmp_path: Path) -> None:
    root = pictures(tmp_path / "d", {f"{s}/{c}": 4 for s in ("train", "val", "test") for c in ("red", "blue")})
    splits = load_splits(DataSpec(str(root), shots=1))
    assert [Path(name).parts[-2:] for name in splits.train.names] == [("blue", "000.png"), ("red", "000.png")]
    assert len(splits.test) == 8


def test_a_class_with_fewer_examples(tmp_path: Path) -> None:
    root = pictures(
        tmp_path / "d", {"train/red": 5, "train/blue": 2, "val/red": 2, "val/blue": 2, "test/red": 2, "test/blue": 2}
    )
    with pytest.raises(
        FormatError, match=r"3 examples of every class are asked for, class 'blue' has 2; ask for fewer"
    ):
        load_splits(DataSpec(str(root), shots=3))
    splits = load_splits(DataSpec(str(root), shots=3, shots_lacking="all"))
    assert Counter(splits.train.labels) == {0: 2, 1: 3}
    assert any("class 'blue' has 2; all there are are taken" in note for note in splits.notes)
    with pytest.raises(EpitaxyError, match="both bound the training examples"):
        DataSpec(str(root), shots=3, limit_per_class=2)
    with pytest.raises(EpitaxyError, match=r"data.shots must be at least 1"):
        DataSpec(str(root), shots=0)


def test_recipes_have_the_fields() -> None:
    recipe = change(load_recipe("demo/lora"), ["data.shots=2", "data.shots_seed=7", "data.shots_lacking=all"])
    assert (recipe.data.shots, recipe.data.shots_seed, recipe.data.shots_lacking) == (2, 7, "all")
