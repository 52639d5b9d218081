"""Prompts, prefix, LoRA and pooled heads of PETL-AST (2312.03694) against vectors of the published modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import epitaxy
from epitaxy import BitFit, Head, LoRA, NormTuning, Prefix, Prompt
from epitaxy.core.edits import Delta, JointKV, PooledHead, Tokens
from epitaxy.core.edits.edit import first_tensor, output_tensor

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "ast_petl"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="the golden vectors of ast_petl are not beside this checkout"
)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
POOLS = {
    "CLS": "cls",
    "ALL": "all",
    "PROMPTS": "prompts",
    "SPEECH": "patches",
    "PROMPTS_SPEECH": "prompts+patches",
}
ROLES = {"Q": "attention.q", "K": "attention.k", "V": "attention.v", "O": "attention.output"}
ATTENTION = "lora.params.encoder.layer.{}.attention.{}.lora_{}_{}.weight"
precision = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])


def golden(name: str = "lora_prompt_prefix") -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def model(dtype: torch.dtype = torch.float64) -> transformers.ASTForAudioClassification:
    """The backbone of the vectors; the classifier that transformers puts on it is never read."""
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.ASTForAudioClassification.from_pretrained(
            GOLDEN / "backbone", dtype=dtype, attn_implementation="sdpa", num_labels=5
        ).eval()
    finally:
        transformers.logging.set_verbosity(quiet)


@torch.no_grad()
def fill(adapter: epitaxy.Adapter, vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put the published parameters in; float64 as they are stored."""
    factors = iter([edit for edit in adapter.edits if isinstance(edit, Delta)])
    layers = iter(range(99))
    for piece in adapter.pieces:
        edit = piece.module.to(dtype)
        if isinstance(edit, PooledHead):
            edit.linear.weight.copy_(vectors["head.weight"])
            edit.linear.bias.copy_(vectors["head.bias"])
        elif isinstance(edit, Tokens):
            deep = [vectors["prompt.deep_prompt_embeddings"]] if edit.depth > 1 else []
            edit.tokens.copy_(torch.cat([vectors["prompt.prompt_embeddings"], *deep]))
        elif isinstance(edit, JointKV):
            name = f"prefix.params.encoder.layer.{next(layers)}.attention.attention."
            edit.keys.copy_(vectors[f"{name}key_tokens"][0])
            edit.values.copy_(vectors[f"{name}value_tokens"][0])
        elif isinstance(edit, Delta):
            assert edit is next(factors)
            letter = next(letter for letter, role in ROLES.items() if role == piece.role)
            where, layer = "output" if letter == "O" else "attention", piece.key.rpartition(".")[2]  # type: ignore[union-attr]
            edit.down.copy_(vectors[ATTENTION.format(layer, where, "down", letter)])
            edit.up.copy_(vectors[ATTENTION.format(layer, where, "up", letter)])


