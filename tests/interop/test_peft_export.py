"""Our adapters written for PEFT: loaded there, they compute the same, or they are not written at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

import epitaxy
from epitaxy import BitFit, Bottleneck, Head, LoRA, NormTuning, Prefix, Prompt
from epitaxy.core.errors import EpitaxyError, FormatError, UnsupportedError
from tests.contract.families import Family
from tests.interop.bases import BASES, close, differs, run, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

QV = ("attention.q", "attention.v")
ADAPTERS: dict[str, tuple[str, Any]] = {
    "vit": ("vit", LoRA(QV, 3, alpha=5)),
    "dinov2": ("dinov2", LoRA(("attention.q", "mlp.up"), 2)),
    "swin": ("swin", LoRA("attention.*", 2, alpha=1)),
    "ast": ("ast", LoRA(QV, 4)),
    "wav2vec2": ("wav2vec2", LoRA(("attention.q", "mlp.up"), 3, alpha=0.7)),
    "whisper": ("whisper", LoRA(("attention.q", "mlp.down"), 3)),
    "bert": ("bert", LoRA(("attention.output", "mlp.down"), 3)),
    "llama": ("llama", LoRA("linear", 2, alpha=9)),
    "gpt2": ("gpt2", LoRA(("attention.qkv", "mlp.up", "mlp.down"), 3)),
    "sd15": ("sd15", LoRA(("cross_attention.k", "resnet.conv", "sampler.conv"), 3)),
    "plain": ("plain", LoRA((*QV, "mlp.up"), 3)),
    "resnet": ("resnet", LoRA("conv", 3)),
    "odd names": ("odd names", LoRA("=conv", 2) + LoRA(("=block.conv", "=mid"), 3)),
    "mixed ranks": ("llama", LoRA("attention.q", 2) + LoRA("attention.v", 5, alpha=3) + LoRA("mlp.*", 1, alpha=0.1)),
    "rank-stabilised": ("bert", LoRA("attention.q", 3, 7, rank_stabilised=True) + LoRA("mlp", 5, rank_stabilised=True)),
    "stabilised and plain": ("vit", LoRA("attention.q", 3, 7, rank_stabilised=True) + LoRA("attention.v", 3, 7)),
    "stacked": ("llama", LoRA("attention.q", 2, alpha=3) + LoRA(QV, 3, alpha=7)),
    "stacked convolutions": ("resnet", LoRA("conv", 2, alpha=3) + LoRA("conv", 3, alpha=3)),
    "layers": ("vit", LoRA(QV, 2, layers=(1,)) + LoRA("mlp.up", 2, layers=(0,))),
    "the output layer": ("llama", LoRA(("attention.q", "head"), 2)),
    "head": ("vit", LoRA("attention.q", 2) + Head()),
    "text head": ("bert", LoRA("attention.q", 2) + Head()),
    "two heads": ("wav2vec2", LoRA("attention.q", 2) + Head() + Head(at="projector")),
    "language head": ("llama", LoRA("attention.q", 2) + Head()),
    "norms": ("llama", LoRA("attention.q", 2) + NormTuning()),
    "layer norms": ("vit", LoRA("attention.q", 2) + NormTuning(bias=False)),
    "batch norms": ("resnet", LoRA("conv", 2) + NormTuning()),
}


def load_in_peft(family: Family, folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(family.model(), str(folder))
    return model


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_and_transformers_compute_the_same(case: str, tmp_path: Path) -> None:
    name, method = ADAPTERS[case]
    family = BASES[name]
    model = with_adapter(family, method)
    expected = run(family, model)
    epitaxy.save(model, tmp_path, format="peft")
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    wrapped = load_in_peft(family, tmp_path)
    close(run(family, wrapped), expected)
    theirs = {key for key in peft.get_peft_model_state_dict(wrapped) if "lora_" in key or "modules_to_save" in key}
    assert theirs <= load_file(tmp_path / "adapter_model.safetensors").keys()

    ours = family.model()
    differs(run(family, ours), expected)
    if isinstance(ours, PreTrainedModel):  # asked on the mixin: wav2vec2 has another method of that name
        other = family.model()
        report = PeftAdapterMixin.load_adapter(other, str(tmp_path))
        assert not report.missing_keys | report.unexpected_keys | report.mismatched_keys
        close(run(family, other), expected)
    epitaxy.load(ours, tmp_path, name="x")
    close(run(family, ours), expected)


def test_equal_to_the_last_bit_where_the_arithmetic_is(tmp_path: Path) -> None:
    """Tensors, ranks and scales are stored exactly: PEFT's change of every weight has the bits of ours."""
    family = BASES["gpt2"]
    model = with_adapter(family, LoRA("attention.*", 3, alpha=5) + LoRA("mlp.*", 4, alpha=1, rank_stabilised=True))
    epitaxy.save(model, tmp_path, format="peft")
    wrapped = load_in_peft(family, tmp_path)
    for piece in epitaxy.adapters(model)["default"].pieces:
        layer = wrapped.base_model.model.get_submodule(piece.path)
        assert torch.equal(layer.lora_A["default"].weight, piece.module.down)
        assert torch.equal(layer.lora_B["default"].weight, piece.module.up)
        assert layer.scaling["default"] == pytest.approx(piece.module.scale, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "method", "task"),
    [
        ("llama", LoRA(), "CAUSAL_LM"),
        ("gpt2", LoRA(), "CAUSAL_LM"),
        ("bert", LoRA(), None),  # PEFT would demand a classifier in the file
        ("bert", LoRA() + Head(), "SEQ_CLS"),
        ("vit", LoRA() + Head(), None),
        ("wav2vec2", LoRA(), None),
    ],
)
def test_task_type_base_and_targets(name: str, method: Any, task: str | None, tmp_path: Path) -> None:
    family = BASES[name]
    model = with_adapter(family, method)
    model.config._name_or_path = "someone/base-7b"  # type: ignore[union-attr]
    epitaxy.save(model, tmp_path, format="peft")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.task_type == task
    assert config.base_model_name_or_path == "someone/base-7b"
    assert (config.auto_mapping is None) == (task is not None)
    assert "base_model: someone/base-7b" in (tmp_path / "README.md").read_text()
    assert config.fan_in_fan_out == (name == "gpt2")
    targets = {"llama": {"q_proj", "v_proj"}, "gpt2": {"c_attn"}, "bert": {"query", "value"}}
    assert config.target_modules == targets.get(name, {"q_proj", "v_proj"})


