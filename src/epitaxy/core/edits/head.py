"""Heads: a new output layer for an adapter.

``Replace`` reads what the base's head reads.  ``PooledHead`` pools the last hidden states itself and reads that: a
``Pool`` on the module that gives those states keeps their mean over the chosen tokens until the head runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit, cast, output_tensor, refuse_quantised
from epitaxy.core.edits.tap import Memo
from epitaxy.core.edits.token_rows import leading, special_tokens, total
from epitaxy.core.edits.tokens import Present, owners
from epitaxy.core.errors import SiteError, UnsupportedError
from epitaxy.core.kinds import is_linear, is_transposed_linear, linear_sizes
from epitaxy.core.layouts import LANGUAGE_HEADS
from epitaxy.core.route import Route

if TYPE_CHECKING:
    from epitaxy.core.sites import Site

Pooling = Literal["all", "cls", "patches", "prompts", "prompts+patches"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Replace(Edit):
    """A task head: the host's output is that of a new linear map, of any number of outputs."""

    exclusive = True

    def __init__(self, host: nn.Module, outputs: int | None = None) -> None:
        super().__init__()
        if not is_linear(host):
            raise SiteError(f"a head replaces a linear map, found {type(host).__name__}")
        size_in, size_out = linear_sizes(host)
        if outputs is None or outputs == size_out:
            self._copy(host)
            return
        self.linear = nn.Linear(size_in, outputs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def _copy(self, host: nn.Module) -> None:
        weight, bias = getattr(host, "weight", None), getattr(host, "bias", None)
        if not isinstance(weight, Tensor) or not torch.is_floating_point(weight):
            raise UnsupportedError(f"the quantised weight of {type(host).__name__} cannot be copied to a trained head")
        weight = weight.t() if is_transposed_linear(host) else weight
        kind = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=kind)
        self.linear.weight.copy_(weight)
        if bias is not None:
            self.linear.bias.copy_(bias)

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        bias = self.linear.bias
        return F.linear(x, cast(self.linear.weight, x), None if bias is None else cast(bias, x))

    def mergeable_into(self, host: nn.Module) -> None:
        refuse_quantised(host)
        if getattr(host, "bias", None) is None and self.linear.bias is not None:
            raise UnsupportedError(
                f"cannot merge a trained head into {type(host).__name__}: the base's output layer has no bias"
            )

    def merged(self, host: nn.Module) -> Mapping[str, Tensor]:
        weight = self.linear.weight.detach()
        new = {"weight": weight.t() if is_transposed_linear(host) else weight}
        if self.linear.bias is not None:
            new["bias"] = self.linear.bias.detach()
        return new


