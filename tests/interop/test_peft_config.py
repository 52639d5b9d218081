"""Our reading of ``adapter_config.json`` against PEFT's own functions, and the search for older module names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key

from epitaxy.interop.peft_config import LoraConfig, all_linear, read_config
from epitaxy.interop.peft_names import names_in_file
from tests.interop.bases import BASES

PATHS = sorted(
    {path for name in ("llama", "sd15", "odd names") for path, _ in BASES[name].model().named_modules() if path}
)
ENDINGS = sorted({".".join(path.split(".")[-count:]) for path in PATHS for count in (1, 2, 3)})
names = st.lists(st.sampled_from(ENDINGS), max_size=4, unique=True)
pattern = st.sampled_from([r".*attn.*", r"model\.layers\.\d\.mlp\..*", r".*(to_q|conv1)", "mid", r"nothing"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    targets=st.one_of(names.filter(bool), pattern),
    excluded=st.one_of(st.none(), names, pattern),
    saved=names,
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
    layer_names=st.sampled_from([None, "layers", ["down_blocks", "layers"], []]),
)
def test_the_same_modules_are_meant(
    tmp_path: Path, targets: Any, excluded: Any, saved: list[str], layers: Any, layer_names: Any
) -> None:
    if isinstance(targets, str):
        layers = None
    theirs = peft.LoraConfig(
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=saved,
        layers_to_transform=layers,
        layers_pattern=layer_names if layers is not None else None,
    )
    theirs.save_pretrained(str(tmp_path))
    ours = read_config(tmp_path / "adapter_config.json")
    for path in PATHS:
        assert ours.targets(path) == bool(check_target_module_exists(theirs, path)), path
        assert ours.saves(path) == any(path.endswith(name) for name in saved)


@settings(max_examples=60, deadline=None)
@given(patterns=st.dictionaries(st.sampled_from([*ENDINGS, r"^mid", r".*\.\d\..*", "layers.0.*"]), st.integers(1, 99)))
def test_the_same_rank_and_alpha(patterns: dict[str, int]) -> None:
    config = LoraConfig(r=100, lora_alpha=100, rank_pattern=patterns, alpha_pattern=patterns)
    for path in PATHS:
        expected = patterns.get(get_pattern_key(patterns.keys(), path), 100)
        assert (config.rank(path), config.alpha(path)) == (expected, expected)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", BASES)
def test_all_linear_is_the_same(name: str, task: str | None) -> None:
    model = BASES[name].model()
    theirs = peft.LoraConfig(target_modules="all-linear", task_type=task)
    expected = _maybe_include_all_linear_layers(theirs, model).target_modules
    get = getattr(model, "get_output_embeddings", None)
    found = all_linear(dict(model.named_modules()), get() if get else None, task)
    assert found == expected


def test_every_field_of_this_peft_is_known(tmp_path: Path) -> None:
    """A new field of PEFT must be sorted into those that matter, those that are refused, and bookkeeping."""
    from epitaxy.interop.peft_config import BOOKKEEPING, VARIANTS

    peft.LoraConfig(target_modules=["x"]).save_pretrained(str(tmp_path))
    fields = json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    assert fields <= {*LoraConfig.__dataclass_fields__, *VARIANTS, *BOOKKEEPING}


def test_names_of_today_come_before_older_ones() -> None:
    model = BASES["vit"].model()
    now = names_in_file(model, ["vit.layers.0.mlp.fc1"], "f")
    assert now["vit.layers.1.attention.q_proj"] == "vit.layers.1.attention.q_proj"
    then = names_in_file(model, ["vit.encoder.layer.0.intermediate.dense"], "f")
    assert then["vit.encoder.layer.1.attention.attention.query"] == "vit.layers.1.attention.q_proj"
    bare = names_in_file(model, ["encoder.layer.0.intermediate.dense"], "f")
    assert bare["encoder.layer.1.attention.attention.query"] == "vit.layers.1.attention.q_proj"