def test_bf16_base(tmp_path: Path) -> None:
    family = BASES["llama"]
    model = family.model().bfloat16()
    epitaxy.attach(model, LoRA(QV, 4))
    for parameter in epitaxy.adapters(model)["default"].parameters():
        nn.init.normal_(parameter, std=0.1)
    epitaxy.save(model, tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(family.model().bfloat16(), str(tmp_path))
    found, expected = run(family, wrapped).float(), run(family, model).float()
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_merged_adapter_is_written_as_it_is(tmp_path: Path) -> None:
    family = BASES["llama"]
    model = with_adapter(family, LoRA(QV, 4) + NormTuning(at="norm.mlp"))
    expected = run(family, model)
    epitaxy.merge(model)
    epitaxy.save(model, tmp_path, format="peft")
    close(run(family, load_in_peft(family, tmp_path)), expected)


def test_merging_there_agrees_with_merging_here(tmp_path: Path) -> None:
    for name, method in (("gpt2", LoRA("attention.*", 3)), ("sd15", LoRA("resnet.conv", 3))):
        family = BASES[name]
        model = with_adapter(family, method)
        epitaxy.save(model, tmp_path / name, format="peft")
        theirs = load_in_peft(family, tmp_path / name).merge_and_unload().state_dict()
        epitaxy.merge(model)
        for key, value in theirs.items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-5)


