"""Extra keys and values against attention written out by hand, and against diffusers' own image prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy.core.edits import DecoupledKV, Edit, JointKV
from epitaxy.core.edits.kv import projection_width
from epitaxy.core.errors import SiteError, StateError, UnsupportedError
from epitaxy.core.host import hosted
from epitaxy.core.sites import Site


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def randomise(adapter: epitaxy.Adapter) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)


def vit() -> transformers.ViTModel:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config).eval()


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [False, True])
def test_prefix_in_a_vision_transformer(implementation: str, gated: bool) -> None:
    model, x = vit(), torch.randn(2, 5, 32)
    model.set_attn_implementation(implementation)
    adapter = epitaxy.attach(model, epitaxy.Prefix(tokens=3, gated=gated), name="a")
    randomise(adapter)
    layer, edit = model.layers[0].attention, adapter.edits[0]
    output = layer(x)[0]
    q, k, v = (split(getattr(layer, f"{name}_proj")(x), 4) for name in "qkv")
    epitaxy.activate(model, None)
    q, k, v = (split(getattr(layer, f"{name}_proj")(x), 4) for name in "qkv")
    keys, values = (split(getattr(edit, name).expand(2, -1, -1), 4) for name in ("keys", "values"))
    if gated:
        assert isinstance(edit, DecoupledKV)
        own = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v
        extra = (q @ keys.transpose(2, 3) * 8**-0.5).softmax(-1) @ values
        assert edit.gate is not None
        mixed = own + edit.gate.tanh()[None, :, None, None] * extra
    else:
        assert isinstance(edit, JointKV)
        scores = q @ torch.cat([keys, k], dim=2).transpose(2, 3) * 8**-0.5
        mixed = scores.softmax(-1) @ torch.cat([values, v], dim=2)
    expected = layer.o_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_prefix_under_a_causal_mask_with_grouped_heads() -> None:
    """One query alone sees the prefix and itself; the last one everything: as with the mask written out."""
    model, words = llama(), torch.randint(0, 50, (2, 6))
    adapter = epitaxy.attach(model, epitaxy.Prefix(tokens=3), name="a")
    randomise(adapter)
    captured: dict[str, Tensor] = {}
    attention = model.model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: captured.update(mixed=args[0].detach()))
    model(input_ids=words)
    handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = model.model.layers[0].input_layernorm(model.get_input_embeddings()(words))
    q, k, v = split(attention.q_proj(x), 4), split(attention.k_proj(x), 2), split(attention.v_proj(x), 2)
    cosine, sine = model.model.rotary_emb(x, torch.arange(6)[None])
    q, k = apply_rotary_pos_emb(q, k, cosine, sine)
    edit = adapter.edits[0]
    keys, values = (split(getattr(edit, name).expand(2, -1, -1), 2) for name in ("keys", "values"))
    keys = torch.cat([keys, k], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([values, v], dim=2).repeat_interleave(2, dim=1)
    seen = torch.cat([torch.ones(6, 3), torch.ones(6, 6).tril()], dim=1).bool()
    scores = (q @ keys.transpose(2, 3) * 8**-0.5).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(captured["mixed"], expected, rtol=1e-5, atol=1e-5)


def test_sdpa_and_eager_agree_on_padded_batches() -> None:
    words = torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = llama()
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        randomise(epitaxy.attach(model, epitaxy.Prefix(tokens=3), name="a"))
        outputs.append(model(input_ids=words, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_an_attention_implementation_without_masks_is_refused() -> None:
    model = vit()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="'sdpa' or 'eager', the model uses 'flash_attention_2'"):
        epitaxy.attach(model, epitaxy.Prefix(tokens=3), name="a")
    assert hosted(model) is None


def test_an_attention_implementation_set_later_does_not_drop_the_prefix() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    randomise(epitaxy.attach(model, epitaxy.Prefix(tokens=3), name="a"))
    expected = model(pixel_values=x).last_hidden_state
    model.set_attn_implementation("eager")
    with pytest.raises(StateError, match="set to 'eager' after a prefix was switched on"):
        model(pixel_values=x)
    epitaxy.activate(model, "a")
    torch.testing.assert_close(model(pixel_values=x).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    epitaxy.detach(model)
    assert model.config._attn_implementation == "eager"


def test_a_prefix_needs_an_attention_layer() -> None:
    with pytest.raises(SiteError, match="not an attention layer"):
        epitaxy.attach(vit(), epitaxy.Prefix(at="mlp"), name="a")


class Pictures:
    """A method of image prompts: the width of their context is 32, their scale 0.7."""

    method_name, cannot = "pictures", {}
    at, layers = "cross_attention", None

    def edits(self, site: Site) -> Iterator[Edit]:
        assert site.heads is not None
        yield DecoupledKV(site.heads, projection_width(site, "q"), context_width=32, scale=0.7)


def test_bound_pictures_act_like_the_image_prompts_of_diffusers() -> None:
    """The decoupled form with projections of a bound context, put where IP-Adapter puts it."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    noisy, text, pictures = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    time = torch.tensor([3, 700])
    bare = unet(noisy, time, encoder_hidden_states=text).sample

    adapter = epitaxy.attach(unet, Pictures(), name="pictures")
    assert torch.equal(unet(noisy, time, encoder_hidden_states=text).sample, bare)  # no picture bound
    edits = [edit for edit in adapter.edits if isinstance(edit, DecoupledKV)]
    for edit in edits:
        edit.bind(pictures)
    ours = unet(noisy, time, encoder_hidden_states=text).sample
    unet.set_attention_slice("max")  # replaces every processor, which drops the adapters of others
    torch.testing.assert_close(unet(noisy, time, encoder_hidden_states=text).sample, ours, rtol=1e-4, atol=1e-4)
    epitaxy.detach(unet)
    unet.set_attention_slice(None)

    processors = dict(unet.attn_processors)
    for piece in adapter.pieces:
        if isinstance(edit := piece.module, DecoupledKV):
            theirs = IPAdapterAttnProcessor2_0(edit.to_k.out_features, 32, num_tokens=(4,), scale=0.7)
            theirs.to_k_ip[0].load_state_dict(edit.to_k.state_dict())
            theirs.to_v_ip[0].load_state_dict(edit.to_v.state_dict())
            key = f"{piece.path.removesuffix('.to_out.0')}.processor"
            assert "attn2" in key
            assert key in processors
            processors[key] = theirs
    unet.set_attn_processor(processors)
    expected = unet(noisy, time, encoder_hidden_states=(text, [pictures.unsqueeze(1)])).sample
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
