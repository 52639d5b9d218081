"""Pooled heads against means taken by hand, beside padding, prompts, routes and checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import EpitaxyError, Head, LoRA, Prefix, Prompt
from epitaxy.core.anatomy import describe
from epitaxy.core.edits import PooledHead, Tokens
from tests.contract.families import FAMILIES, PLAIN_LAYOUT, PlainTransformer, noise, words

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def linear_of(adapter: epitaxy.Adapter) -> nn.Linear:
    return next(edit.linear for edit in adapter.edits if isinstance(edit, PooledHead))


def tokens_of(adapter: epitaxy.Adapter) -> Tensor:
    tokens = next(edit.tokens for edit in adapter.edits if isinstance(edit, Tokens))
    nn.init.normal_(tokens)
    return tokens.detach()


def ast() -> nn.Module:
    return FAMILIES["ast"].model()


@pytest.mark.parametrize(
    ("family", "pool", "first"),
    [
        ("vit", "all", 0),
        ("vit", "patches", 1),
        ("dinov2", "patches", 1),
        ("ast", "patches", 2),
        ("whisper", "patches", 0),
        ("swin", "all", 0),
        ("bert", "patches", 1),
    ],
)
@torch.no_grad()
def test_the_mean_of_the_last_hidden_states(family: str, pool: Any, first: int) -> None:
    model, inputs = FAMILIES[family].model(), FAMILIES[family].inputs(3)
    trunk = model.get_submodule(model.base_model_prefix) if family != "whisper" else model.encoder
    states = trunk(**inputs).last_hidden_state
    adapter = epitaxy.attach(model, Head(labels=7, pool=pool))
    expected = linear_of(adapter)(states[:, first:].mean(dim=1))
    torch.testing.assert_close(model(**inputs).logits, expected)


@torch.no_grad()
def test_the_class_token() -> None:
    model, inputs = FAMILIES["vit"].model(), FAMILIES["vit"].inputs(2)
    states = model.vit(**inputs).last_hidden_state
    adapter = epitaxy.attach(model, Head(pool="cls"))
    torch.testing.assert_close(model(**inputs).logits, linear_of(adapter)(states[:, 0]))


def test_special_tokens_are_told_from_the_structure() -> None:
    config = transformers.Dinov2WithRegistersConfig(
        num_register_tokens=3, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    registers = describe(transformers.Dinov2WithRegistersForImageClassification(config))
    assert (registers.special, registers.distillation) == (4, None)
    deit = transformers.DeiTForImageClassification(transformers.DeiTConfig(image_size=16, patch_size=8, **TEXT))
    assert (describe(deit).special, describe(deit).distillation) == (2, 1)
    assert (describe(ast()).special, describe(ast()).distillation) == (2, 1)
    assert describe(FAMILIES["wav2vec2"].model()).special == 0


def test_where_the_last_hidden_states_are() -> None:
    """Wav2Vec2 has a norm before its blocks, its stable kind the same norm after them."""
    assert describe(FAMILIES["wav2vec2"].model()).last == "wav2vec2.encoder.layers.1"
    config = copy.deepcopy(FAMILIES["wav2vec2"].model().config)
    config.do_stable_layer_norm = True
    assert describe(transformers.Wav2Vec2ForSequenceClassification(config)).last == "wav2vec2.encoder.layer_norm"
    assert describe(ast()).last == "audio_spectrogram_transformer.layernorm"


class NormedTransformer(PlainTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.finish = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.finish(x).amax(dim=1))
        return logits


@torch.no_grad()
def test_a_described_model_may_name_its_final_norm() -> None:
    torch.manual_seed(0)
    model, x = NormedTransformer(), noise(2, 6, 12)
    roles = {role: part.exit for role, part in PLAIN_LAYOUT.parts.items()}
    states: list[Tensor] = []
    handle = model.finish.register_forward_hook(lambda module, args, output: states.append(output))
    model(x)
    handle.remove()
    layout = epitaxy.Layout("normed", roles, heads=4, final_norm="finish")
    assert epitaxy.Layout.from_dict(layout.to_dict()) == layout
    adapter = epitaxy.attach(model, Head(pool="all"), layout=layout)
    torch.testing.assert_close(model(x), linear_of(adapter)(states[0].mean(dim=1)))
    with pytest.raises(EpitaxyError, match="names a final norm 'fin' that is absent"):
        epitaxy.attach(NormedTransformer(), Head(), layout=epitaxy.Layout("normed", roles, final_norm="fin"))


def sentence(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return FAMILIES["bert"].model()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0)
        return transformers.GPT2ForSequenceClassification(config).eval()
    sizes = {**TEXT, "vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
    if kind == "mistral":
        return transformers.MistralForSequenceClassification(
            transformers.MistralConfig(num_key_value_heads=2, sliding_window=3, **sizes)
        ).eval()
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(num_key_value_heads=2, **sizes)).eval()


@pytest.mark.parametrize("prompted", [False, True], ids=["bare", "prompted"])
@pytest.mark.parametrize("kind", ["bert", "llama", "mistral", "gpt2"])
@torch.no_grad()
def test_padding_does_not_count(kind: str, prompted: bool) -> None:
    """A padded sentence gives what it gives alone, and with masked=False it does not."""
    for masked in (True, False):
        model = sentence(kind)
        head = Head(pool="prompts+patches" if prompted else "all", masked=masked)
        torch.manual_seed(1)
        adapter = epitaxy.attach(model, Prompt(3, deep=True) + head if prompted else head)
        if prompted:
            tokens_of(adapter)
        text = words(1, 5)
        alone = model(input_ids=text).logits
        padded = torch.cat([text, torch.zeros(1, 3, dtype=torch.long)], dim=1)
        mask = torch.tensor([[1] * 5 + [0] * 3])
        found = model(input_ids=padded, attention_mask=mask).logits
        assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5) == masked


@torch.no_grad()
def test_frames_of_padded_sounds_do_not_count() -> None:
    """The mask that the model makes for its frames is the one it pools with itself."""
    model = FAMILIES["wav2vec2"].model()
    sound, mask = noise(3, 400), torch.ones(3, 400, dtype=torch.long)
    mask[1, 250:] = mask[2, 100:] = 0
    states = model.wav2vec2(sound, attention_mask=mask).last_hidden_state
    frames = model._get_feature_vector_attention_mask(states.shape[1], mask)
    expected = (states * frames[:, :, None]).sum(dim=1) / frames.sum(dim=1, keepdim=True)
    adapter = epitaxy.attach(model, Head(pool="all"))
    torch.testing.assert_close(model(sound, attention_mask=mask).logits, linear_of(adapter)(expected))
    published = epitaxy.attach(model, Head(pool="all", masked=False), name="published")
    torch.testing.assert_close(model(sound, attention_mask=mask).logits, linear_of(published)(states.mean(dim=1)))


def test_a_prompt_of_one_adapter_under_the_head_of_another() -> None:
    model, inputs = ast(), FAMILIES["ast"].inputs(2)
    tokens_of(epitaxy.attach(model, Prompt(3), name="prompt"))
    epitaxy.attach(model, Head(pool="prompts"), name="head")
    with pytest.raises(EpitaxyError, match="found no prompts in the last hidden states"):
        model(**inputs)
    for names in (["prompt", "head"], ["head", "prompt"]):
        epitaxy.activate(model, names)
        first = model(**inputs).logits
        assert first.shape == (2, 3)
    both = epitaxy.attach(model, Head(pool="prompts") + Prompt(3), name="both")
    assert model(**inputs).logits.shape == (2, 3)
    tokens_of(both)
    epitaxy.detach(model, "both")


def test_prompts_that_leave_early_are_not_pooled() -> None:
    model, inputs = ast(), FAMILIES["ast"].inputs(2)
    adapter = epitaxy.attach(model, Prompt(3, layers=(0,), drop_distillation=True) + Head(pool="all"))
    states: list[Tensor] = []
    model.audio_spectrogram_transformer.layernorm.register_forward_hook(lambda module, args, y: states.append(y))
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, linear_of(adapter)(states[0].mean(dim=1)))
    epitaxy.attach(model, Prompt(3, layers=(0,)) + Head(pool="prompts"), name="early")
    with pytest.raises(EpitaxyError, match="needs a Prompt up to the last block"):
        model(**inputs)


METHODS: dict[str, Any] = {
    "dropping": Prompt(4, deep=True, drop_distillation=True) + Head(pool="all"),
    "dropping, short": Prompt(2, drop_distillation=True) + Head(pool="prompts+patches"),
    "in front": Prompt(3, deep=True) + Head(pool="patches"),
    "no prompts": LoRA(rank=2) + Head(pool="all"),
    "prefix": Prefix(2) + Head(pool="cls"),
    "own head": Prompt(2, drop_distillation=True),
}


@pytest.mark.parametrize(
    "rows",
    [
        ["dropping", "in front", None, "no prompts", "dropping, short", "prefix", "own head"],
        ["dropping", "dropping, short", "dropping"],
        ["dropping, short", None],
        ["dropping", "no prompts"],
    ],
    ids=["all kinds", "all without distillation", "one and the base", "one and a head"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_of_all_kinds_in_one_batch(rows: list[str | None], attention: str) -> None:
    """Rows that keep the distillation token beside rows that are without it equal separate runs."""
    model = ast()
    model.set_attn_implementation(attention)
    for number, (name, method) in enumerate(METHODS.items()):
        adapter = epitaxy.attach(model, method, name=name.replace(" ", "_").replace(",", ""))
        generator = torch.Generator().manual_seed(number)
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    sounds = noise(len(rows), 32, 32)
    chosen = [None if row is None else row.replace(" ", "_").replace(",", "") for row in rows]
    with epitaxy.route(model, chosen):
        mixed = model(sounds).logits
    for row, name in enumerate(chosen):
        epitaxy.activate(model, name)
        torch.testing.assert_close(mixed[row], model(sounds).logits[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_its_distillation_token_the_model_pools_the_class_token() -> None:
    model, inputs = ast(), FAMILIES["ast"].inputs(2)
    epitaxy.attach(model, Prompt(3, drop_distillation=True))
    trunk = model.audio_spectrogram_transformer(**inputs)
    states = trunk.last_hidden_state
    assert states.shape[1] == 2 + 4
    torch.testing.assert_close(states[:, 0], states[:, 1])
    torch.testing.assert_close(trunk.pooler_output, states[:, 0])


@torch.no_grad()
def test_a_mask_of_the_user_loses_the_distillation_token_too() -> None:
    """What lies under a hidden patch shows nowhere; masks that were off by one would show it."""
    model, inputs = ast(), FAMILIES["ast"].inputs(2)
    epitaxy.attach(model, Prompt(3, deep=True, drop_distillation=True) + Head(pool="all"))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[:, 4] = 0

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, place] *= -3
        return output

    before = model(**inputs, attention_mask=mask).logits
    model.audio_spectrogram_transformer.embeddings.register_forward_hook(disturb)
    place = 4
    torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, before)
    place = 3
    assert not torch.allclose(model(**inputs, attention_mask=mask).logits, before, atol=1e-2)


@pytest.mark.parametrize("family", ["wav2vec2", "bert", "plain"])
def test_after_a_checkpointed_step_nothing_stays_behind(family: str) -> None:
    """The tap is inside the last block, which runs again in the backward pass."""
    chosen = FAMILIES[family]
    model = chosen.model()
    adapter = epitaxy.attach(model, LoRA(rank=2) + Head(pool="all"), layout=chosen.layout)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.train().gradient_checkpointing_enable()
    chosen.run(model).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in adapter.parameters() if parameter.grad is not None)
    with torch.no_grad():
        torch.testing.assert_close(chosen.run(copy.deepcopy(model)), chosen.run(model))


class Reentrant(PlainTransformer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).requires_grad_()
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def test_reentrant_checkpointing_is_refused_where_it_would_cut_gradients() -> None:
    model = Reentrant()
    epitaxy.attach(model, LoRA(rank=2) + Head(pool="all"), layout=PLAIN_LAYOUT)
    with pytest.raises(EpitaxyError, match="use_reentrant=False"):
        model(noise(2, 6, 12))
    with torch.no_grad():
        assert model(noise(2, 6, 12)).shape == (2, 3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a language head": (lambda: FAMILIES["llama"].model(), Head(pool="all"), "use a model for classification"),
    "no class token": (lambda: FAMILIES["wav2vec2"].model(), Head(pool="cls"), "has no class token"),
    "no blocks": (lambda: nn.Sequential(nn.Linear(4, 4)), Head(pool="all", at="0"), "width of the last hidden states"),
    "no distillation token": (
        lambda: FAMILIES["vit"].model(),
        Prompt(2, drop_distillation=True),
        "vit has no distillation token to drop",
    ),
    "no patches": (lambda: FAMILIES["bert"].model(), Prompt(2, init="vpt"), "has no patch embedding"),
    "not linear": (lambda: FAMILIES["vit"].model(), Head(pool="all", at="norm.final"), "replaces a linear map"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    make, method, says = REFUSED[what]
    model = make()
    with pytest.raises(EpitaxyError, match=says):
        epitaxy.attach(model, method)
    assert not epitaxy.adapters(model)


def test_fields_are_checked() -> None:
    for make in (
        lambda: Head(pool="mean"),  # type: ignore[arg-type]
        lambda: Prompt(init="xavier"),  # type: ignore[arg-type]
        lambda: Prefix(init="xavier"),  # type: ignore[arg-type]
    ):
        with pytest.raises(EpitaxyError, match="must be"):
            make()


def test_a_pooled_head_does_not_merge() -> None:
    model = ast()
    epitaxy.attach(model, Head(pool="all"))
    with pytest.raises(EpitaxyError, match="does not read what a pooled head reads"):
        epitaxy.merge(model)


def test_a_language_head_with_an_output_bias_keeps_its_outputs() -> None:
    """BART adds one value to each word's score: a head of another size would fail when it runs."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30, "max_position_embeddings": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = transformers.BartConfig(**sizes, **heads)
    model = transformers.BartForConditionalGeneration(config).eval()
    said = r"'lm_head' of bart keeps its 30 outputs, .* final_logits_bias; got labels 4: leave labels out"
    with pytest.raises(EpitaxyError, match=said):
        epitaxy.attach(model, Head(labels=4))
    assert not epitaxy.adapters(model)
    ids = torch.tensor([[0, 5, 6, 2]])
    before = model(ids).logits
    for head in (Head(), Head(labels=30)):
        epitaxy.attach(model, head, name="own")
        assert torch.equal(model(ids).logits, before)
        epitaxy.detach(model)
    decoder = transformers.BartForCausalLM(config).eval()  # which adds nothing
    epitaxy.attach(decoder, Head(labels=4))
    assert decoder(ids).logits.shape == (1, 4, 4)
