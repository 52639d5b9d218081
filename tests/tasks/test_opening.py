"""Opening classifiers: heads kept or drawn anew, strictness, and what cannot be opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaForSequenceClassification

from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.models.opening import open_classifier
from tests.tasks.bases import SAVERS, SIZES, save_bert, save_vit, tokenizer


def head_of(model: torch.nn.Module) -> torch.nn.Linear:
    head = model.get_submodule(describe(model).roles["head"][0].path)
    assert isinstance(head, torch.nn.Linear)
    return head


@pytest.mark.parametrize("kind", SAVERS)
def test_the_same_labels_keep_the_head_and_others_draw_a_new_one(kind: str, tmp_path: Path) -> None:
    path = SAVERS[kind](tmp_path / kind, ("one", "two"))
    kept = open_classifier(str(path), ["one", "two"])
    assert kept.head == "kept"
    assert kept.modality == {"vit": "vision", "bert": "text", "gpt2": "text"}.get(kind, "audio")
    stored = load_file(path / "model.safetensors")
    for key, tensor in kept.model.state_dict().items():
        assert key not in stored or torch.equal(tensor, stored[key])
    for labels in (["one", "two", "three"], ["yes", "no"]):
        torch.manual_seed(5)
        fresh = open_classifier(str(path), labels)
        assert fresh.head == "fresh"
        assert fresh.model.config.id2label == dict(enumerate(labels))
        head = head_of(fresh.model)
        assert head.out_features == len(labels)
        assert 0.005 < float(head.weight.detach().std()) < 0.05
        torch.manual_seed(5)
        assert torch.equal(head_of(open_classifier(str(path), labels).model).weight, head.weight)
        torch.manual_seed(6)
        assert not torch.equal(head_of(open_classifier(str(path), labels).model).weight, head.weight)
        own = dict(kept.model.named_parameters())
        name = next(name for name, module in fresh.model.named_modules() if module is head)
        for key, parameter in fresh.model.named_parameters():
            assert key.startswith(name) or torch.equal(parameter, own[key]), key


def test_unnamed_labels_are_given_names_and_keep_their_head(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "m", ("LABEL_0", "LABEL_1"))
    opened = open_classifier(str(path), ["cat", "dog"])
    assert opened.head == "kept"
    assert opened.model.config.id2label == {0: "cat", 1: "dog"}


def test_a_trunk_alone_gets_a_head(tmp_path: Path) -> None:
    opened = open_classifier(str(save_vit(tmp_path / "m", headless=True)), ["LABEL_0", "LABEL_1"])
    assert opened.head == "fresh"


def test_weights_come_in_the_type_asked_for(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "m")
    opened = open_classifier(str(path), ["one", "two"], "bfloat16")
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.bfloat16}
    with pytest.raises(EpitaxyError, match="no weight type is called 'bfloat61'; did you mean 'bfloat16'"):
        open_classifier(str(path), ["one", "two"], "bfloat61")


@pytest.mark.parametrize(("name", "modality"), [("reference-vit", "vision"), ("reference-ast", "audio")])
def test_the_reference_models_open(name: str, modality: str) -> None:
    opened = open_classifier(name, ["a", "b", "c"])
    assert opened.modality == modality
    assert opened.head == "fresh"
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.float32}
    assert head_of(opened.model).out_features == 3


def test_a_missing_weight_is_told(tmp_path: Path) -> None:
    path = save_bert(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["bert.pooler.dense.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 weights are not in its files .* 'bert.pooler.dense.weight'"):
        open_classifier(str(path), ["one", "two"])


def test_a_weight_of_another_size_is_refused(tmp_path: Path) -> None:
    path = save_bert(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["bert.pooler.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"1 weights have other sizes .* 'bert.pooler.dense.weight'"):
        open_classifier(str(path), ["one", "two"])


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    labels = ["one", "two"]
    with pytest.raises(FormatError, match="no such directory"):
        open_classifier(str(tmp_path / "gone"), labels)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="expected the directory of a model, found a file"):
        open_classifier(str(tmp_path / "file"), labels)
    (tmp_path / "bare").mkdir()
    with pytest.raises(FormatError, match=r"config.json is missing"):
        open_classifier(str(tmp_path / "bare"), labels)
    with pytest.raises(FormatError, match=r"nobody/nothing-here: cannot open the model's config: "):
        open_classifier("nobody/nothing-here", labels)
    with pytest.raises(FormatError, match=r"did you mean 'reference-vit'"):
        open_classifier("reference-vti", labels)

    pickled = save_vit(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no weights in safetensors there; pytorch_model.bin is never opened"):
        open_classifier(str(pickled), labels)

    torn = save_vit(tmp_path / "torn")
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"torn: its weights are truncated or not safetensors"):
        open_classifier(str(torn), labels)

    mute = save_vit(tmp_path / "mute")
    (mute / "preprocessor_config.json").unlink()
    with pytest.raises(FormatError, match=r"mute: preprocessor_config.json is missing, which says how"):
        open_classifier(str(mute), labels)

    strange = save_vit(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "nosuchmodel"}))
    with pytest.raises(FormatError, match=r"strange: cannot open the model's config: .*nosuchmodel"):
        open_classifier(str(strange), labels)


def test_the_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (path / "config.json").write_text(json.dumps({**config, **foreign}))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(FormatError, match=r"m: cannot open the model's config: "):
        open_classifier(str(path), ["one", "two"])
    assert not (tmp_path / "ran").exists()


def test_the_head_of_roberta_is_its_last_layer(tmp_path: Path) -> None:
    config = RobertaConfig(**SIZES, vocab_size=16, max_position_embeddings=26, num_labels=3)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    opened = open_classifier(str(tmp_path / "m"), ["a", "b"])
    assert head_of(opened.model) is opened.model.classifier.out_proj
    assert opened.model.classifier.out_proj.out_features == 2


def test_labels_are_checked() -> None:
    with pytest.raises(EpitaxyError, match="at least two labels"):
        open_classifier("reference-vit", ["only"])
    with pytest.raises(EpitaxyError, match="'a' is there twice"):
        open_classifier("reference-vit", ["a", "b", "a"])


def test_opening_is_silent_and_restores_the_verbosity(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    path = save_vit(tmp_path / "m")
    capfd.readouterr()
    before = logging.get_verbosity()
    open_classifier(str(path), ["a", "b", "c"])
    assert logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
