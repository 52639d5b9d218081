"""A split bottleneck twice: one tensor with owners, and literally as N copies of which one is used and trained.

Both are the branch of MoSA without dropout: ``scale * up(gelu(down(norm(x))))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.methods.bottleneck import ACTIVATIONS
from epitaxy.methods.mosa_module import SparseMLP

Split = tuple[str, nn.Parameter, Tensor, Tensor]


class InParts(nn.Linear):
    """A linear map one part of which is trained at a time: ``W0 + [owner == drawn] (W - W0)``; biases of its own."""

    owners: Tensor
    used: Tensor
    initial: Tensor

    def __init__(self, linear: nn.Linear, owners: Tensor, parts: int, biases: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.register_buffer("owners", owners.to(torch.uint8), persistent=False)
        self.register_buffer("used", torch.zeros(parts, dtype=torch.bool), persistent=False)
        self.register_buffer("initial", linear.weight.detach().clone(), persistent=False)
        self.drawn, self.biases = 0, biases
        if biases:
            self.bias = nn.Parameter(linear.bias.detach().repeat(parts, 1))

    def weight_of(self, part: int) -> Tensor:
        """The weight that a part computes with."""
        return torch.where(self.owners == part, self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.drawn
        if torch.is_grad_enabled():
            self.used[drawn] = True
        return F.linear(x, self.weight_of(drawn), self.bias[drawn] if self.biases else self.bias)

    def in_parts(self) -> Iterator[Split]:
        """What is split, for the optimiser."""
        yield "weight", self.weight, self.owners, self.used
        if self.biases:
            rows = torch.arange(len(self.used), dtype=torch.uint8, device=self.bias.device)
            yield "bias", self.bias, rows.unsqueeze(1).expand_as(self.bias), self.used


class Copies(nn.Module):
    """The published form: a full copy of the map for each part, whose gradient is masked after the backward pass.

    ``biases`` gives every copy its own bias; otherwise they share the first one's.
    """

    def __init__(self, linear: nn.Linear, owners: Tensor, parts: int, biases: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterList(linear.weight.detach().clone() for _ in range(parts))
        self.biases = nn.ParameterList(linear.bias.detach().clone() for _ in range(parts if biases else 1))
        self.owners, self.drawn = owners, 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[self.drawn], self.biases[self.drawn if len(self.biases) > 1 else 0])

    def mask(self) -> None:
        """Keep of every copy's gradient what it owns."""
        for part, weight in enumerate(self.weights):
            if weight.grad is not None:
                weight.grad *= self.owners == part

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The mean of the copies, and of their biases."""
        weight, bias = (torch.stack(list(held)).mean(0) for held in (self.weights, self.biases))
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer


class SplitBranch(nn.Module):
    """``x + scale * up(gelu(down(norm(x))))``, averaged over tokens, and a head on it."""

    def __init__(self, norm: nn.Module, down: nn.Module, up: nn.Module, head: nn.Module, scale: float = 0.1) -> None:
        super().__init__()
        self.norm, self.down, self.up, self.head, self.scale = norm, down, up, head, scale

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b classes
        branch = self.scale * self.up(F.gelu(self.down(self.norm(x))))
        logits: Tensor = self.head((x + branch).mean(1))
        return logits

    def draw(self, part: int) -> None:
        """Let every split projection compute with this part."""
        for module in (self.down, self.up):
            if isinstance(module, InParts | Copies):
                module.drawn = part


def sym_kl(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of both divergences, the target of each without a gradient, mean over the batch."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)

    def divergence(source: Tensor, target: Tensor) -> Tensor:  # KL(target || source)
        return (target.detach().exp() * (target.detach() - source)).sum(-1).mean()

    return (divergence(p, q) + divergence(q, p)) / 2


def two_pass_loss(model: SplitBranch, x: Tensor, y: Tensor, parts: Sequence[int]) -> Tensor:
    """Cross-entropy of the first pass and the divergence between two."""
    logits = []
    for part in parts:
        model.draw(part)
        logits.append(model(x))
    return F.cross_entropy(logits[0], y) + sym_kl(*logits)


class CopiedMLP(nn.Module):
    """The published form of a ``SparseMLP`` in random elements: full copies, drawn as the module itself would draw.

    ``sparse`` gives the weights, the parts and the clock; nothing of it is shared with what it leaves.
    """

    def __init__(self, sparse: SparseMLP) -> None:
        super().__init__()
        self.norm, self.clock = copy.deepcopy(sparse.norm), sparse.clock
        self.dropout, self.activation = sparse.dropout, ACTIVATIONS[sparse.activation]
        self.places = {}
        for name, linear, parts in (
            ("down", sparse.down, sparse.down_parts),
            ("up", sparse.up, sparse.up_parts),
        ):
            if parts is not None:
                self.places[name] = (parts.place, parts.rule.parts)
                self.add_module(name, Copies(linear, parts.owner_map(linear.weight), parts.rule.parts))
            else:
                self.add_module(name, copy.deepcopy(linear))

    def forward(self, x: Tensor) -> Tensor:
        drawn = {name: self.clock.choose(parts, place).tolist() for name, (place, parts) in self.places.items()}
        passes = x.chunk(self.clock.passes)
        return torch.cat(
            [self._pass(part, {n: d[number] for n, d in drawn.items()}) for number, part in enumerate(passes)]
        )

    def _pass(self, x: Tensor, drawn: dict[str, int]) -> Tensor:
        for name, part in drawn.items():
            self.get_submodule(name).drawn = part  # type: ignore[assignment]
        x = x if self.norm is None else self.norm(x)
        low = F.dropout(self.activation(self.down(x)), self.dropout, self.training)
        y: Tensor = self.up(low)
        return y


def copied(model: nn.Module) -> list[CopiedMLP]:
    """Put copies in the place of every ``SparseMLP`` of a model; returns them."""
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseMLP):
                setattr(parent, name, CopiedMLP(child))
                found.append(getattr(parent, name))
    return found
