"""The Conformer adapter: folding, borders, statistics, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import Conformer, EpitaxyError
from epitaxy.methods.conformer import ConformerConvolution, ConvolutionBatchNorm


def ast(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_length=40,
        num_mel_bins=36,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **fields,
    )
    return transformers.ASTModel(config).eval()


def sound(batch: int = 2) -> Tensor:
    return torch.randn(batch, 40, 36, generator=torch.Generator().manual_seed(1))


def convolution(**fields: Any) -> ConformerConvolution:
    """A module with every parameter and statistic away from its start."""
    torch.manual_seed(0)
    module = ConformerConvolution(32, 6, 32, **{"kernel": 8, "zero_init": False, **fields})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for buffer in module.buffers():
            buffer.add_(torch.rand_like(buffer))
    return module


def written_out(module: ConformerConvolution, x: Tensor) -> Tensor:
    """The formula with torch's own layers: layer norm, gate, "same" convolution, batch norm, SiLU."""
    norm = module.inner_norm
    assert isinstance(norm, ConvolutionBatchNorm)
    assert module.norm is not None
    low = F.glu(module.pointwise_in(module.norm(x)), dim=-1).transpose(1, 2)
    low = F.conv1d(low, module.depthwise.weight, module.depthwise.bias, padding="same", groups=low.shape[1])
    low = F.batch_norm(low, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    result: Tensor = module.pointwise_out(F.silu(low).transpose(1, 2))
    return result


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_the_batch_norm_folds_exactly(kernel: int, tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """In eval mode on the way, and in a folded module: at padded borders and with kernels longer than the sequence."""
    module = convolution(kernel=kernel).to(dtype).eval()
    x = torch.randn(3, tokens, 32, dtype=dtype)
    expected = written_out(module, x)
    folded = module.folded()
    assert isinstance(folded.inner_norm, nn.Identity)
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in module.parameters()) - 12
    for output in (module(x), folded(x), folded.train()(x)):
        assert float((output - expected).abs().max()) < tolerance


def test_only_a_batch_norm_folds() -> None:
    with pytest.raises(EpitaxyError, match="only a batch norm folds"):
        convolution(inner_norm="group").folded()


def test_statistics_and_gradients_are_those_of_torch() -> None:
    """Over a few steps; but the convolution's bias, which the norm cancels, gets no rounding for a gradient."""
    module, theirs = convolution().double().train(), nn.BatchNorm1d(6).double().train()
    norm = module.inner_norm
    assert isinstance(norm, ConvolutionBatchNorm)
    theirs.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    for step in range(3):
        x = torch.randn(3, 10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).transpose(1, 2)
        ours = norm(F.pad(x, (3, 4)), module.depthwise)
        expected = theirs(module.depthwise(F.pad(x, (3, 4))))
        torch.testing.assert_close(ours, expected)
        weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
        found = torch.autograd.grad((ours * weights).sum(), [module.depthwise.weight, norm.weight, norm.bias])
        wanted = torch.autograd.grad(
            (expected * weights).sum(), [module.depthwise.weight, theirs.weight, theirs.bias], retain_graph=True
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(norm.running_mean, theirs.running_mean)
        torch.testing.assert_close(norm.running_var, theirs.running_var)
    module(torch.randn(2, 9, 32, dtype=torch.float64)).square().sum().backward()
    assert module.depthwise.bias is not None
    assert module.depthwise.bias.grad is not None
    assert not bool(module.depthwise.bias.grad.any())


def statistics(adapter: epitaxy.Adapter) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter.tensors().items() if "running" in key}


def test_statistics_move_with_training_alone_and_travel_with_the_adapter(tmp_path: Path) -> None:
    model = ast()
    adapter = epitaxy.attach(model, Conformer(bottleneck=4, kernel=8, zero_init=False), name="a")
    start = statistics(adapter)
    assert len(start) == 4
    model(sound())
    assert all(torch.equal(tensor, start[key]) for key, tensor in statistics(adapter).items()), "counted in eval mode"
    model.train()
    model(sound())
    moved = statistics(adapter)
    assert not any(torch.equal(tensor, start[key]) for key, tensor in moved.items())
    adapter.trainable = False
    model(sound())
    assert all(torch.equal(tensor, moved[key]) for key, tensor in statistics(adapter).items()), "frozen, yet counted"
    model.eval()
    saved = epitaxy.save(model, tmp_path / "a")
    fresh = ast()
    again = epitaxy.load(fresh, saved)
    assert all(torch.equal(tensor, moved[key]) for key, tensor in statistics(again).items())
    assert torch.equal(fresh(sound()).last_hidden_state, model(sound()).last_hidden_state)


def test_checkpointing_counts_a_batch_once() -> None:
    counted = []
    for checkpointed in (False, True):
        model = ast()
        torch.manual_seed(2)
        adapter = epitaxy.attach(model, Conformer(bottleneck=4, kernel=8, zero_init=False), name="a")
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model(sound()).last_hidden_state.pow(3).sum().backward()
        counted.append(statistics(adapter))
    assert all(torch.equal(tensor, counted[1][key]) for key, tensor in counted[0].items())


@pytest.mark.parametrize(("inner_norm", "alone"), [("batch", False), ("group", True), ("layer", True)])
def test_which_norms_see_other_rows_in_training(inner_norm: str, alone: bool) -> None:
    module = convolution(inner_norm=inner_norm).train()
    x = torch.randn(3, 12, 32)
    assert torch.allclose(module(x)[:1], module(x[:1]), atol=1e-6) is alone
    assert len(list(module.buffers())) == (0 if alone else 2)


@torch.no_grad()
def test_a_token_reaches_its_kernel_and_no_further() -> None:
    for kernel, reached in ((8, range(6, 14)), (3, range(9, 12)), (1, range(10, 11))):
        module = convolution(kernel=kernel).eval()
        x = torch.randn(1, 20, 32)
        other = x.clone()
        other[:, 10] = torch.randn(32)
        changed = (module(x) - module(other)).abs().amax(dim=(0, 2)) > 0
        assert changed.nonzero().flatten().tolist() == list(reached)


def test_legacy_is_the_released_adapter() -> None:
    """The layer norm is there and dead, all maps start as torch starts them."""
    module = Conformer(bottleneck=4, kernel=8, legacy=True)
    model = ast()
    adapter = epitaxy.attach(model, module, name="a")
    model.train()
    model(sound()).last_hidden_state.pow(3).sum().backward()
    without = {name.rpartition(".module.")[2] for name, p in adapter.named_parameters() if p.grad is None}
    assert without == {"norm.weight", "norm.bias"}
    assert float(adapter.edits[0].module.pointwise_out.weight.abs().max()) > 0


def test_every_part_trains_by_default() -> None:
    model = ast()
    adapter = epitaxy.attach(model, Conformer(bottleneck=4, kernel=8), name="a")
    start = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    model.train()
    for _ in range(3):
        optimiser.zero_grad()
        model(sound()).last_hidden_state.pow(3).sum().backward()
        optimiser.step()
    still = {name for name, parameter in adapter.named_parameters() if torch.equal(parameter, start[name])}
    assert {name.rpartition(".module.")[2] for name in still} == {"depthwise.bias"}, "cancelled by the batch norm"


def test_causal_blocks_are_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, intermediate_size=64, **sizes))
    whisper = transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4
        )
    )
    for model in (llama, whisper):
        with pytest.raises(EpitaxyError, match="let tokens of this causal block see later ones"):
            epitaxy.attach(model, Conformer(), name="a")
        assert epitaxy.adapters(model) == {}
    assert len(epitaxy.attach(whisper, Conformer(at="encoder.layers.0.fc2"), name="a").edits) == 1


@pytest.mark.parametrize("fields", [{"norm": "batch"}, {"inner_norm": "none"}, {"kernel": 0}, {"bottleneck": 0}])
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(EpitaxyError, match=f"^{next(iter(fields))}"):
        Conformer(**fields)
    with pytest.raises(EpitaxyError, match="a layer norm of one channel is constant"):
        epitaxy.attach(ast(), Conformer(bottleneck=1, inner_norm="layer"), name="a")


def test_sequences_only() -> None:
    with pytest.raises(EpitaxyError, match=r"batch x tokens x width, found shape \(5, 32\)"):
        convolution()(torch.randn(5, 32))
