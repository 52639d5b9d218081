"""Saving and loading: strict, transactional, atomic; every kind of bad file gets its sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epitaxy
from epitaxy.core import files
from epitaxy.core.errors import EpitaxyError, FormatError, StateError
from epitaxy.core.host import hosted


def vit(width: int = 32) -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = vit()
    for parameter in epitaxy.attach(model, epitaxy.LoRA(rank=2) + epitaxy.BitFit(), name="mine").parameters():
        nn.init.normal_(parameter, std=0.1)
    return epitaxy.save(model, tmp_path / "adapter", name="mine")


def refused(path: Path, match: str, model: nn.Module | None = None) -> str:
    """Loading fails with one sentence that names the file, and leaves the model as it was."""
    model = vit() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(EpitaxyError, match=match) as caught:
        epitaxy.load(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert hosted(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return message


def rewrite(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors of a saved adapter, or with None remove them; its header is kept."""
    tensors, metadata = files.read_tensors(path / files.TENSORS)
    kept = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
    save_file(kept, path / files.TENSORS, metadata)


def reconfigure(path: Path, **changes: object) -> None:
    """Change the config in the header of a saved adapter."""
    tensors, metadata = files.read_tensors(path / files.TENSORS)
    config = {**json.loads(metadata[files.MARK]), **changes}
    save_file(tensors, path / files.TENSORS, {files.MARK: json.dumps(config)})


def test_what_is_saved_is_what_loads(saved: Path) -> None:
    model = vit()
    adapter = epitaxy.load(model, saved)
    stored = load_file(saved / files.TENSORS)
    assert adapter.name == "mine"
    assert not adapter.trainable
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert adapter.tensors().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in adapter.tensors().items())
    assert all(p.requires_grad for p in epitaxy.load(vit(), saved, name="other", trainable=True).parameters())


def test_equal_adapters_give_equal_files(saved: Path, tmp_path: Path) -> None:
    """Byte for byte, so that a resumed run can be told to have ended where an uninterrupted one ends."""
    model = vit()
    epitaxy.load(model, saved)
    for number in range(8):
        again = epitaxy.save(model, tmp_path / str(number))
        assert (again / files.TENSORS).read_bytes() == (saved / files.TENSORS).read_bytes()


def test_inspect_reads_without_a_model(saved: Path) -> None:
    contents = epitaxy.inspect(saved)
    assert (contents.format, contents.name) == ("epitaxy", "mine")
    assert [entry["method"] for entry in contents.methods] == ["lora", "bitfit"]
    assert contents.parameters == sum(tensor.numel() for tensor in load_file(saved / files.TENSORS).values())
    assert "lora" in str(contents)
    assert epitaxy.inspect(saved / files.TENSORS).name == "mine"


def test_missing_extra_and_misshaped_tensors(saved: Path) -> None:
    key = "lora.attention.q.0.down"
    rewrite(saved, {key: None})
    assert key in refused(saved, "1 tensors are missing")
    rewrite(saved, {key: torch.zeros(2, 32), "stray": torch.zeros(1)})
    assert "'stray'" in refused(saved, "have no place")
    rewrite(saved, {key: torch.zeros(2, 31), "stray": None})
    refused(saved, r"shape \(2, 31\), this model needs \(2, 32\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(saved: Path, value: float) -> None:
    rewrite(saved, {"bitfit.attention.q.0.bias": torch.full((32,), value)})
    refused(saved, "NaN or infinite")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(32, dtype=torch.int8), r"of type torch\.int8, this model needs torch\.float32"),
        (torch.ones(32, dtype=torch.complex64), r"torch\.complex64"),
        (torch.full((32,), 1e300, dtype=torch.float64), "NaN or infinite"),  # once it is a float32
    ],
)
def test_values_of_another_kind(saved: Path, value: Tensor, says: str) -> None:
    rewrite(saved, {"bitfit.attention.q.0.bias": value})
    refused(saved, says)


def test_another_base(saved: Path) -> None:
    refused(saved, "of other sizes", vit(width=64))
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    refused(saved, "family 'vit', this model is 'bert'", transformers.BertModel(config))


def test_other_weights_of_the_same_shape_give_a_warning(saved: Path) -> None:
    model = vit()
    with torch.no_grad():
        model.vit.layernorm.weight += 1
    with pytest.warns(UserWarning, match="other weights"):
        epitaxy.load(model, saved)


def test_the_same_base_in_half_precision_is_the_same_base(saved: Path, recwarn: pytest.WarningsRecorder) -> None:
    epitaxy.load(vit().to(torch.bfloat16), saved)
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]


@pytest.mark.parametrize("keep", [0, 7, 400, -1])
def test_truncated_files(saved: Path, keep: int) -> None:
    whole = (saved / files.TENSORS).read_bytes()
    (saved / files.TENSORS).write_bytes(whole[:keep])
    refused(saved, "empty" if keep == 0 else "truncated")
    with pytest.raises(FormatError):
        epitaxy.inspect(saved)


