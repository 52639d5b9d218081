"""How far two passes over the same examples lie apart, in their scores and in the lower half of the network.

Symmetric KL as in AdaMix (Wang et al., EMNLP 2022) and MoSA (2312.02923), whose targets are constants; the squared
distance of the scores as in PACE (Ni et al., NeurIPS 2024).  Everything is computed in fp32 (fp64 stays).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from epitaxy.core.edits.edit import wide

Consistency = Literal["sym_kl", "mse", "none"]


def distance(kind: Consistency, p: Tensor, q: Tensor, weights: Tensor | None = None) -> Tensor:
    """The consistency of scores ``p`` and ``q`` (``... classes``), averaged over all positions.

    sym_kl: ``(KL(q || p) + KL(p || q)) / 2``, the first of each pair a constant; mse: the squared distance, summed
    over the classes.  ``weights`` (``...``) replace the average by a weighted sum.
    """
    if kind == "sym_kl":
        return pull(kind, p, q, weights) + pull(kind, q, p, weights)
    if kind == "mse":
        return _averaged((wide(p) - wide(q)).square().sum(-1), weights)
    return wide(p).sum() * 0.0


def pull(kind: Consistency, own: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
    """The part of ``distance`` whose gradient reaches ``own``, with ``other`` a constant.

    The gradient of ``distance`` is the sum of the gradients of both pulls, exactly.  The value is half of the KL, or
    the whole squared distance.
    """
    if kind == "sym_kl":
        target = F.log_softmax(wide(other.detach()), -1)
        return 0.5 * _averaged((target.exp() * (target - F.log_softmax(wide(own), -1))).sum(-1), weights)
    return distance(kind, own, other.detach(), weights)


def hidden_distance(p: Sequence[Tensor], q: Sequence[Tensor], blocks: int) -> Tensor:
    """The sum over layers of the mean squared difference of their outputs, divided by the number of all ``blocks``."""
    total = wide(p[0]).new_zeros(())
    for one, other in zip(p, q, strict=True):
        total = total + (wide(one) - wide(other)).square().mean()
    return total / blocks


def _averaged(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).sum()
