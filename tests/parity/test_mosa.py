"""MoSA against golden vectors of an independent restatement with N copies of every split weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import epitaxy
from epitaxy import MoSA, MoSALoRA
from epitaxy.methods.draws import at_step
from epitaxy.methods.mosa_lora import SplitDelta
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.partition import bounds, owners_of
from epitaxy.methods.parts import Parts
from tests.methods.drawing import modules_of, step_that_draws

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "mosa"
PARTS, WIDTH, RANK = 4, 8, 4
SPLITS: Any = {"share_down": "up", "share_up": "down", "share_none": "both"}

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden vectors are not at {GOLDEN}")
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
shares = pytest.mark.parametrize("share", SPLITS)


@cache
def golden(name: str) -> Mapping[str, Tensor]:
    """The tensors of one golden file; do not write into them."""
    return load_file(GOLDEN / f"{name}.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    exact = actual.dtype == torch.float64
    atol, rtol = (1e-10, 1e-9) if exact else (2e-5, 1e-4)
    torch.testing.assert_close(actual.detach().double(), expected, atol=atol, rtol=rtol)


def vit(dtype: torch.dtype) -> nn.Module:
    """One block with the golden weights; its input is five tokens."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=4,
        patch_size=2,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTModel(config).to(dtype)
    base = golden("vit_block")
    names = {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "out": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    with torch.no_grad():
        for theirs, ours in names.items():
            for leaf in ("weight", "bias"):
                model.layers[0].get_parameter(f"{ours}.{leaf}").copy_(base[f"base.{theirs}.{leaf}"])
    return model


def attached(model: nn.Module, method: MoSA, dtype: torch.dtype) -> list[SparseMLP]:
    adapter = epitaxy.attach(model, method, name="a")
    for piece in adapter.pieces:
        piece.module.to(dtype)
    model.train()
    return modules_of(model)


@torch.no_grad()
def fill_copies(module: SparseMLP, copies: Mapping[str, Tensor] | None = None) -> None:
    """The golden copies of split projections in the single-tensor form, and the weights of those that are not split."""
    copies = golden("adapter_forward") if copies is None else copies
    if module.norm is not None:
        module.norm.weight.copy_(copies["norm.weight"])
        module.norm.bias.copy_(copies["norm.bias"])
    for name, layer, parts in (("down", module.down, module.down_parts), ("up", module.up, module.up_parts)):
        if parts is None:
            layer.weight.copy_(copies[f"shared_{name}.weight"])
            layer.bias.copy_(copies[f"shared_{name}.bias"])
            continue
        start = copies["down.init.weight"] if name == "down" else torch.zeros_like(copies["up.0.weight"])
        owners = copies[f"{name}.assign"]
        fill_parts(layer.weight, parts, start, owners, [copies[f"{name}.{part}.weight"] for part in range(PARTS)])
        layer.bias.copy_(torch.stack([copies[f"{name}.{part}.bias"] for part in range(PARTS)]))


def fill_parts(weight: nn.Parameter, parts: Parts, start: Tensor, owners: Tensor, copies: list[Tensor]) -> None:
    parts.owners.copy_(owners)
    if parts.initial is not None:
        parts.initial.copy_(start)
    whole = start.clone()
    for part, copy in enumerate(copies):
        assert torch.equal(copy[owners != part], start[owners != part])
        whole = torch.where(owners == part, copy, whole)
    weight.copy_(whole)


@pytest.mark.parametrize("which", ["up", "down", "odd"])
def test_owners_are_those_of_the_ranks(which: str) -> None:
    file = golden("partition")
    score = file[f"{which}.score"]
    owners = owners_of(score, PARTS)
    assert torch.equal(owners.long(), file[f"{which}.assign_all"])
    assert owners.flatten().long().bincount(minlength=PARTS).tolist() == file[f"{which}.count_all"].tolist()
    if which != "odd":
        assert torch.equal(owners_of(score, PARTS, "row").long(), file[f"{which}.assign_row"])
        assert torch.equal(owners_of(score, PARTS, "column").long(), file[f"{which}.assign_col"])


@shares
@precisions
def test_outputs_with_every_part_active(share: str, dtype: torch.dtype) -> None:
    file = golden("adapter_forward")
    method = MoSA(bottleneck=RANK, split=SPLITS[share], norm="layer", dropout=0.0, bias="parts")
    model = vit(dtype)
    (module,) = attached(model, method, dtype)
    fill_copies(module)
    x = file["x"].to(dtype)
    split = [parts for parts in (module.down_parts, module.up_parts) if parts is not None]
    for numbers in itertools.product(range(PARTS), repeat=len(split)):
        with at_step(model, step_that_draws(dict(zip(split, numbers, strict=True)))):
            close(0.1 * module(x), file[f"{share}.out.{'.'.join(map(str, numbers))}"])
    module.eval()
    close(0.1 * module(x), file[f"{share}.out_merged_mean"])
    for name, parts in (("down", module.down_parts), ("up", module.up_parts)):
        if parts is not None:
            weight, bias = module.merged(name)  # type: ignore[arg-type]
            close(weight, file[f"{name}.merged_mean.weight"])
            close(bias, file[f"{name}.merged_mean.bias"])


@shares
@precisions
def test_the_union_without_the_division(share: str, dtype: torch.dtype) -> None:
    file = golden("adapter_forward")
    method = MoSA(bottleneck=RANK, split=SPLITS[share], norm="layer", dropout=0.0, bias="parts", merge="union")
    (module,) = attached(vit(dtype), method, dtype)
    fill_copies(module)
    module.eval()
    if f"{share}.out_union" in file:
        close(0.1 * module(file["x"].to(dtype)), file[f"{share}.out_union"])
    for name, parts in (("down", module.down_parts), ("up", module.up_parts)):
        if parts is not None:
            close(module.merged(name)[0], file[f"{name}.union.weight"])  # type: ignore[arg-type]


@precisions
def test_the_published_joint_merge_is_the_union_over_n_and_the_last_bias_over_n(dtype: torch.dtype) -> None:
    """What another option of the released code does; here for loading its results, never what evaluation does."""
    file = golden("adapter_forward")
    method = MoSA(bottleneck=RANK, norm="layer", dropout=0.0, bias="parts")
    (module,) = attached(vit(dtype), method, dtype)
    fill_copies(module)
    module.eval()
    with torch.no_grad():
        module.up.bias.copy_((module.up.bias[-1] / PARTS).expand_as(module.up.bias))
    close(0.1 * module(file["x"].to(dtype)), file["share_down.out_merged_joint"])
    with torch.no_grad():
        for name in ("down", "up"):
            whole = file[f"{name}.union.weight"].to(dtype)
            close(whole / PARTS, file[f"{name}.merged_joint.weight"])


@pytest.mark.parametrize("share", ["share_down", "share_none"])
@precisions
def test_gradients(share: str, dtype: torch.dtype) -> None:
    file = golden("adapter_grads")
    method = MoSA(bottleneck=RANK, split=SPLITS[share], norm="layer", dropout=0.0, bias="parts")
    model = vit(dtype)
    (module,) = attached(model, method, dtype)
    fill_copies(module)
    wanted = {"down": int(file["active_down"]), "up": int(file["active_up"])}
    split = {name: getattr(module, f"{name}_parts") for name in wanted}
    x = golden("adapter_forward")["x"].to(dtype).clone().requires_grad_()
    chosen = {parts: wanted[name] for name, parts in split.items() if parts is not None}
    with at_step(model, step_that_draws(chosen)):
        (0.1 * module(x) * file["grad_out"].to(dtype)).sum().backward()
    raw = f"{share}.raw."
    assert x.grad is not None
    close(x.grad, file[f"{raw}x"])
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        side = name.split(".")[0]
        parts = split.get(side)
        if parts is None:
            close(parameter.grad, file[f"{raw}{name}"])
        elif name.endswith("bias"):
            close(parameter.grad[wanted[side]], file[f"{raw}{name}"])
            others = [part for part in range(PARTS) if part != wanted[side]]
            assert not bool(parameter.grad[others].any())
        else:
            close(parameter.grad, file[f"{share}.masked.{name}"])
            assert not bool(parameter.grad[parts.owners != wanted[side]].any())


STYLES: dict[str, tuple[MoSA, tuple[dict[str, int], ...]]] = {
    "AdaptFormer": (MoSA.adaptformer(RANK), ({"up": 1},)),
    "Pfeiffer": (MoSA.pfeiffer(RANK), ({"down": 3},)),
    "Houlsby": (MoSA.houlsby(RANK), ({"down": 3, "up": 1}, {"down": 0, "up": 3})),
}


@pytest.mark.parametrize("style", STYLES)
@precisions
def test_whole_blocks(style: str, dtype: torch.dtype) -> None:
    """A block of a ViT of transformers with the preset of each style: output, gradients of its input and weights."""
    file, (method, draws) = golden("vit_block"), STYLES[style]
    split: Any = {1: next(iter(draws[0])), 2: "both"}[len(draws[0])]
    model = vit(dtype)
    modules = attached(model, replace(method, split=split, bias="parts", dropout=0.0), dtype)
    assert len(modules) == len(draws)
    wanted: dict[Parts, int] = {}
    for module, numbers in zip(modules, draws, strict=True):
        fill_copies(module)
        wanted |= {getattr(module, f"{name}_parts"): number for name, number in numbers.items()}
    x = file["x"].to(dtype).clone().requires_grad_()
    with at_step(model, step_that_draws(wanted)):
        y = model.layers[0](x)  # type: ignore[index, operator]
        (y * file["grad_out"].to(dtype)).sum().backward()
    close(y, file[f"{style}.train.y"])
    assert x.grad is not None
    close(x.grad, file[f"{style}.train.grad_x"])
    places = {"attn.": 0, "ffn.": 1} if style == "Houlsby" else {"": 0}
    for place, index in places.items():
        for leaf, name in (("dw", "down.weight"), ("db", "down.bias"), ("uw", "up.weight"), ("ub", "up.bias")):
            gradient = modules[index].get_parameter(name).grad
            expected = file[f"{style}.train.rawgrad.{place}{leaf}"]
            side, kind = name.split(".")
            parts, number = getattr(modules[index], f"{side}_parts"), draws[index].get(side)
            assert gradient is not None
            if parts is None:
                close(gradient, expected)
            elif kind == "bias":
                close(gradient[number], expected)
            else:
                close(gradient, torch.where(parts.owners == number, expected, 0))
    if style == "AdaptFormer":
        model.eval()
        close(model.layers[0](x), file["AdaptFormer.merged_mean.y"])  # type: ignore[index, operator]


@pytest.mark.parametrize(("partition", "name"), [("out_slice", "outslice"), ("rank_slice", "rankslice")])
@precisions
def test_slices(partition: Any, name: str, dtype: torch.dtype) -> None:
    file = golden("structured")
    model = vit(dtype)
    (module,) = attached(model, MoSA(bottleneck=RANK, partition=partition, norm="layer", dropout=0.0), dtype)
    with torch.no_grad():
        for key in ("norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight"):
            module.get_parameter(key).copy_(file[key])
    size = WIDTH if partition == "out_slice" else RANK
    assert bounds(size, PARTS) == file["out_bounds" if partition == "out_slice" else "rank_bounds"].tolist()
    total = torch.zeros_like(file["dense_out_no_bias"])
    assert module.up_parts is not None
    for part in range(PARTS):
        module.zero_grad()
        with at_step(model, step_that_draws({module.up_parts: part})):
            out = 0.1 * module(file["x"].to(dtype))
            (out * file["grad_out"].to(dtype)).sum().backward()
        close(out, file[f"{name}.out.{part}"])
        assert module.up.weight.grad is not None
        close(module.up.weight.grad, file[f"{name}.grad_up.{part}"])
        total += out.detach().double()
    close(total.to(dtype), file["dense_out_no_bias"])


@pytest.mark.parametrize("target", ["q", "v"])
@precisions
def test_lora_factors(target: str, dtype: torch.dtype) -> None:
    file = {key.removeprefix(f"{target}."): value for key, value in golden("lora").items()}
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(dtype)
    adapter = epitaxy.attach(host, MoSALoRA(at="0", rank=RANK, split="both"), name="a")
    (edit,) = adapter.edits
    assert isinstance(edit, SplitDelta)
    edit.to(dtype)
    assert edit.down_parts is not None
    assert edit.up_parts is not None
    with torch.no_grad():
        host[0].weight.copy_(file["weight"])
        host[0].bias.copy_(file["bias"])
        for letter, factor, parts in (("A", edit.down, edit.down_parts), ("B", edit.up, edit.up_parts)):
            owners, copies = file[f"{letter}.assign"], [file[f"{letter}.{part}"] for part in range(PARTS)]
            # the copies agree outside their own elements
            start = torch.where(owners == 0, copies[1], copies[0]) if letter == "A" else torch.zeros_like(copies[0])
            fill_parts(factor, parts, start, owners, copies)
    x = file["x"].to(dtype)
    host.train()
    for down, up in itertools.product(range(PARTS), repeat=2):
        with at_step(host, step_that_draws({edit.down_parts: down, edit.up_parts: up})):
            close(host(x), file[f"out.{down}.{up}"])
    host.eval()
    merged = edit.factors()
    close(merged[0], file["A.merged_mean"])
    close(merged[1], file["B.merged_mean"])
    close(host(x), file["out_folded"])
    epitaxy.merge(host, tolerance=1e-4)
    close(host[0].weight, file["weight_folded"])
    close(F.linear(x, host[0].weight, host[0].bias), file["out_folded"])
