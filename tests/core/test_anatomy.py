"""Roles of models beyond the contract's families, and what is found in them by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import epitaxy
from epitaxy import BitFit, LoRA, Prefix, Prompt
from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, SiteError
from tests.contract.checks import randomise
from tests.contract.families import words

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "dropout_rate": 0.0}


def opt() -> transformers.OPTForCausalLM:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=50,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("method", [Prompt(tokens=3), Prompt(tokens=3, deep=True), Prefix(tokens=3)])
def test_a_decoder_built_like_an_encoder_is_causal(method: Any) -> None:
    """OPT has the blocks of BART's encoder: a prompt enters once, not at every step of generation."""
    model = opt()
    anatomy = describe(model)
    assert anatomy.causal
    assert anatomy.trunk == "model.decoder"
    randomise(epitaxy.attach(model, method, name="a"), 1)
    ids, settings = words(2, 5), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    with epitaxy.route(model, ["a", None]):
        routed = model.generate(ids, **settings)
    assert torch.equal(routed[:1], cached[:1])
    epitaxy.activate(model, None)
    assert torch.equal(routed[1:], model.generate(ids[1:], **settings))


def test_t5() -> None:
    """Both stacks; the decoder's feed-forward is one place further than the encoder's."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)).eval()
    roles = describe(model).roles
    assert [len(roles[role]) for role in ("block", "attention.q", "cross_attention.v", "mlp.down")] == [4, 4, 2, 4]
    assert roles["mlp"][3].path == "decoder.block.1.layer.2.DenseReluDense"
    adapter = epitaxy.attach(model, LoRA(at=("attention.q", "cross_attention.*"), rank=2) + Prefix(tokens=2))
    assert adapter.edits[-1].keys.shape == (2, 32)
    model(input_ids=words(2), decoder_input_ids=words(2)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def siglip() -> transformers.SiglipVisionModel:
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)).eval()


@pytest.mark.parametrize("method", [LoRA(at="linear", rank=2), BitFit()])
def test_places_that_torch_never_calls_are_no_linear_maps(method: Any) -> None:
    """SigLIP pools by torch's attention, whose output projection is read and never called."""
    model = siglip()
    adapter = epitaxy.attach(model, method)
    model(pixel_values=torch.randn(2, 3, 16, 16)).pooler_output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert not any("out_proj" in piece.path for piece in adapter.pieces if piece.path.startswith("head"))


def test_a_refused_place_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(SiteError, match=r"^'1': a low-rank change of a convolution in 2 groups"):
        epitaxy.attach(model, LoRA(at="conv", rank=1))
    assert not epitaxy.adapters(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"rank": 0}, "rank must be at least 1, got 0"), ({"dropout": 1.0}, "dropout must be from 0 to below 1")],
)
def test_fields_of_lora(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(EpitaxyError, match=says):
        LoRA(**fields)
