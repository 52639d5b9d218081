"""Convolutions over the patch grid: read from the running model at any size, special tokens left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import Convpass, EpitaxyError, GridConv, Prompt
from epitaxy.core.edits.grid import Grid
from epitaxy.methods.convpass import ConvolutionalBypass, quick_gelu
from epitaxy.methods.grid_conv import GridConvolution

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ast(frames: int = 56, bins: int = 36) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ASTConfig(intermediate_size=64, max_length=frames, num_mel_bins=bins, **SIZES, **NO_DROPOUT)
    return transformers.ASTModel(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTModel(
        transformers.ViTConfig(intermediate_size=64, image_size=32, patch_size=8, **SIZES, **NO_DROPOUT)
    ).eval()


def registers() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(image_size=32, patch_size=8, num_register_tokens=3, **SIZES)
    ).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(intermediate_size=64, image_size=32, patch_size=8, **SIZES)
    ).eval()


def wav2vec2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
            **SIZES,
        )
    ).eval()


def whisper() -> nn.Module:
    torch.manual_seed(0)
    return transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=10,
            vocab_size=20,
            pad_token_id=0,
            decoder_start_token_id=1,
        )
    ).eval()


def randomise(adapter: epitaxy.Adapter) -> None:
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)


def read_grids(adapter: epitaxy.Adapter) -> set[tuple[int, int] | None]:
    return {edit.module.grid.size for edit in adapter.edits}


@pytest.mark.parametrize(
    ("make", "inputs", "special", "grid"),
    [
        (ast, lambda: torch.randn(2, 56, 36), 2, (3, 5)),
        (vit, lambda: torch.randn(2, 3, 32, 32), 1, (4, 4)),
        (registers, lambda: torch.randn(2, 3, 32, 32), 4, (4, 4)),
        (clip, lambda: torch.randn(2, 3, 32, 32), 1, (4, 4)),
        (wav2vec2, lambda: torch.randn(2, 400), 0, (1, 39)),
    ],
    ids=["ast", "vit", "dinov2 with registers", "clip", "wav2vec2"],
)
@torch.no_grad()
def test_the_grid_is_the_one_of_the_model(make: Any, inputs: Any, special: int, grid: tuple[int, int]) -> None:
    model = make()
    adapter = epitaxy.attach(model, GridConv(bottleneck=4, kernel=3), name="a")
    tokens: list[int] = []
    adapter.edits[0].module.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    model(inputs())
    assert read_grids(adapter) == {grid}
    assert tokens == [special + grid[0] * grid[1]]


@torch.no_grad()
def test_other_input_sizes_have_other_grids() -> None:
    model = vit()
    adapter = epitaxy.attach(model, GridConv(bottleneck=4, kernel=3), name="a")
    for height, width in ((32, 32), (16, 40), (8, 8)):
        model(torch.randn(1, 3, height, width), interpolate_pos_encoding=True)
        assert read_grids(adapter) == {(height // 8, width // 8)}


def module(axis: Any, kernel: int = 3, grid: tuple[int, int] = (4, 6)) -> GridConvolution:
    torch.manual_seed(0)
    made = GridConvolution(32, 6, 32, kernel, axis, 0.0, Grid(grid))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.double()


def reached(made: nn.Module, token: int, tokens: int = 26) -> list[int]:
    """The tokens whose result changes with one token."""
    x = torch.randn(1, tokens, 32, dtype=torch.float64)
    other = x.clone()
    other[:, token] = torch.randn(32, dtype=torch.float64)
    return ((made(x) - made(other)).abs().amax(dim=(0, 2)) > 0).nonzero().flatten().tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def test_each_axis_stays_in_its_row_and_off_the_special_tokens() -> None:
    """A grid of 4 x 6 behind 2 special tokens: patch (f, t) is token 2 + 6 f + t."""
    last_of_a_row, inside = 2 + 6 + 5, 2 + 6 * 2 + 3
    assert reached(module("time"), last_of_a_row) == [12, 13]
    assert reached(module("frequency"), last_of_a_row) == [7, 13, 19]
    assert reached(module("both"), inside) == [11, 16, 17, 18, 23]
    assert reached(module("time", kernel=4), inside) == [15, 16, 17, 18]
    for axis in ("time", "frequency", "both"):
        assert reached(module(axis), 0) == [0]
        assert reached(module(axis), 1) == [1]
        assert (
            reached(module(axis, kernel=50), 2 + 6)
            == {
                "time": list(range(8, 14)),
                "frequency": [2, 8, 14, 20],
                "both": [2, *range(8, 14), 14, 20],
            }[axis]
        )


@torch.no_grad()
def test_grid_convolution_is_the_formula() -> None:
    made = module("both", kernel=3)
    x = torch.randn(2, 26, 32, dtype=torch.float64)
    h = F.gelu(made.down(x))
    expected = torch.empty_like(h)
    for row in range(2):
        for position in range(26):
            mixed = h[row, position].clone()
            f, t = divmod(position - 2, 6)
            for convolution, along in ((made.time, (0, 1)), (made.frequency, (1, 0))):
                assert convolution is not None
                assert convolution.bias is not None
                mixed += convolution.bias
                for tap in range(3):
                    there_f, there_t = f + (tap - 1) * along[0], t + (tap - 1) * along[1]
                    if position < 2:
                        source = h[row, position] if tap == 1 else None
                    else:
                        inside = 0 <= there_f < 4 and 0 <= there_t < 6
                        source = h[row, 2 + 6 * there_f + there_t] if inside else None
                    if source is not None:
                        mixed += convolution.weight[:, 0, tap] * source
            expected[row, position] = mixed
    torch.testing.assert_close(made(x), made.up(expected))


@torch.no_grad()
def test_convpass_convolves_the_grid_and_each_special_token_alone() -> None:
    """As the paper has it: the class token is a picture of one pixel."""
    torch.manual_seed(0)
    made = ConvolutionalBypass(32, 6, 32, grid=Grid((4, 6))).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 26, 32, dtype=torch.float64)
    low = quick_gelu(made.down(x))
    convolve = nn.Conv2d(6, 6, 3, padding=1).double()
    convolve.load_state_dict(made.convolution.state_dict())
    pieces = [convolve(low[:, number, :, None, None]).flatten(2).transpose(1, 2) for number in range(2)]
    plane = convolve(low[:, 2:].transpose(1, 2).reshape(2, 6, 4, 6)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(made(x), made.up(quick_gelu(torch.cat([*pieces, plane], dim=1))))
    assert reached(made, 2 + 6 + 5) == [6, 7, 12, 13, 18, 19]


@torch.no_grad()
def test_prompts_are_special_tokens() -> None:
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    adapter = epitaxy.attach(model, Prompt(tokens=3) + GridConv(bottleneck=4, kernel=3), name="a")
    randomise(adapter)
    lengths: list[int] = []
    edits = [edit for edit in adapter.edits if hasattr(edit, "module")]
    edits[0].module.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    model(x)
    assert lengths == [3 + 1 + 16]
    assert {edit.module.grid.size for edit in edits} == {(4, 4)}


@pytest.mark.parametrize("method", [GridConv(bottleneck=4, kernel=3), Convpass(bottleneck=4, dropout=0.0)])
def test_checkpointing_copies_and_routes_find_the_grid(method: Any) -> None:
    model = ast()
    adapter = epitaxy.attach(model, method, name="a")
    randomise(adapter)
    x = torch.randn(2, 56, 36)
    model(x).last_hidden_state.pow(3).sum().backward()
    expected = {name: p.grad for name, p in adapter.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    with epitaxy.route(model, ["a", "a"]):
        model(x).last_hidden_state.pow(3).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert expected[name] is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)
    twin = copy.deepcopy(model).eval()
    other = ast(frames=76)
    epitaxy.attach(other, method, name="a")
    with torch.no_grad():
        assert torch.equal(twin(x).last_hidden_state, model.eval()(x).last_hidden_state)
        other(torch.randn(2, 76, 36))
    assert read_grids(epitaxy.adapters(twin)["a"]) == {(3, 5)}
    assert read_grids(epitaxy.adapters(other)["a"]) == {(3, 7)}


def test_compiled_models_take_inputs_of_several_sizes() -> None:
    model = vit()
    randomise(epitaxy.attach(model, GridConv(bottleneck=4, kernel=3), name="a"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (32, 16, 32):
            x = torch.randn(2, 3, size, size)
            expected = model(x, interpolate_pos_encoding=True).last_hidden_state
            found = compiled(x, interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_stack_takes_the_convolution_that_makes_its_own_tokens() -> None:
    model = whisper()
    adapter = epitaxy.attach(model, GridConv(at="encoder.layers.0.fc2", bottleneck=4, kernel=3), name="a")
    model(torch.randn(2, 8, 20), decoder_input_ids=torch.ones(2, 3, dtype=torch.long))
    assert read_grids(adapter) == {(1, 10)}
    assert adapter.edits[0].module.frequency is None
    with pytest.raises(EpitaxyError, match="causal block"):
        epitaxy.attach(model, GridConv(at="decoder.layers.0.fc2"), name="b")


def bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=20, intermediate_size=64, **SIZES, **NO_DROPOUT)
    ).eval()


@torch.no_grad()
def test_models_that_do_not_tell_are_refused_or_told() -> None:
    model = bert()
    with pytest.raises(EpitaxyError, match=r"the patch grid of bert cannot be told.*give the rows and columns as grid"):
        epitaxy.attach(model, GridConv(), name="a")
    assert epitaxy.adapters(model) == {}
    epitaxy.attach(model, GridConv(bottleneck=4, grid=(2, 3)), name="a")
    model(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(EpitaxyError, match=r"a sequence of 5 tokens does not hold the patch grid of 2 x 3"):
        model(torch.ones(1, 5, dtype=torch.long))
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=16, depths=[1], num_heads=[2], image_size=32))
    with pytest.raises(EpitaxyError, match="work on windows of a fixed grid"):
        epitaxy.attach(swin, Convpass(), name="a")
    with pytest.raises(EpitaxyError, match="have no frequency axis"):
        epitaxy.attach(wav2vec2(), GridConv(axis="frequency"), name="a")


def test_blocks_that_run_without_their_patches_are_refused() -> None:
    model: Any = vit()
    epitaxy.attach(model, GridConv(), name="a")
    with pytest.raises(EpitaxyError, match="the convolution that makes the patches did not run"):
        model.layers[0](torch.randn(1, 17, 32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GridConv(axis="rows"),  # type: ignore[arg-type]
        lambda: GridConv(grid=(0, 3)),
        lambda: GridConv(kernel=0),
        lambda: Convpass(bottleneck=0),
        lambda: Convpass(dimensions=3),  # type: ignore[arg-type]
        lambda: Convpass(dimensions=1, grid=(2, 2)),
    ],
)
def test_wrong_fields_are_named(make: Any) -> None:
    with pytest.raises(EpitaxyError, match=r"^(axis|grid|kernel|bottleneck|dimensions)"):
        make()


def test_patches_and_frames_keep_their_order() -> None:
    x = torch.randn(2, 14, 5, generator=torch.Generator().manual_seed(3))
    special, plane = Grid((3, 4)).split(x)
    assert special.shape == (2, 2, 5)
    assert torch.equal(plane[:, :, 1, 2], x[:, 2 + 4 + 2])
    assert torch.equal(Grid.join(special, plane), x)


def test_published_convpass_leaves_its_convolution_out() -> None:
    model = vit()
    adapter = epitaxy.attach(model, Convpass(bottleneck=4, legacy=True), name="a")
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    output: Tensor = model(torch.randn(2, 3, 32, 32)).last_hidden_state
    output.pow(3).sum().backward()
    dead = {name.rpartition(".module.")[2] for name, p in adapter.named_parameters() if p.grad is None}
    assert dead == {"convolution.weight", "convolution.bias"}