class Dilated(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        return y


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "bottleneck": ("vit", LoRA() + Bottleneck(bottleneck=4), r"part 'bottleneck' \(Branch at 'vit.layers.0.mlp"),
    "prefix": ("bert", LoRA() + Prefix(tokens=2), "part 'prefix'"),
    "prompt": ("vit", Prompt(tokens=2) + LoRA(), "part 'prompt'"),
    "biases": ("bert", LoRA() + BitFit(at="attention.q"), r"part 'bitfit' \(Swap at 'bert.encoder.layer.0"),
    "no LoRA": ("vit", Head(), "it has no LoRA part"),
    "head of another size": ("vit", LoRA() + Head(labels=9), r"its head at 'classifier' .*\(9, 32\).*\(3, 32\)"),
    "LoRA inside a saved module": ("vit", LoRA(("attention.q", "head")) + Head(), "'classifier' lies in a module"),
    "names that end alike": ("odd names", LoRA("=conv") + Head(at="=mid"), "'block.mid' for one of the modules"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_peft_cannot_express_is_not_written(case: str, tmp_path: Path) -> None:
    name, method, message = REFUSALS[case]
    model = with_adapter(BASES[name], method)
    with pytest.raises(UnsupportedError, match=message) as caught:
        epitaxy.save(model, tmp_path / "out", format="peft")
    assert "cannot be written as a PEFT LoRA" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dilation": 2}, "dilated"), ({"padding": 1, "padding_mode": "circular"}, "pads by 'circular'")],
)
def test_convolutions_that_peft_computes_otherwise(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Dilated(**options)
    epitaxy.attach(model, LoRA("conv", 2))
    with pytest.raises(UnsupportedError, match=message):
        epitaxy.save(model, tmp_path / "out", format="peft")
    plain = Dilated(stride=2, padding=1)
    epitaxy.attach(plain, LoRA("conv", 2))
    epitaxy.save(plain, tmp_path / "out", format="peft")


def test_a_change_that_differs_by_row_is_refused(tmp_path: Path) -> None:
    model = with_adapter(BASES["vit"], LoRA("attention.q", 2))
    edit = epitaxy.adapters(model)["default"].edits[0]
    edit.bind(torch.randn(3, 2, 32), torch.randn(3, 32, 2))
    with pytest.raises(UnsupportedError, match="differs from row to row"):
        epitaxy.save(model, tmp_path / "out", format="peft")
    edit.bind(torch.full((5, 32), 0.5), torch.full((32, 5), 2.0))  # one change for all rows, as a generator makes it
    epitaxy.save(model, tmp_path / "out", format="peft")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"].shape == (5, 32)
    assert stored["base_model.model.vit.layers.1.attention.q_proj.lora_A.weight"].shape == (2, 32)


def test_an_interrupted_rewrite_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors beside an old config would load and be wrong: at any moment the directory is whole or refused."""
    from epitaxy.interop import peft_write

    family = BASES["vit"]
    epitaxy.save(with_adapter(family, LoRA(QV, 2, alpha=1)), tmp_path, format="peft")
    original, calls = peft_write.write_atomically, []

    def fail_at(number: int) -> None:
        def write(path: Path, data: bytes) -> None:
            calls.append(path)
            if len(calls) == number:
                raise OSError("disk full")
            original(path, data)

        calls.clear()
        monkeypatch.setattr(peft_write, "write_atomically", write)

    for number in (1, 2):
        fail_at(number)
        with pytest.raises(OSError, match="disk full"):
            epitaxy.save(with_adapter(family, LoRA(QV, 2, alpha=50)), tmp_path, format="peft")
        with pytest.raises(FormatError, match=r"adapter_config\.json: no such file"):
            epitaxy.load(family.model(), tmp_path, name="x")
    fail_at(0)
    epitaxy.save(with_adapter(family, LoRA(QV, 2, alpha=50)), tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 50


def test_a_directory_may_hold_both_formats(tmp_path: Path) -> None:
    family = BASES["vit"]
    model = with_adapter(family, LoRA(QV, 2), name="mine")
    epitaxy.save(model, tmp_path)
    epitaxy.save(model, tmp_path, format="peft")
    assert epitaxy.inspect(tmp_path).format == "epitaxy"
    close(run(family, load_in_peft(family, tmp_path)), run(family, model))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(EpitaxyError, match="expected a directory"):
        epitaxy.save(with_adapter(BASES["vit"], LoRA()), tmp_path / "file", format="peft")
    assert (tmp_path / "file").read_text() == "here"


ROLES = ["attention.q", "attention.k", "attention.v", "attention.output", "mlp.up", "mlp.gate", "mlp.down", "head"]
part = st.builds(
    LoRA,
    at=st.lists(st.sampled_from(ROLES), min_size=1, max_size=4, unique=True).map(tuple),
    rank=st.integers(1, 8),
    alpha=st.one_of(st.none(), st.integers(1, 32), st.floats(0.01, 40)),
    rank_stabilised=st.booleans(),
    layers=st.sampled_from([None, (0,), (1,)]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(part, min_size=1, max_size=3))
def test_any_mix_of_parts(tmp_path_factory: pytest.TempPathFactory, parts: list[LoRA]) -> None:
    family, folder = BASES["llama"], tmp_path_factory.mktemp("mix")
    parts = [
        LoRA(p.at, p.rank, p.alpha, rank_stabilised=p.rank_stabilised, layers=None if "head" in p.at else p.layers)
        for p in parts
    ]
    method: Any = parts[0]
    for other in parts[1:]:
        method = method + other
    model = with_adapter(family, method)
    epitaxy.save(model, folder, format="peft")
    loaded = load_in_peft(family, folder)
    close(run(family, loaded.double()), run(family, model.double()))  # large scales multiply the rounding of fp32


def test_a_change_that_peft_would_never_run_is_refused(tmp_path: Path) -> None:
    """WavLM reads the weights of its projections: PEFT's LoRA there computes nothing, ours does."""
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.WavLMModel(config).eval()
    epitaxy.attach(model, LoRA(rank=2), name="a")
    with pytest.raises(
        UnsupportedError, match=r"attention\.[qv]_proj' has no equal there, because its attention layer"
    ):
        epitaxy.save(model, tmp_path / "a", name="a", format="peft")
    epitaxy.attach(model, LoRA(at="mlp.*", rank=2), name="b")
    epitaxy.save(model, tmp_path / "b", name="b", format="peft")