class PooledHead(Edit):
    """A task head on the mean of chosen tokens of the last hidden states, after the final norm.

    ``"all"``: every token, prompts included; ``"cls"``: the class token; ``"patches"``: neither special tokens nor
    prompts; ``"prompts"``: these alone; ``"prompts+patches"``: all but the special tokens.  With ``masked`` the
    positions that the model's own attention mask hides as padding do not count.  Where the base's head is called at
    every position, as by language models that classify, each position gets the same output.
    """

    exclusive = True

    def __init__(self, width: int, outputs: int, pool: Pooling, masked: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.pool, self.masked = pool, masked
        self.memo = Memo()
        self._members: Tensor | None = None

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        anatomy = site.anatomy
        if anatomy.last is None:
            raise SiteError(f"{anatomy.family} has no transformer blocks whose output a head could pool")
        if site.path.rpartition(".")[2] in LANGUAGE_HEADS:
            raise UnsupportedError(
                f"{site.path!r} of {anatomy.family} predicts a token at every position, a pooled head gives one output "
                "for the whole sequence; use a model for classification"
            )
        if self.pool == "cls" and not anatomy.special:
            raise SiteError(f"{anatomy.family} has no class token; pool='all' is the mean over its sequence")
        yield site.path, self
        blocks = anatomy.spots("block")
        padding = Memo()
        if self.masked and anatomy.last != blocks[-1].path:
            yield blocks[-1].path, PaddingTap(padding)
        yield anatomy.last, Pool(self, padding, anatomy.special)

    def rows(self, members: Tensor) -> None:
        self._members = members

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        members, self._members = self._members, None
        if self.memo.cut and torch.is_grad_enabled():
            raise UnsupportedError(
                "what a pooled head reads was computed without a graph while the head runs with one; checkpoint "
                "gradients with use_reentrant=False"
            )
        pooled = self.memo.take()
        if members is not None:
            pooled = pooled[members]
        logits = F.linear(pooled, cast(self.linear.weight, pooled), cast(self.linear.bias, pooled)).to(y.dtype)
        return logits if y.dim() == 2 else logits[:, None].expand(-1, y.shape[1], -1)

    def mergeable_into(self, host: nn.Module) -> None:
        raise UnsupportedError("a head that pools by itself does not read what the base's head reads")

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, masked={self.masked}"


class PaddingTap(Edit):
    """On the last block, where a norm follows it: keeps which positions its attention mask lets anyone see."""

    rowwise = False

    def __init__(self, memo: Memo) -> None:
        super().__init__()
        self.memo = memo

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        seen = _seen(call)
        for tap in group.values():
            assert isinstance(tap, PaddingTap)
            tap.memo.value = seen
        return output


class Pool(Edit):
    """On the module that gives the last hidden states: pools them for a ``PooledHead``; changes nothing."""

    rowwise = False

    def __init__(self, head: PooledHead, padding: Memo, special: int) -> None:
        super().__init__()
        self.memo, self.pool, self.masked = head.memo, head.pool, head.masked
        self.padding, self.special = padding, special

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        x = output_tensor(output)
        if x.dim() != 3:
            raise UnsupportedError(f"a head pools states of shape (batch, tokens, width), found {tuple(x.shape)}")
        present: Any = host._modules["epitaxy"]
        marks = present.whole(Present)
        prompts = {number: edit for number, edit in owners(marks[0]).items() if edit.prefilling} if marks else {}
        for number, edit in group.items():
            assert isinstance(edit, Pool)
            edit.memo.value = edit.pooled(x, call, prompts, route, number)
            edit.memo.cut = not torch.is_grad_enabled()
        return output

    def pooled(
        self, x: Tensor, call: Arguments, prompts: Mapping[int, Any], route: Route | None, number: int
    ) -> Tensor:
        """The mean over the chosen tokens, ``b t d -> b d``."""
        count = total(prompts, route) if prompts else 0
        if self.pool.startswith("prompts") and not (number in prompts if route is not None else count):
            raise UnsupportedError(
                f"pool={self.pool!r} found no prompts in the last hidden states; the adapter needs a Prompt up to the "
                "last block"
            )
        content = count + special_tokens(prompts, route, self.special)
        if self.pool == "cls":
            return x[:, count]
        seen = leading(prompts, route, x.shape[0], x.device) if prompts else None
        keep = self._real(x, call, seen)
        parts = {
            "all": [slice(None)],
            "patches": [slice(content, None)],
            "prompts": [slice(0, count)],
            "prompts+patches": [slice(0, count), slice(content, None)],
        }[self.pool]
        tokens = torch.cat([x[:, part] for part in parts], dim=1) if len(parts) > 1 else x[:, parts[0]]
        if keep is None:
            return tokens.mean(dim=1)
        kept = torch.cat([keep[:, part] for part in parts], dim=1)[:, :, None]
        return tokens.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1).clamp_min(1).to(x.dtype)

    def _real(self, x: Tensor, call: Arguments, seen: Tensor | None) -> Tensor | None:
        """Which positions hold something, ``b t``: no filler before short prompts, no padding; None when all do."""
        padding, self.padding.value = self.padding.value, None
        if self.masked and padding is None:
            padding = _seen(call)
        if padding is not None and padding.shape[-1] != x.shape[1]:
            padding = None  # no mask of these positions
        if seen is None:
            return padding
        rest = torch.ones(x.shape[0], x.shape[1] - seen.shape[1], dtype=torch.bool, device=x.device)
        seen = torch.cat([seen, rest], dim=1)
        return seen if padding is None else seen & padding


def _seen(call: Arguments) -> Tensor | None:
    """The positions that some query of a block sees, ``b t``, by the attention mask of the call; None without one."""
    args, kwargs = call
    others = [value for value in args[1:] if isinstance(value, Tensor) and value.dim() == 4]  # GPT-2: after the cache
    mask = kwargs.get("attention_mask", others[0] if others else args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    visible = mask.bool() if mask.dim() == 2 or mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible if mask.dim() == 2 else visible.any(dim=-2).any(dim=1)


__all__ = ["POOLINGS", "Pool", "PooledHead", "Pooling", "Replace"]
