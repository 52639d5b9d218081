"""Whisper's encoder on short clips: what it is equal to, and that nothing else about the model changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import WhisperConfig, WhisperForAudioClassification, WhisperForConditionalGeneration

import epitaxy
from epitaxy.core.errors import EpitaxyError
from epitaxy.models.whisper_encoder import allow_short

SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "num_labels": 3,
    "classifier_proj_size": 16,
}


def build(positions: int = 40) -> WhisperForAudioClassification:
    torch.manual_seed(0)
    return WhisperForAudioClassification(WhisperConfig(**SIZES, max_source_positions=positions)).eval()


@pytest.mark.parametrize("frames", [2, 26, 78, 80])
def test_equal_to_a_stock_encoder_built_for_that_length(frames: int) -> None:
    model, stock = build(), build(frames // 2)
    weights = dict(model.state_dict())
    weights["encoder.embed_positions.weight"] = weights["encoder.embed_positions.weight"][: frames // 2]
    stock.load_state_dict(weights)
    allow_short(model)
    features = torch.randn(2, 16, frames)
    with torch.no_grad():
        assert torch.equal(model.encoder(features).last_hidden_state, stock.encoder(features).last_hidden_state)
        assert torch.equal(model(input_features=features).logits, stock(input_features=features).logits)


def test_lengths_may_change_from_call_to_call_and_the_full_one_is_the_stock_encoder() -> None:
    model, stock = build(), build()
    allow_short(model)
    full = torch.randn(1, 16, 80)
    with torch.no_grad():
        expected = stock(full).logits
        for frames in (80, 10, 80, 2, 30, 80):
            found = model(full[..., :frames]).logits
            assert frames < 80 or torch.equal(found, expected)


def test_class_keys_config_and_parameters_stay() -> None:
    model, stock = build(), build()
    allow_short(model)
    allow_short(model)  # a second time adds nothing
    assert len(model.encoder._forward_pre_hooks) == 1
    model(torch.randn(1, 16, 12))
    assert type(model.encoder) is type(stock.encoder)
    assert model.config.to_dict() == stock.config.to_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }


@pytest.mark.parametrize("frames", [0, 7, 82])
def test_lengths_it_cannot_take_are_named(frames: int) -> None:
    model = build()
    allow_short(model)
    with pytest.raises(EpitaxyError, match=f"a multiple of 2 up to 80 frames, got {frames}"):
        model(torch.randn(1, 16, frames))
    with pytest.raises(EpitaxyError, match="Linear has no Whisper encoder"):
        allow_short(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "method",
    [epitaxy.LoRA(rank=2), epitaxy.Bottleneck(bottleneck=4), epitaxy.Prefix(tokens=3), epitaxy.BitFit()],
    ids=lambda method: type(method).__name__,
)
def test_adapters_train_and_go_without_a_trace(method: object) -> None:
    model = build()
    allow_short(model)
    features = torch.randn(4, 16, 30)
    with torch.no_grad():
        before = model(features).logits
    adapter = epitaxy.attach(model, method + epitaxy.Head(), "a")  # type: ignore[operator]
    with torch.no_grad():
        same = torch.allclose(model(features).logits, before, atol=1e-6)
    assert same or isinstance(method, epitaxy.Prefix)  # whose rows take a share of the attention from the start
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(features).logits, torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
    epitaxy.detach(model, "a")
    with torch.no_grad():
        assert torch.equal(model(features).logits, before)


def test_copies_and_the_whole_model_keep_the_ability() -> None:
    whole = WhisperForConditionalGeneration(
        WhisperConfig(
            **SIZES,
            max_source_positions=40,
            vocab_size=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    ).eval()
    allow_short(whole)
    features, tokens = torch.randn(1, 16, 20), torch.tensor([[1, 5, 6]])
    expected = whole(input_features=features, decoder_input_ids=tokens).logits
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other(input_features=features, decoder_input_ids=tokens).logits, expected)
        other(input_features=torch.randn(1, 16, 40), decoder_input_ids=tokens)
        assert whole.model.encoder.config.max_source_positions == 10  # a copy does not reach into the original


@pytest.mark.slow
def test_it_compiles_in_one_graph() -> None:
    model = build()
    allow_short(model)
    features = torch.randn(1, 16, 30)
    with torch.no_grad():
        expected = model(features).logits
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(features).logits, expected, atol=1e-5)
        assert torch.allclose(compiled(features[..., :20]).logits, model(features[..., :20]).logits, atol=1e-5)
