"""Mixtures of adapters against the sums written out expert by expert, and what those sums promise."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import epitaxy
from epitaxy import DenseMoA, EpitaxyError, NormTuning, SoftMoA
from epitaxy.core.edits.tap import Memo
from epitaxy.core.errors import SiteError, UnsupportedError
from epitaxy.methods.dense_moa import DenseMixture
from epitaxy.methods.experts import Experts, quick_gelu
from epitaxy.methods.mixture import Mixture, mixtures_of, token_mask
from epitaxy.methods.soft_moa import SoftMixture
from tests.contract.families import FAMILIES, enable_checkpointing


def filled(mixture: Mixture) -> Mixture:
    """In float64, every parameter away from its start."""
    for parameter in mixture.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixture


def one_expert(experts: Experts, number: int, u: Tensor) -> Tensor:
    """Expert ``number`` by itself on ``b n d``."""
    low = F.linear(u, experts.down[number], experts.down_bias[number])
    if experts.kind == "convpass":
        low = quick_gelu(low).transpose(1, 2)
        low = quick_gelu(F.conv1d(low, experts.conv[number], experts.conv_bias[number], padding=1)).transpose(1, 2)
    else:
        low = F.gelu(low)
    return low @ experts.up[number] + experts.up_bias[number]


def dense_written(mixture: DenseMixture, u: Tensor) -> Tensor:
    shares = torch.softmax(F.linear(u, mixture.router, mixture.router_bias), -1)
    outputs = [one_expert(mixture.experts, number, u) for number in range(mixture.experts.count)]
    return sum((shares[..., number, None] * out for number, out in enumerate(outputs)), torch.zeros(()))


def soft_written(mixture: SoftMixture, u: Tensor) -> Tensor:
    seen, phi = u, mixture.phi
    if mixture.normalise:
        seen = u / (u.norm(dim=-1, keepdim=True) + 1e-6)
        phi = mixture.scale * phi / (phi.norm(dim=0, keepdim=True) + 1e-6)
    logits = torch.einsum("bnd,dep->bnep", seen, phi)
    dispatch, combine = torch.softmax(logits, 1), torch.softmax(logits.flatten(2), 2).view_as(logits)
    out = torch.zeros(())
    for number in range(mixture.experts.count):
        read = torch.einsum("bnp,bnd->bpd", dispatch[:, :, number], u)
        said = one_expert(mixture.experts, number, read)
        out = out + torch.einsum("bnp,bpd->bnd", combine[:, :, number], said)
    return out


def compare(mixture: Mixture, expected: Any, u: Tensor) -> None:
    """Outputs and all gradients."""
    results = []
    for function in (mixture, lambda x: expected(mixture, x)):
        mixture.zero_grad()
        x = u.clone().requires_grad_()
        out = function(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        assert x.grad is not None
        gradients = {name: parameter.grad for name, parameter in mixture.named_parameters()}
        results.append({"out": out.detach(), "input": x.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], rtol=1e-9, atol=1e-11)


sizes = st.tuples(*(st.integers(1, 5) for _ in range(6)))
kinds = st.sampled_from(["bottleneck", "convpass"])


@settings(max_examples=40, deadline=None)
@given(sizes, kinds)
def test_fused_dense_mixture_is_the_sum_over_experts(size: tuple[int, ...], kind: Any) -> None:
    batch, tokens, width_in, width, count, inner = size
    torch.manual_seed(sum(size))
    mixture = DenseMixture(Experts(count, width_in, inner, width, kind))
    filled(mixture)
    compare(mixture, dense_written, torch.randn(batch, tokens, width_in, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(sizes, kinds, st.integers(1, 3), st.booleans())
def test_soft_mixture_is_the_sum_over_slots(size: tuple[int, ...], kind: Any, slots: int, normalise: bool) -> None:
    batch, tokens, width_in, width, count, inner = size
    torch.manual_seed(sum(size))
    mixture = SoftMixture(Experts(count, width_in, inner, width, kind), slots, normalise)
    filled(mixture)
    compare(mixture, soft_written, torch.randn(batch, tokens, width_in, dtype=torch.float64))


def test_other_shapes_of_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    for mixture in (DenseMixture(Experts(2, 8, 3, 8)), SoftMixture(Experts(2, 8, 3, 8))):
        filled(mixture)
        torch.testing.assert_close(mixture(x), mixture(x.flatten(1, 2)).view_as(x))
    dense = filled(DenseMixture(Experts(2, 8, 3, 8)))
    torch.testing.assert_close(dense(x[:, 0, 0]), dense(x)[:, 0, 0])
    with pytest.raises(UnsupportedError, match="three or more dimensions"):
        SoftMixture(Experts(2, 8, 3, 8)).double()(x[:, 0, 0])


@pytest.mark.parametrize("normalise", [False, True])
def test_weights_sum_to_one_and_stay_fp32(normalise: bool) -> None:
    torch.manual_seed(0)
    mixture = SoftMixture(Experts(3, 8, 2, 8), slots=2, normalise=normalise).bfloat16()
    logits, _ = mixture.logits(torch.randn(2, 5, 8, dtype=torch.bfloat16) * 30)
    dispatch, combine = mixture.weights(logits)
    assert dispatch.dtype == combine.dtype == torch.float32
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 6))
    torch.testing.assert_close(combine.sum(2), torch.ones(2, 5))


@pytest.mark.parametrize("make", [lambda e: DenseMixture(e), lambda e: SoftMixture(e, slots=2, normalise=True)])
def test_order_of_tokens_and_independence_of_samples(make: Any) -> None:
    torch.manual_seed(0)
    mixture = filled(make(Experts(3, 8, 2, 8)))
    x, order = torch.randn(3, 7, 8, dtype=torch.float64), torch.randperm(7)
    out = mixture(x)
    torch.testing.assert_close(mixture(x[:, order]), out[:, order], rtol=0, atol=1e-12)
    changed = x.clone()
    changed[1] += 1
    again = mixture(changed)
    torch.testing.assert_close(again[[0, 2]], out[[0, 2]], rtol=0, atol=1e-12)
    assert float((again[1] - out[1]).detach().abs().max()) > 1e-3


def test_slots_read_other_tokens() -> None:
    torch.manual_seed(0)
    mixture = filled(SoftMixture(Experts(3, 8, 2, 8)))
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 3] += 1
    assert float((mixture(changed) - mixture(x)).detach()[0, 0].abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda experts: DenseMixture(experts), "convpass"),
        (lambda experts: SoftMixture(experts, slots=2), "bottleneck"),
        (lambda experts: SoftMixture(experts, slots=2, normalise=True), "convpass"),
    ],
)
def test_masked_tail_is_as_if_it_were_not_there(make: Any, kind: Any) -> None:
    torch.manual_seed(0)
    mixture = filled(make(Experts(3, 8, 2, 8, kind)))
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    lengths = (7, 4)
    without_mask = mixture(x)
    mixture.mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    out = mixture(x)
    mixture.mask = None
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], mixture(x[row : row + 1, :length])[0], rtol=0, atol=1e-12)
    assert float((without_mask[1, :4] - out[1, :4]).detach().abs().max()) > 1e-4
    mixture.mask = torch.zeros(2, 7, dtype=torch.bool)
    assert bool(mixture(x).isfinite().all())


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return FAMILIES["bert"].model(), {"input_ids": torch.randint(1, 50, (2, 7))}


def test_token_mask_of_a_model() -> None:
    model, inputs = bert()
    adapter = epitaxy.attach(model, SoftMoA(experts=2, bottleneck=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

    def logits(**changed: Tensor) -> Tensor:
        with torch.no_grad():
            return model(**{**inputs, "attention_mask": attention, **changed}).logits

    other = inputs["input_ids"].clone()
    other[1, 4:] = 3
    with token_mask(adapter, attention.bool()):
        torch.testing.assert_close(logits(), logits(input_ids=other))
        with epitaxy.route(model, ["default", None]), pytest.raises(UnsupportedError, match="not routed"):
            logits()
    assert float((logits() - logits(input_ids=other)).abs().max()) > 1e-4
    assert all(module.mask is None for _, module in mixtures_of(adapter))
    with (
        pytest.raises(EpitaxyError, match=r"boolean, batch x tokens, got torch\.int64"),
        token_mask(adapter, attention),
    ):
        pass
    plain = epitaxy.attach(model, NormTuning(), name="plain")
    with pytest.raises(EpitaxyError, match="'plain' has no mixture"), token_mask(plain, attention.bool()):
        pass


def parameters_per_layer(method: Any) -> int:
    model = FAMILIES["ast"].model()  # 2 blocks of width 32
    return epitaxy.attach(model, method).size() // 2


@pytest.mark.parametrize(("count", "inner"), [(1, 1), (2, 5), (7, 6)])
def test_parameter_counts(count: int, inner: int) -> None:
    width = 32
    experts = count * ((width + 1) * inner + (inner + 1) * width)
    assert parameters_per_layer(DenseMoA(experts=count, bottleneck=inner)) == experts + (width + 1) * count
    for slots in (1, 2, 3):
        soft = SoftMoA(experts=count, bottleneck=inner, slots=slots)
        assert parameters_per_layer(soft) == experts + width * count * slots
    scaled = SoftMoA(experts=count, bottleneck=inner, normalise=True)
    assert parameters_per_layer(scaled) == experts + width * count + 1
    convpass = SoftMoA(experts=count, bottleneck=inner, expert="convpass")
    assert parameters_per_layer(convpass) == experts + width * count + count * (3 * inner**2 + inner)


@pytest.mark.parametrize(("method", "count"), [(DenseMoA, 922_188), (SoftMoA, 922_104)])
def test_counts_of_the_published_models(method: Any, count: int) -> None:
    """At the width of AST, with the norms before attention, which the published models train too."""
    from transformers import ASTConfig, ASTModel

    with torch.device("meta"):
        model = ASTModel(ASTConfig())
    adapter = epitaxy.attach(model, method(experts=7, bottleneck=6) + NormTuning(at="norm.attention"))
    assert adapter.size() == count


def test_legacy_adds_twice_only_where_published() -> None:
    """The second addition belongs to a mixture at attention alone."""
    from epitaxy.core.edits.echo import Echo

    def echoes(**fields: Any) -> int:
        model = FAMILIES["vit"].model()
        epitaxy.attach(model, DenseMoA(experts=2, bottleneck=2, **fields))
        return sum(isinstance(module, Echo) for module in model.modules())

    assert echoes(at="attention", legacy=True) == 2
    assert echoes(at="attention", legacy=True, layers=(1,)) == 1
    assert echoes(at="attention") == 0
    assert echoes(at="mlp", legacy=True) == 0
    assert echoes(at=("attention", "mlp"), legacy=True) == 0


def test_legacy_needs_a_feed_forward_in_the_block() -> None:
    layout = epitaxy.Layout("no mlp", {"attention": "attn", "attention.output": "attn.out"}, heads=1)
    attention = nn.ModuleDict({"out": nn.Linear(4, 4)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": attention})])})
    with pytest.raises(SiteError, match="has no 'mlp' in the same block"):
        epitaxy.attach(model, DenseMoA(experts=2, bottleneck=2, legacy=True), layout=layout)


def test_published_start() -> None:
    torch.manual_seed(0)
    model = FAMILIES["ast"].model()
    adapter = epitaxy.attach(model, SoftMoA(experts=4, bottleneck=8, slots=2, legacy=True))
    tensors = {key.rpartition("experts.")[2]: value for key, value in adapter.tensors().items()}
    for name in ("down", "up"):
        assert float(tensors[name].std()) == pytest.approx(0.02, rel=0.1)
    assert not tensors["down_bias"].any()
    assert not tensors["up_bias"].any()
    phi = next(value for key, value in adapter.tensors().items() if key.endswith("phi"))
    assert float(phi.std()) == pytest.approx(math.sqrt(2 / (4 * 2 + 32 * 2)), rel=0.1)  # of a tensor d E p


def test_corrected_start() -> None:
    adapter = epitaxy.attach(FAMILIES["ast"].model(), DenseMoA(experts=4, bottleneck=8))
    for key, value in adapter.tensors().items():
        starts_random = key.endswith((".down", ".router"))
        assert bool(value.any()) == starts_random, key


@pytest.mark.parametrize("make", [DenseMoA, SoftMoA])
def test_refusals(make: Any) -> None:
    for fields, message in (
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout lies in \[0, 1\), got 1.0"),
        ({"expert": "conformer"}, "'conformer' is none of bottleneck, convpass"),
        ({"activation": "tanh"}, "'tanh' is none of relu, gelu, silu, quick_gelu"),
    ):
        with pytest.raises(EpitaxyError, match=message):
            make(**fields)
    with pytest.raises(EpitaxyError, match="slots must be at least 1"):
        SoftMoA(slots=0)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    mixture = DenseMixture(Experts(2, 8, 4, 8, dropout=0.5))
    nn.init.normal_(mixture.experts.up)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(mixture(x), mixture(x))
    mixture.eval()
    assert torch.equal(mixture(x), mixture(x))


def test_a_checkpointed_pass_leaves_nothing_in_copies() -> None:
    """The second pass of a checkpointed block ends before the mixture's second addition."""
    family = FAMILIES["vit"]
    model = family.model()
    epitaxy.attach(model, DenseMoA(experts=2, bottleneck=3, legacy=True))
    model.train()
    enable_checkpointing(model)
    family.run(model).sum().backward()
    twin = copy.deepcopy(model)
    memos = [value for module in twin.modules() for value in vars(module).values() if isinstance(value, Memo)]
    assert memos
    assert all(memo.value is None for memo in memos)
    with torch.no_grad():
        torch.testing.assert_close(family.run(twin), family.run(model))


def test_soft_mixture_is_refused_where_tokens_may_not_look_ahead() -> None:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=10,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    with pytest.raises(UnsupportedError, match="read all tokens, later ones too"):
        epitaxy.attach(model, SoftMoA())
    assert epitaxy.adapters(model) == {}
    assert len(epitaxy.attach(model, SoftMoA(at="encoder.layers.*.self_attn")).edits) == 1
    epitaxy.attach(model, DenseMoA(), name="dense")


@pytest.mark.parametrize("make", [DenseMixture, lambda experts: SoftMixture(experts, slots=2, normalise=True)])
def test_autocast(make: Any) -> None:
    torch.manual_seed(0)
    mixture = make(Experts(3, 16, 4, 16, "convpass"))
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    expected = mixture(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixture(x)
        out.float().square().sum().backward()
    torch.testing.assert_close(out.float().detach(), expected, rtol=0.1, atol=0.05)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in mixture.parameters())