def test_pickles_are_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/sprung",)

    (saved / files.TENSORS).write_bytes(pickle.dumps(Trap()))
    refused(saved, "pickle, which is never opened")
    torch.save({"weight": torch.zeros(1)}, saved / files.TENSORS)
    refused(saved, "pickle, which is never opened")
    assert not (tmp_path / "sprung").exists()


def test_foreign_files(saved: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, saved / files.TENSORS)
    refused(saved, "not from epitaxy")
    save_file({"weight": torch.zeros(1)}, saved / files.TENSORS, {files.MARK: "{"})
    refused(saved, "no readable config")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found nothing")
    refused(tmp_path / "absent", "no such file or directory")
    (saved / files.TENSORS).unlink()
    refused(saved, f"{files.TENSORS} is missing")


def test_a_config_of_another_time(saved: Path) -> None:
    reconfigure(saved, schema=99)
    refused(saved, "schema 99 by a newer epitaxy")
    reconfigure(saved, schema=1, methods=[{"method": "lorra"}])
    assert "'lora'" in refused(saved, "no method is called 'lorra'")
    reconfigure(saved, methods=[{"method": "lora", "rnak": 2}])
    assert "'rank'" in refused(saved, "no field 'rnak'")
    reconfigure(saved, methods=[{"method": "lora", "at": "attention.x"}])
    refused(saved, "attention.x")
    reconfigure(saved, methods=[{"method": "lora", "alpha": float("nan")}])
    refused(saved, "alpha must be a finite number")
    reconfigure(saved, layout={**epitaxy.Layout("x", {"mlp": "mlp"}).to_dict(), "pattern": "("})
    assert refused(saved, "layout that cannot be read").count(str(saved)) == 1
    reconfigure(saved, layout=None, schema=-1)
    refused(saved, "no readable config")


def test_a_failed_load_keeps_the_adapters_that_are_there(saved: Path) -> None:
    model = vit()
    epitaxy.attach(model, epitaxy.LoRA(rank=1), name="first")
    rewrite(saved, {"lora.attention.q.0.down": None})
    with pytest.raises(FormatError):
        epitaxy.load(model, saved)
    assert list(epitaxy.adapters(model)) == ["first"]
    record = hosted(model)
    assert record is not None
    assert record.state.active == ("first",)


def test_two_adapters_of_one_name(saved: Path) -> None:
    model = vit()
    epitaxy.load(model, saved)
    with pytest.raises(StateError, match="called 'mine' is attached already"):
        epitaxy.load(model, saved)
    assert epitaxy.load(model, saved, name="again").name == "again"


def test_a_crash_while_saving_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = vit()
    nn.init.normal_(next(epitaxy.load(model, saved).parameters()))

    def crash(*_: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="went away"):
        epitaxy.save(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old
    monkeypatch.undo()
    epitaxy.save(model, saved)
    assert (saved / files.TENSORS).read_bytes() != old[files.TENSORS]


def test_saving_refuses_what_it_would_regret(saved: Path, tmp_path: Path) -> None:
    model = vit()
    adapter = epitaxy.attach(model, epitaxy.LoRA(rank=2), name="other")
    with pytest.raises(FormatError, match="holds the adapter 'mine'"):
        epitaxy.save(model, saved)
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = float("nan")
    with pytest.raises(StateError, match="NaN or infinite"):
        epitaxy.save(model, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    (tmp_path / "file").write_text("")
    nn.init.zeros_(next(adapter.parameters()))
    with pytest.raises(FormatError, match="expected a directory"):
        epitaxy.save(model, tmp_path / "file")
    with pytest.raises(EpitaxyError, match="no format is called 'pfet'; did you mean 'peft'"):
        epitaxy.save(model, tmp_path / "x", format="pfet")
    epitaxy.attach(model, epitaxy.LoRA(rank=2), name="second")
    with pytest.raises(StateError, match="say which adapter to save: other, second"):
        epitaxy.save(model, tmp_path / "x")


def test_the_card_is_renewed_until_somebody_edits_it(saved: Path) -> None:
    model = vit()
    adapter = epitaxy.load(model, saved)
    adapter.provenance["license"] = "MIT"
    epitaxy.save(model, saved)
    assert "license: MIT" in (saved / files.CARD).read_text()
    (saved / files.CARD).write_text("mine")
    epitaxy.save(model, saved)
    assert (saved / files.CARD).read_text() == "mine"


def test_an_adapter_is_one_movable_directory(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / files.CONFIG).unlink()  # the header of the tensor file is enough
    assert epitaxy.load(vit(), tmp_path / "elsewhere").name == "mine"
