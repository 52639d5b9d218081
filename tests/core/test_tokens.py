"""Prompts against the layers of a model called one by one with the tokens put in and taken out by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import Prompt
from epitaxy.core.edits import Tokens
from epitaxy.core.errors import UnsupportedError


def vit() -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


def causal(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=40, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens_of(adapter: epitaxy.Adapter) -> Tensor:
    edit = adapter.edits[0]
    assert isinstance(edit, Tokens)
    torch.nn.init.normal_(edit.tokens)
    return edit.tokens.detach()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_prompts_of_an_encoder(deep: bool, layers: tuple[int, ...] | None) -> None:
    model, pixels = vit(), torch.randn(2, 3, 16, 16)
    adapter = epitaxy.attach(model, epitaxy.Prompt(tokens=4, deep=deep, layers=layers), name="a")
    tokens, logits = tokens_of(adapter), model(pixel_values=pixels).logits
    epitaxy.detach(model)
    hidden = model.vit.embeddings(pixels)
    for number, layer in enumerate(model.vit.layers):
        place = number - (layers[0] if layers else 0)
        if place == 0:
            hidden = torch.cat([tokens[0].expand(2, -1, -1), hidden], dim=1)
        elif place > 0 and deep:
            hidden = torch.cat([tokens[place].expand(2, -1, -1), hidden[:, 4:]], dim=1)
        hidden = layer(hidden)
    expected = model.classifier(model.vit.layernorm(hidden[:, 4:])[:, 0])
    torch.testing.assert_close(logits, expected)


def test_the_prompts_of_an_encoder_see_no_padding() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    tokens_of(epitaxy.attach(model, epitaxy.Prompt(tokens=4, deep=True), name="a"))
    words = torch.randint(3, 50, (1, 5))
    padded = torch.cat([words, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits, model(input_ids=words).logits, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_a_language_model_are_embeddings_before_its_text(kind: str) -> None:
    model, words = causal(kind), torch.randint(0, 50, (2, 6))
    tokens = tokens_of(epitaxy.attach(model, epitaxy.Prompt(tokens=4), name="a"))
    logits = model(input_ids=words).logits
    epitaxy.activate(model, None)
    embedded = model.get_input_embeddings()(words)
    whole = torch.cat([tokens[0].expand(2, -1, -1), embedded], dim=1)
    torch.testing.assert_close(logits, model(inputs_embeds=whole).logits[:, 4:])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method",
    [
        epitaxy.Prompt(tokens=3),
        epitaxy.Prompt(tokens=3, deep=True),
        epitaxy.Prefix(tokens=3),
        epitaxy.Prefix(tokens=3, gated=True),
    ],
    ids=["prompt", "deep prompt", "prefix", "gated prefix"],
)
def test_generation_with_a_cache_is_generation_without_one(kind: str, method: object) -> None:
    model = causal(kind)
    for parameter in epitaxy.attach(model, method, name="a").parameters():
        torch.nn.init.normal_(parameter)
    words = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(words, attention_mask=mask, use_cache=True, **settings)
    fresh = model.generate(words, attention_mask=mask, use_cache=False, **settings)
    alone = model.generate(words[:1, 2:], use_cache=True, **settings)
    assert torch.equal(cached, fresh)
    assert torch.equal(cached[0, 5:], alone[0, 3:])  # padding at the left changes nothing
    epitaxy.activate(model, None)
    bare = model.generate(words, attention_mask=mask, **settings)
    assert not torch.equal(cached, bare)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_routed_generation_is_each_row_alone(kind: str) -> None:
    model = causal(kind)
    for name, count in (("short", 2), ("long", 5)):
        tokens_of(epitaxy.attach(model, epitaxy.Prompt(tokens=count, deep=True), name=name))
    words = torch.randint(3, 50, (3, 5))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with epitaxy.route(model, ["long", None, "short"]):
        together = model.generate(words, **settings)
    for row, name in enumerate(["long", None, "short"]):
        epitaxy.activate(model, name)
        assert torch.equal(together[row : row + 1], model.generate(words[row : row + 1], **settings))


def test_two_deep_prompts_together() -> None:
    model, pixels = vit(), torch.randn(2, 3, 16, 16)
    first = tokens_of(epitaxy.attach(model, epitaxy.Prompt(tokens=2, deep=True), name="a"))
    second = tokens_of(epitaxy.attach(model, epitaxy.Prompt(tokens=3), name="b"))
    epitaxy.activate(model, ["a", "b"])
    logits = model(pixel_values=pixels).logits
    epitaxy.detach(model)
    hidden = model.vit.embeddings(pixels)
    hidden = torch.cat([first[0].expand(2, -1, -1), second[0].expand(2, -1, -1), hidden], dim=1)
    for number, layer in enumerate(model.vit.layers):
        if number:
            hidden = torch.cat([first[number].expand(2, -1, -1), hidden[:, 2:]], dim=1)
        hidden = layer(hidden)
    torch.testing.assert_close(logits, model.classifier(model.vit.layernorm(hidden[:, 5:])[:, 0]))


def mistral(window: int) -> transformers.MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=window, **sizes)
    ).eval()


def padded(left: bool) -> dict[str, Tensor]:
    """One row of five words and one of three, filled up."""
    short, real = ([1, 1, 4, 5, 6], [0, 0, 1, 1, 1]) if left else ([4, 5, 6, 1, 1], [1, 1, 1, 0, 0])
    words, mask = torch.tensor([[4, 5, 6, 7, 8], short]), torch.tensor([[1] * 5, real])
    return {"input_ids": words, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize(("window", "left"), [(4, False), (20, False), (20, True), (8, True)])
def test_prompts_in_a_sliding_window_are_tokens_in_front(window: int, left: bool) -> None:
    """As the bare model computes each row alone, with the same tokens before its embedded words."""
    model, bare = mistral(window), mistral(window)
    adapter = epitaxy.attach(model, Prompt(tokens=3))
    (tokens,) = adapter.parameters()
    nn.init.normal_(tokens)
    inputs = padded(left)
    with torch.no_grad():
        found = model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            embedded = bare.get_input_embeddings()(inputs["input_ids"][row][mask])
            alone = bare(inputs_embeds=torch.cat([tokens[0], embedded])[None]).logits[0, 3:]
            torch.testing.assert_close(found[row][mask], alone)


def test_padding_that_pushes_prompts_out_of_the_window_is_refused() -> None:
    model = mistral(4)
    epitaxy.attach(model, Prompt(tokens=3), name="prompted")
    epitaxy.attach(model, epitaxy.LoRA(), name="plain")
    epitaxy.activate(model, "prompted")
    said = "sliding window of 4 take padding at the right, found rows that are padded at the left in a sequence of 8"
    with pytest.raises(UnsupportedError, match=said):
        model(**padded(left=True))
    with epitaxy.route(model, ["prompted", "plain"]):  # the padded row has no prompt
        model(**padded(left=True))
    with epitaxy.route(model, ["plain", "prompted"]), pytest.raises(UnsupportedError, match=said):
        model(**padded(left=True))
    model(**{**padded(left=True), "attention_mask": torch.ones(2, 5, dtype=torch.long)})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    epitaxy.activate(model, "prompted")
    with torch.no_grad():
        compiled(**padded(left=False))
        with pytest.raises(RuntimeError, match="sliding window of 4 take padding at the right"):
            compiled(**padded(left=True))