@torch.no_grad()
def logits(method: Any, vectors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    base = model(dtype)
    fill(epitaxy.attach(base, method), vectors, dtype)
    return base(vectors["input_values"].to(dtype)).logits


def assert_equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    difference = float((found.double() - expected).abs().max())
    assert difference <= TOLERANCES[dtype], difference


@precision
@pytest.mark.parametrize("pool", ["ALL", "CLS"])
def test_the_base_under_a_pooled_head(pool: str, dtype: torch.dtype) -> None:
    vectors = golden("adapters")
    head = {"head.weight": vectors["head.weight"], "head.bias": vectors["head.bias"]}
    found = logits(Head(labels=5, pool=POOLS[pool]), {**head, "input_values": vectors["input_values"]}, dtype)
    assert_equal(found, vectors[f"base.{pool}.logits"], dtype)


@precision
def test_the_last_hidden_states_of_the_base(dtype: torch.dtype) -> None:
    vectors = golden("adapters")
    with torch.no_grad():
        trunk = model(dtype).audio_spectrogram_transformer(vectors["input_values"].to(dtype))
    assert_equal(trunk.last_hidden_state, vectors["base.last_hidden_state"], dtype)
    assert_equal(trunk.pooler_output, vectors["base.pooler_output"], dtype)


@precision
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", ["shallow", "deep"])
def test_prompts(kind: str, pool: str, dtype: torch.dtype) -> None:
    vectors = golden()
    prompt = Prompt(4, deep=kind == "deep", init="vpt", drop_distillation=True)
    found = logits(prompt + Head(labels=5, pool=POOLS[pool]), vectors, dtype)
    assert_equal(found, vectors[f"prompt.{kind}.{pool}.logits"], dtype)


@precision
def test_prefix(dtype: torch.dtype) -> None:
    vectors = golden()
    found = logits(Prefix(3, init="vpt") + Head(labels=5, pool="all"), vectors, dtype)
    assert_equal(found, vectors["prefix.ALL.logits"], dtype)


@precision
@pytest.mark.parametrize("targets", ["Q", "QK", "QV", "QKVO"])
def test_lora(targets: str, dtype: torch.dtype) -> None:
    vectors = golden()
    rank = 4
    lora = LoRA(tuple(ROLES[letter] for letter in targets), rank, alpha=rank * float(vectors["lora.scaling"]))
    found = logits(lora + Head(labels=5, pool="all"), vectors, dtype)
    assert_equal(found, vectors[f"lora.ablation.{targets}.logits"], dtype)
    if targets == "QV":
        assert_equal(found, vectors["lora.main_QV.logits"], dtype)


def test_merged_lora() -> None:
    vectors = golden()
    base = model()
    head = epitaxy.attach(base, Head(labels=5, pool="all"), name="head")
    adapter = epitaxy.attach(base, LoRA(rank=4), name="lora")
    for part in (head, adapter):
        fill(part, vectors, torch.float64)
    epitaxy.merge(base, "lora")
    epitaxy.activate(base, "head")
    layer = base.audio_spectrogram_transformer.layers[0].attention
    for name, projection in (("query", layer.q_proj), ("value", layer.v_proj)):
        assert_equal(projection.weight.detach(), vectors[f"lora.merged.layer0.{name}.weight"], torch.float64)
    with torch.no_grad():
        assert_equal(base(vectors["input_values"]).logits, vectors["lora.merged.logits"], torch.float64)


def test_lora_goes_to_peft_with_the_published_scale(tmp_path: Path) -> None:
    """rank r and lora_alpha = r * s give PEFT's factor lora_alpha / r = s, here not a whole number."""
    peft = pytest.importorskip("peft")
    vectors, scale = golden(), 0.125
    base = model(torch.float32)
    fill(epitaxy.attach(base, LoRA(rank=4, alpha=4 * scale)), vectors, torch.float32)
    with torch.no_grad():
        expected = base(vectors["input_values"].float()).logits
    epitaxy.save(base, tmp_path / "lora", format="peft")
    config = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.r, config.lora_alpha) == (4, 0.5)
    bare = model(torch.float32)
    bare.load_state_dict({key: value for key, value in base.state_dict().items() if "epitaxy" not in key})
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(bare, tmp_path / "lora")(vectors["input_values"].float()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Lengths:
    """Sequence lengths and prompts that each block receives, by hooks of our own."""

    def __init__(self, base: nn.Module, count: int) -> None:
        self.seen: list[int] = []
        self.prompts: list[Tensor] = []
        self.out: list[Tensor] = []
        for layer in base.audio_spectrogram_transformer.layers:  # type: ignore[union-attr]
            layer.register_forward_hook(self.keep, with_kwargs=True)
        self.count = count

    def keep(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = first_tensor((args, kwargs))
        self.seen.append(x.shape[1])
        self.prompts.append(x[:, : self.count].detach())
        self.out.append(output_tensor(output).detach())


@torch.no_grad()
def test_deep_prompts_do_not_read_what_earlier_ones_became() -> None:
    """Every block sees as many prompts, its own, and what the block before made of its prompts goes nowhere."""
    vectors = golden()
    base = model()
    adapter = epitaxy.attach(base, Prompt(4, deep=True, drop_distillation=True) + Head(labels=5, pool="patches"))
    fill(adapter, vectors, torch.float64)
    spoiled = model()
    fill(epitaxy.attach(spoiled, adapter.method), vectors, torch.float64)
    for layer in spoiled.audio_spectrogram_transformer.layers[:-1]:
        layer.register_forward_hook(lambda module, args, output: torch.cat([output[:, :4] + 7, output[:, 4:]], dim=1))
    watch = Lengths(base, 4)
    x = vectors["input_values"]
    assert torch.equal(base(x).logits, spoiled(x).logits)
    assert watch.seen == [38 - 1 + 4] * 3
    tokens = next(edit.tokens for edit in adapter.edits if isinstance(edit, Tokens))
    for number, prompts in enumerate(watch.prompts):
        assert torch.equal(prompts, tokens[number].expand(2, -1, -1))


@torch.no_grad()
def test_shallow_prompts_are_carried_along() -> None:
    vectors = golden()
    base = model()
    fill(epitaxy.attach(base, Prompt(4, drop_distillation=True)), vectors, torch.float64)
    watch = Lengths(base, 4)
    base(vectors["input_values"])
    assert torch.equal(watch.prompts[1], watch.out[0][:, :4])
    assert not torch.equal(watch.prompts[1], watch.prompts[0])


@torch.no_grad()
def test_a_prefix_and_published_prompts_leave_the_length_of_the_output() -> None:
    vectors = golden()
    for method in (Prefix(3), Prompt(4, drop_distillation=True), Prompt(4, deep=True)):
        base = model()
        fill(epitaxy.attach(base, method), vectors, torch.float64)
        states = base.audio_spectrogram_transformer(vectors["input_values"]).last_hidden_state
        assert states.shape == (2, 38, 32)
        assert not torch.equal(states, golden("adapters")["base.last_hidden_state"])


BIASES = ("attention.q", "attention.k", "attention.v", "attention.output", "mlp.up", "mlp.down", "norm.attention")
COUNTS = {  # printed in Table 1 of the paper, exact here; the final norm adds 1,536 beside the head's own
    "SPT-300": (Prompt(300, init="vpt", drop_distillation=True), 230_400),
    "DPT-25": (Prompt(25, deep=True, init="vpt", drop_distillation=True), 230_400),
    "prefix-24": (Prefix(12, init="vpt"), 221_184),
    "LoRA r=6": (LoRA(rank=6, alpha=6 * 16 / 128, legacy=True), 221_184),
    "BitFit": (BitFit(at=(*BIASES, "norm.mlp", "norm.final")), 102_144),
    "linear probe, ESC-50": (NormTuning(at="norm.final") + Head(labels=50, pool="all"), 39_986),
    "linear probe, UrbanSound8K": (NormTuning(at="norm.final") + Head(labels=10, pool="all"), 9_226),
    "head alone, GSC": (Head(labels=35, pool="all"), 35 * 769),
    "LoRA whole, GSC": (
        LoRA(rank=6, legacy=True) + NormTuning(at="norm.final") + Head(labels=35, pool="all"),
        221_184 + 1_536 + 35 * 769,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_at_full_size(name: str) -> None:
    method, count = COUNTS[name]
    with torch.device("meta"):
        base = transformers.ASTForAudioClassification(transformers.ASTConfig())
    adapter = epitaxy.attach(base, method)
    assert adapter.size() == count
    assert all(parameter.is_meta for parameter in adapter.parameters())


def test_the_published_starts() -> None:
    """Uniform within 0.0625 for prompts and prefixes at width 768, normal with 0.02 for both factors of LoRA."""
    torch.manual_seed(0)
    config = transformers.ASTConfig(num_hidden_layers=2, max_length=64)
    base = transformers.ASTForAudioClassification(config)
    for method in (Prompt(50, deep=True, init="vpt"), Prefix(50, init="vpt"), Prefix(50, gated=True, init="vpt")):
        adapter = epitaxy.attach(base, method)
        for name, rows in adapter.named_parameters():
            if not name.endswith("gate"):
                assert 0.0624 < float(rows.abs().max()) <= 0.0625
                assert abs(float(rows.std()) - 0.0625 / 3**0.5) < 1e-3
        epitaxy.detach(base)
    lora = epitaxy.attach(base, LoRA(rank=12, legacy=True))
    for factor in lora.parameters():
        assert abs(float(factor.std()) - 0.02) < 1e-3
    assert "identity" in lora.method.cannot
    assert "identity" not in LoRA(rank=12).cannot
