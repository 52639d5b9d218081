"""Adapters that PEFT itself wrote, loaded by us: equal outputs, and a life of their own afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import epitaxy
from tests.interop.bases import BASES, TARGETS, close, differs, randomise, run, written_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


@pytest.mark.parametrize("name", BASES)
def test_import_gives_pefts_output_and_survives_our_own_format(name: str, tmp_path: Path) -> None:
    family = BASES[name]
    expected = written_by_peft(family, tmp_path / "peft")
    model = family.model()
    bare = run(family, model)
    adapter = epitaxy.load(model, tmp_path / "peft")
    assert adapter.name == "peft"
    found = run(family, model)
    differs(found, bare)
    close(found, expected)

    epitaxy.save(model, tmp_path / "ours")
    again = family.model()
    epitaxy.load(again, tmp_path / "ours")
    assert torch.equal(run(family, again), found)

    epitaxy.save(model, tmp_path / "back", format="peft")
    before, after = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    epitaxy.detach(model)
    assert torch.equal(run(family, model), bare)


VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "regex": ("vit", {"target_modules": r"vit\.layers\.1\..*(q|v)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear with a classifier": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear of transposed weights": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "rank pattern": ("llama", {"rank_pattern": {"q_proj": 6, r".*layers\.1.*v_proj": 2}}),
    "alpha pattern": ("vit", {"alpha_pattern": {"layers.0.attention.q_proj": 12, "^vit.layers.1.*": 0.5}}),
    "rank-stabilised": ("bert", {"use_rslora": True, "rank_pattern": {"value": 7}}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "one layer of a named list": ("bert", {"layers_to_transform": 0, "layers_pattern": "layer"}),
    "excluded": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by regex": ("vit", {"exclude_modules": r".*\.1\.attention\.v_proj"}),
    "the output layer too": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "gaussian start": ("vit", {"init_lora_weights": "gaussian"}),
    "orthogonal start": ("vit", {"r": 4, "init_lora_weights": "orthogonal"}),
    "dropout": ("bert", {"lora_dropout": 0.25}),
    "zero alpha elsewhere": ("vit", {"alpha_pattern": {"v_proj": 0}}),
    "saved head": ("vit", {"modules_to_save": ["classifier"]}),
    "saved heads": ("wav2vec2", {"modules_to_save": ["projector", "classifier"]}),
    "saved composite": ("ast", {"modules_to_save": ["classifier"]}),
    "saved head by task": ("bert", {"task_type": "SEQ_CLS"}),
    "saved norms": ("resnet", {"modules_to_save": ["normalization", "classifier.1"]}),
    "saved rms norm": ("llama", {"modules_to_save": ["model.norm"]}),
    "causal task": ("gpt2", {"task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_way_to_say_it(variation: str, tmp_path: Path) -> None:
    name, config = VARIATIONS[variation]
    family = BASES[name]
    expected = written_by_peft(family, tmp_path / "peft", **config)
    model = family.model()
    bare = run(family, model)
    epitaxy.load(model, tmp_path / "peft", name="x")
    differs(run(family, model), bare)
    close(run(family, model), expected)
    epitaxy.save(model, tmp_path / "ours")
    again = family.model()
    epitaxy.load(again, tmp_path / "ours")
    assert torch.equal(run(family, again), run(family, model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "wav2vec2"])
def test_trained_biases_become_bitfit(name: str, bias: str, tmp_path: Path) -> None:
    family = BASES[name]

    def train_biases(model: Any) -> None:
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter_name.endswith(".bias"):
                parameter += torch.linspace(-1, 1, parameter.numel())

    expected = written_by_peft(family, tmp_path, bias=bias, change=train_biases)
    model = family.model()
    adapter = epitaxy.load(model, tmp_path, name="x")
    parts = [part["method"] for part in adapter.config]  # the convolutions of a ResNet have no bias of their own
    assert parts == (["lora"] if name == "resnet" and bias == "lora_only" else ["lora", "bitfit"])
    close(run(family, model), expected)


def test_roles_are_found_again(tmp_path: Path) -> None:
    written_by_peft(BASES["llama"], tmp_path / "a", target_modules=["q_proj", "v_proj"])
    assert epitaxy.load(BASES["llama"].model(), tmp_path / "a").method == epitaxy.LoRA(
        ("attention.q", "attention.v"), 3, 5
    )
    written_by_peft(BASES["llama"], tmp_path / "b", target_modules="all-linear")
    assert epitaxy.load(BASES["llama"].model(), tmp_path / "b").method.at == "linear"
    written_by_peft(BASES["llama"], tmp_path / "c", layers_to_transform=[1])
    method = epitaxy.load(BASES["llama"].model(), tmp_path / "c").method
    assert (set(method.at), method.layers) == ({"attention.q", "attention.v", "mlp.down"}, (1,))
    written_by_peft(BASES["odd names"], tmp_path / "d", target_modules=r"mid|conv")
    assert epitaxy.load(BASES["odd names"].model(), tmp_path / "d").method.at == ("=conv", "=mid")


def test_bin_files_are_read_without_unpickling(tmp_path: Path) -> None:
    family = BASES["vit"]
    expected = written_by_peft(family, tmp_path, bin_file=True, modules_to_save=["classifier"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model = family.model()
    epitaxy.load(model, tmp_path, name="x")
    close(run(family, model), expected)
    assert epitaxy.inspect(tmp_path).parameters == sum(
        value.numel() for value in torch.load(tmp_path / "adapter_model.bin", weights_only=True).values()
    )


def test_the_files_themselves_may_be_named(tmp_path: Path) -> None:
    family = BASES["vit"]
    expected = written_by_peft(family, tmp_path)
    for number, file in enumerate(("adapter_model.safetensors", "adapter_config.json")):
        model = family.model()
        epitaxy.load(model, tmp_path / file, name=f"x{number}")
        close(run(family, model), expected)


def test_half_precision_files(tmp_path: Path) -> None:
    family = BASES["vit"]
    written_by_peft(family, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    expected = run(family, peft.PeftModel.from_pretrained(family.model(), str(tmp_path)))
    model = family.model()
    epitaxy.load(model, tmp_path, name="x")
    close(run(family, model), expected)


def test_head_of_another_size(tmp_path: Path) -> None:
    """PEFT needs a base built with the right number of labels; we bring the head along."""
    family = BASES["vit"]
    written_by_peft(family, tmp_path, modules_to_save=["classifier"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.classifier."
    tensors[f"{prefix}weight"], tensors[f"{prefix}bias"] = torch.randn(7, 32), torch.randn(7)
    save_file(tensors, file)
    model = family.model()
    adapter = epitaxy.load(model, tmp_path, name="x")
    assert adapter.config[-1]["labels"] == 7
    from transformers import ViTForImageClassification

    larger = ViTForImageClassification(type(model.config).from_dict({**model.config.to_dict(), "num_labels": 7}))
    larger.load_state_dict(family.model().state_dict() | {k: v for k, v in larger.state_dict().items() if "class" in k})
    close(run(family, model), run(family, peft.PeftModel.from_pretrained(larger, str(tmp_path))))


OLD_NAMES = {
    "vit": [
        (r"\.layers\.", ".encoder.layer."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ],
    "dinov2": [(r"attention\.q_proj", "attention.attention.query"), (r"attention\.o_proj", "attention.output.dense")],
    "swin": [(r"attention\.q_proj", "attention.self.query"), (r"mlp\.fc1", "intermediate.dense")],
}
OLD_TARGETS = {
    "vit": (["q_proj", "v_proj", "o_proj", "fc1", "fc2"], ["query", "value", "dense"]),
    "dinov2": (["q_proj", "o_proj"], ["query", "attention.output.dense"]),
    "swin": (["q_proj", "fc1"], ["query", "intermediate.dense"]),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_transformers_4(name: str, tmp_path: Path) -> None:
    """An adapter trained before the modules were renamed: tensors, targets and patterns all speak the old names."""
    family, (now, then) = BASES[name], OLD_TARGETS[name]
    expected = written_by_peft(family, tmp_path, target_modules=now, rank_pattern={"q_proj": 5})
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    for pattern, old in OLD_NAMES[name]:
        tensors = {re.sub(pattern, old, key): value for key, value in tensors.items()}
    assert not any("q_proj" in key for key in tensors)
    save_file(tensors, file)
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "target_modules": then, "rank_pattern": {"query": 5}}))
    model = family.model()
    epitaxy.load(model, tmp_path, name="x")
    close(run(family, model), expected)


def test_an_adapter_of_the_trunk_fits_the_model_with_a_head_and_the_reverse(tmp_path: Path) -> None:
    family = BASES["bert"]
    whole, trunk = family.model(), family.model().bert
    for place, model in (("trunk", trunk), ("whole", whole)):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
        randomise(wrapped.named_parameters(), "lora_")
        wrapped.save_pretrained(str(tmp_path / place))
    expected = run(family, whole)
    model = family.model()
    epitaxy.load(model, tmp_path / "trunk", name="x")
    close(run(family, model), expected)
    other = family.model().bert
    epitaxy.load(other, tmp_path / "whole", name="x")
    with torch.no_grad():
        inputs = family.inputs(3)
        close(other(**inputs).last_hidden_state, trunk(**inputs).last_hidden_state)


def test_several_files_side_by_side_and_routed(tmp_path: Path) -> None:
    family = BASES["vit"]
    expected = {}
    for number, rank in enumerate((2, 5)):
        expected[f"a{number}"] = written_by_peft(family, tmp_path / str(number), r=rank)
    model = family.model()
    for number in range(2):
        epitaxy.load(model, tmp_path / str(number), name=f"a{number}")
    epitaxy.activate(model, None)
    bare = run(family, model)
    for name, output in expected.items():
        epitaxy.activate(model, name)
        close(run(family, model), output)
    with epitaxy.route(model, ["a1", None, "a0"]):
        routed = run(family, model)
    close(routed, torch.stack([expected["a1"][0], bare[1], expected["a0"][2]]))


def test_inspect_needs_no_model(tmp_path: Path) -> None:
    written_by_peft(BASES["llama"], tmp_path / "my lora", rank_pattern={"q_proj": 6}, task_type="CAUSAL_LM")
    contents = epitaxy.inspect(tmp_path / "my lora")
    assert (contents.format, contents.name) == ("peft", "my_lora")
    assert sorted(method["rank"] for method in contents.methods) == [3, 6]
    assert all(target in str(contents) for target in TARGETS["llama"])
    assert contents.parameters == sum(
        value.numel() for value in load_file(tmp_path / "my lora" / "adapter_model.safetensors").values()
    )


def test_merging_agrees_with_peft(tmp_path: Path) -> None:
    for name in ("gpt2", "sd15", "llama"):
        family = BASES[name]
        written_by_peft(family, tmp_path / name)
        merged = peft.PeftModel.from_pretrained(family.model(), str(tmp_path / name)).merge_and_unload()
        model = family.model()
        epitaxy.load(model, tmp_path / name, name="x")
        epitaxy.merge(model, "x")
        ours, theirs = model.state_dict(), merged.state_dict()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5)
        differs(run(family, model), run(family, family.model()))


def test_a_warning_when_the_base_has_another_name(tmp_path: Path) -> None:
    family = BASES["vit"]
    written_by_peft(family, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "someone/vit-large"}))
    model = family.model()
    model.config._name_or_path = "someone/vit-base"
    with pytest.warns(UserWarning, match="someone/vit-large"):
        epitaxy.load(model, tmp_path, name="x")


LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    targets=st.lists(st.sampled_from(LEAVES), min_size=1, unique=True),
    rank=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 32), st.floats(0.1, 40)),
    ranks=st.dictionaries(st.sampled_from([*LEAVES, r"layers\.0\..*", "self_attn.q_proj"]), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from([*LEAVES, r".*\.1\..*"]), st.floats(0.1, 40)),
    layers=st.sampled_from([None, [0], [1], [0, 1], 1]),
    stabilised=st.booleans(),
)
def test_any_mix_of_ranks_and_places(
    tmp_path_factory: pytest.TempPathFactory,
    targets: list[str],
    rank: int,
    alpha: float,
    ranks: dict[str, int],
    alphas: dict[str, float],
    layers: Any,
    stabilised: bool,
) -> None:
    family, folder = BASES["llama"], tmp_path_factory.mktemp("mix")
    expected = written_by_peft(
        family,
        folder / "peft",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern=dict(sorted(ranks.items())),  # PEFT takes the first match, but sorts the keys when it saves
        alpha_pattern=dict(sorted(alphas.items())),
        layers_to_transform=layers,
        use_rslora=stabilised,
    )
    model = family.model()
    epitaxy.load(model, folder / "peft", name="x")
    found = run(family, model)
    close(found, expected)
    epitaxy.save(model, folder / "ours")
    epitaxy.save(model, folder / "back", format="peft")
    again = family.model()
    epitaxy.load(again, folder / "ours")
    assert torch.equal(run(family, again), found)
    close(run(family, peft.PeftModel.from_pretrained(family.model(), str(folder / "back"))), expected)
