"""What a single module is, told from its type and weights: a norm, a linear map, an attention of this or that kind."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation with a learned weight, by type or (for RMSNorm copies) by name."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return (isinstance(module, NORM_TYPES) or named) and isinstance(weight, nn.Parameter) and weight.dim() == 1


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map; GPT-2's ``Conv1D`` (weights stored in x out) and quantised ones count."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    told = all(isinstance(size, int) for size in sizes)
    return isinstance(module, nn.Linear) or is_transposed_linear(module) or told


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Features in and out of a linear map; a quantised weight is packed, so that its shape says nothing."""
    weight = getattr(module, "weight", None)
    if is_transposed_linear(module):
        size_in, size_out = weight_of(module).shape
    elif isinstance(weight, Tensor) and weight.dim() == 2 and torch.is_floating_point(weight):
        size_out, size_in = weight.shape
    else:
        size_in, size_out = module.in_features, module.out_features  # type: ignore[assignment]
    return int(size_in), int(size_out)


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight, which its kind guarantees to be a tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether the weight is stored ``in x out``, as in GPT-2."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None


def uses_interface(attention: nn.Module) -> bool:
    """Whether an attention layer gets its softmax from transformers' attention interface, and so takes extra keys."""
    names = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    return (names is not None and "ALL_ATTENTION_FUNCTIONS" in names.co_names) or is_fused(attention)


def is_fused(attention: nn.Module) -> bool:
    """Whether an attention layer hands the weights of its projections to torch instead of calling them (WavLM)."""
    return hasattr(type(attention), "torch_multi_head_self_attention")


def is_bypassed(attention: nn.Module | None, name: str) -> bool:
    """Whether an attention layer reads the weight of its child ``name`` and never calls it, so that hooks never run.

    Torch's does so with its output projection; those of timm that add biases of their own to queries and values (BEiT,
    EVA, Swin v2) with their one matrix.
    """
    own_biases = name == "qkv" and isinstance(getattr(attention, "q_bias", None), nn.Parameter)
    return own_biases or isinstance(attention, nn.MultiheadAttention)
