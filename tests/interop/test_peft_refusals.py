"""Files that are not a plain LoRA of this base: one sentence naming file and field, and a model left as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epitaxy
from epitaxy.core.errors import EpitaxyError, FormatError
from tests.interop.bases import BASES, photograph, run, written_by_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
PREFIX = "base_model.model."
FIRST = f"{PREFIX}vit.layers.0.attention.q_proj.lora_"
Tensors = dict[str, Tensor]


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def replaced(key: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: value}


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "dora": ({"use_dora": True}, "use_dora is set: DoRA"),
    "lora bias": ({"lora_bias": True}, "lora_bias is set"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config is set"),
    "replicated layers": ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is set"),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters is set"),
    "token indices": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying is set"),
    "qalora": ({"use_qalora": True}, "use_qalora is set"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changed the base weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda' changed the base weights"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights = 'lora_ga' changed the base weights"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' changed the base"),
    "loftq only": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config = .* changed the base weights"),
    "from the future": ({"use_warp": 3}, "use_warp = 3 is a field this version does not know"),
    "rank zero": ({"r": 0}, "r must be a positive integer, found 0"),
    "rank in words": ({"r": "eight"}, "r must be a positive integer, found 'eight'"),
    "true rank": ({"r": True}, "r must be a positive integer, found True"),
    "alpha": ({"lora_alpha": "NaN"}, "lora_alpha must be a number"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout must be a number from 0 to below 1, found 1.5"),
    "bias": ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', found 'some'"),
    "targets": ({"target_modules": [1]}, "target_modules must be a list of module names"),
    "a broken regex": ({"target_modules": "(q_proj"}, "target_modules has '\\(q_proj', which is no regular"),
    "a broken pattern": ({"rank_pattern": {"[": 3}}, "rank_pattern has '\\[', which is no regular"),
    "pattern of words": ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern must be a mapping of names to numbers"),
    "layers": ({"layers_to_transform": ["one"]}, "layers_to_transform must be an integer or a list"),
    "another rank": ({"r": 4}, r"lora_A.weight' has shape \(3, 32\), but r and rank_pattern .* say rank 4"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "2 modules that target_modules .*mlp.fc1"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "2 modules have tensors .* the first is .*v_proj"),
    "all-linear": ({"target_modules": "all-linear"}, "modules that target_modules .* names have no tensors"),
    "more saved": ({"modules_to_save": ["classifier"]}, "modules_to_save names 'classifier' but its weight is missing"),
}
CONTENTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing tensor": (without(f"{FIRST}B.weight"), "'vit.layers.0.attention.q_proj' has no tensor lora_B"),
    "a mis-shaped factor": (replaced(f"{FIRST}A.weight", torch.ones(3, 31)), r"lora_A.*\(3, 31\).*needs \(3, 32\)"),
    "a mis-shaped product": (replaced(f"{FIRST}B.weight", torch.ones(33, 3)), r"lora_B.*\(33, 3\).*needs \(32, 3\)"),
    "a vector": (replaced(f"{FIRST}A.weight", torch.ones(3)), r"lora_A.*has shape \(3,\)"),
    "an empty shard": (replaced(f"{FIRST}A.weight", torch.ones(0)), r"lora_A.*has shape \(0,\)"),
    "not numbers": (replaced(f"{FIRST}A.weight", torch.full((3, 32), torch.nan)), "holds NaN or infinite values"),
    "a magnitude": (replaced(f"{FIRST}magnitude_vector", torch.ones(32)), "part of a LoRA variant"),
    "an embedding": (replaced(f"{PREFIX}vit.x.lora_embedding_A", torch.ones(3, 9)), "is a LoRA of an embedding"),
    "a factor's bias": (replaced(f"{FIRST}B.bias", torch.ones(32)), "lora_B.bias' is part of a LoRA variant"),
    "two adapters": (replaced(f"{FIRST}A.other.weight", torch.ones(3, 32)), "more than one adapter for"),
    "a weight of the base": (
        replaced(f"{PREFIX}vit.layers.0.mlp.fc1.weight", torch.ones(64, 32)),
        "mlp.fc1.weight' is a changed weight of the base model",
    ),
    "a bias of the base": (
        replaced(f"{PREFIX}classifier.bias", torch.ones(3)),
        "'base_model.model.classifier.bias'",
    ),
    "an unknown module": (
        replaced(f"{PREFIX}vit.layers.9.attention.q_proj.lora_A.weight", torch.ones(3, 32)),
        "has no tensor lora_B",
    ),
    "nothing": (lambda tensors: {}, "holds no LoRA tensors"),
}


def refused(folder: Path, message: str, name: str = "vit", place: str | None = None) -> str:
    """Load onto a bare base and onto one with an adapter: the same refusal, and both left as they were."""
    family = BASES[name]
    bare, used = family.model(), family.model()
    epitaxy.attach(used, epitaxy.LoRA("linear", 1), "mine")
    for model in (bare, used):
        unchanged = photograph(model)
        with pytest.raises(FormatError, match=message) as caught:
            epitaxy.load(model, folder, name="x")
        text = str(caught.value)
        assert "\n" not in text
        assert str(place or folder) in text
        unchanged()
    return text


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_cannot_be_taken(case: str, tmp_path: Path) -> None:
    fields, message = FIELDS[case]
    written_by_peft(BASES["vit"], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    refused(tmp_path, message)


@pytest.mark.parametrize("case", CONTENTS)
def test_tensors_that_cannot_be_taken(case: str, tmp_path: Path) -> None:
    change, message = CONTENTS[case]
    written_by_peft(BASES["vit"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    refused(tmp_path, message, place=str(file))


def test_unknown_fields_without_effect_are_ignored(tmp_path: Path) -> None:
    expected = written_by_peft(BASES["vit"], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_warp": False, "warp_config": None}))
    model = BASES["vit"].model()
    epitaxy.load(model, tmp_path, name="x")
    torch.testing.assert_close(run(BASES["vit"], model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base"),
        ({"init_lora_weights": "olora"}, "'olora' changed the base"),
        ({"lora_bias": True}, "lora_bias is set"),
    ],
)
def test_variants_as_peft_really_writes_them(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    written_by_peft(BASES["vit"], tmp_path, **config)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
        lambda: peft.OFTConfig(target_modules=["query"], r=2, oft_block_size=0),
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        lambda: peft.AdaLoraConfig(target_modules=["query"], total_step=10),
    ],
)
def test_other_methods_as_peft_really_writes_them(config: Callable[[], Any], tmp_path: Path) -> None:
    peft.get_peft_model(BASES["bert"].model(), config()).save_pretrained(str(tmp_path))
    refused(tmp_path, "peft_type is", "bert")


def test_lora_on_embeddings(tmp_path: Path) -> None:
    written_by_peft(BASES["gpt2"], tmp_path, target_modules=["wte", "c_attn"])
    refused(tmp_path, "is a LoRA of an embedding", "gpt2")


def test_a_whole_embedding_to_save(tmp_path: Path) -> None:
    written_by_peft(BASES["llama"], tmp_path, modules_to_save=["embed_tokens"])
    refused(
        tmp_path, "modules_to_save holds 'model.embed_tokens' of class Embedding; only linear heads and norms", "llama"
    )


def test_batch_norm_statistics_of_another_run(tmp_path: Path) -> None:
    def drift(model: Any) -> None:
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name and name.endswith("running_mean"):
                buffer += 1

    written_by_peft(BASES["resnet"], tmp_path, modules_to_save=["normalization"], change=drift)
    refused(tmp_path, "running_mean' is a changed weight of the base", "resnet")


@pytest.mark.parametrize(("made_for", "loaded_on"), [("llama", "gpt2"), ("vit", "bert"), ("dinov2", "vit")])
def test_another_base_is_named_with_the_nearest_modules(made_for: str, loaded_on: str, tmp_path: Path) -> None:
    written_by_peft(BASES[made_for], tmp_path)
    text = refused(tmp_path, "made for another base model: .* do not exist in this", loaded_on)
    assert type(BASES[loaded_on].model()).__name__ in text


def test_the_nearest_modules_are_named(tmp_path: Path) -> None:
    written_by_peft(BASES["vit"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("layers.1", "layers.7"): value for key, value in load_file(file).items()}, file)
    refused(
        tmp_path,
        "2 of its 4 modules .* the first is 'vit.layers.7.attention.q_proj'; did you mean 'vit.layers.[01].a",
    )


def test_a_smaller_base(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    written_by_peft(BASES["vit"], tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes))
    unchanged = photograph(model)
    with pytest.raises(FormatError, match=r"lora_A.weight' has shape \(3, 32\), but .* needs \(3, 16\)"):
        epitaxy.load(model, tmp_path, name="x")
    unchanged()


@pytest.mark.parametrize(
    ("options", "message"), [({"groups": 3}, "it works in 3 groups"), ({"dilation": 2}, "it is dilated")]
)
def test_convolutions_that_peft_computes_otherwise(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, **options)

    peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["first"])).save_pretrained(str(tmp_path))
    model = Net()
    unchanged = photograph(model)
    with pytest.raises(FormatError, match=f"the convolution 'first' cannot take PEFT's change: {message}"):
        epitaxy.load(model, tmp_path, name="x")
    unchanged()


def test_fused_attention(tmp_path: Path) -> None:
    """torch's MultiheadAttention reads its weights without calling its parts: a LoRA there would never run."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2)

    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["mix"]))
    wrapped.save_pretrained(str(tmp_path))
    model = Net()
    unchanged = photograph(model)
    with pytest.raises(EpitaxyError, match="MultiheadAttention"):
        epitaxy.load(model, tmp_path, name="x")
    unchanged()


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written_by_peft(BASES["vit"], tmp_path, bin_file=True)
    file = tmp_path / "adapter_model.bin"
    torch.save({"x": Bomb()}, file)
    refused(tmp_path, "not a readable file of plain tensors", place=str(file))
    file.write_bytes(pickle.dumps({"x": Bomb()}))
    refused(tmp_path, "not a readable file of plain tensors", place=str(file))
    torch.save([torch.ones(2)], file)
    refused(tmp_path, "expected a mapping of names to tensors", place=str(file))
    torch.save({3: torch.ones(2)}, file)
    refused(tmp_path, "expected a mapping of names to tensors", place=str(file))
    torch.save({"x": 3}, file)
    refused(tmp_path, "expected a mapping of names to tensors", place=str(file))
    assert not (tmp_path / "exploded").exists()


def test_broken_files(tmp_path: Path) -> None:
    written_by_peft(BASES["vit"], tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole, text = tensors.read_bytes(), config.read_text()
    for data in (whole[: len(whole) // 2], b"", whole[:5], b"\x80\x04 pickled"):
        tensors.write_bytes(data)
        refused(tmp_path, "adapter_model.safetensors")
    tensors.unlink()
    refused(tmp_path, "neither adapter_model.safetensors nor adapter_model.bin")
    tensors.write_bytes(whole)
    for broken in (text[: len(text) // 2], "", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "[1, 2]"):
        config.write_text(broken)
        refused(tmp_path, "adapter_config.json: (not readable as JSON|expected a JSON object)")
    config.unlink()
    refused(tmp_path, "adapter_config.json: no such file")


def test_a_name_in_use(tmp_path: Path) -> None:
    family = BASES["vit"]
    written_by_peft(family, tmp_path)
    model = family.model()
    epitaxy.load(model, tmp_path, name="x")
    unchanged = photograph(model)
    with pytest.raises(EpitaxyError, match="'x' is attached already"):
        epitaxy.load(model, tmp_path, name="x")
    unchanged()
