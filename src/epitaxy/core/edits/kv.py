"""KV: extra keys and values for an attention layer.

*Joint*: the extra keys enter the layer's own softmax (prefix tuning, Li & Liang 2021, 2101.00190).
*Decoupled*: a second softmax over the extra keys alone, its result added with a scale before the output projection
(IP-Adapter, Ye et al. 2023, 2308.06721; zero-gated, LLaMA-Adapter, Zhang et al. 2023, 2303.16199).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.anatomy import INTERFACE_PREFIX
from epitaxy.core.edits.edit import Arguments, Edit, cast, output_tensor, with_output
from epitaxy.core.edits.start import learned_rows
from epitaxy.core.edits.tap import Memo, Tap
from epitaxy.core.errors import SiteError, StateError, UnsupportedError
from epitaxy.core.kinds import is_bypassed, uses_interface
from epitaxy.core.route import Route
from epitaxy.core.sites import width_out

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class JointKV(Edit):
    """``tokens`` learned keys and values per layer, ``tokens x width`` each, seen by every query.

    On models of transformers they enter through its attention interface, after any rotary embedding; elsewhere they
    are put before the outputs of the key and value projections.
    """

    rowwise = False
    acts_after = False
    needs_attention_interface = True

    def __init__(
        self, tokens: int, key_width: int, value_width: int, spread: float = 0.02, bound: float | None = None
    ) -> None:
        super().__init__()
        self.keys = learned_rows(tokens, key_width, spread=spread, bound=bound)
        self.values = learned_rows(tokens, value_width, spread=spread, bound=bound)

    @classmethod
    def of(cls, site: Site, tokens: int, spread: float = 0.02, bound: float | None = None) -> JointKV:
        """Keys and values of the sizes this attention layer has."""
        width = projection_width(site, "k")
        return cls(tokens, width, projection_width(site, "v"), spread, bound)

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        if "core" not in site.part_paths:
            raise SiteError(f"{site.path!r} is not an attention layer: keys and values have no place there")
        self.acts_before = hasattr(site.parts["core"], "config")
        yield site.part_paths["core"], self
        if not uses_interface(site.parts["core"]):
            if type(site.parts["core"]).__module__.startswith("transformers."):
                raise UnsupportedError(
                    f"the attention layer {site.path!r} of {site.anatomy.family} computes its softmax itself, beside "
                    "the attention interface of transformers, and takes no extra keys; use a gated prefix"
                )
            if "qkv" in site.part_paths:
                raise UnsupportedError(
                    f"the attention layer {site.path!r} of {site.anatomy.family} makes queries, keys and values by one "
                    "matrix and takes no extra keys; use a gated prefix"
                )
            if not {"k", "v"} <= set(site.part_paths):
                raise SiteError(f"the attention layer {site.path!r} has no separate key and value projections")
            self.needs_attention_interface = self.acts_before = False
            yield site.part_paths["k"], _append(self, "keys")
            yield site.part_paths["v"], _append(self, "values")

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        current = str(getattr(host.config, "_attn_implementation", None))
        if not current.startswith(INTERFACE_PREFIX):
            raise StateError(
                f"the attention implementation was set to {current!r} after a prefix was switched on, which would "
                "leave it out; activate the adapter again"
            )
        return call

    def heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values split like the layer's own, ``heads tokens head_width``."""
        own = cast(self.keys, key).view(self.keys.shape[0], key.shape[1], -1).transpose(0, 1)
        return own, cast(self.values, value).view(self.values.shape[0], value.shape[1], -1).transpose(0, 1)


class Append(Edit):
    """Puts the keys (or values) of a ``JointKV`` before the output of a projection."""

    rowwise = False
    owner: JointKV
    which: str

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        y = output_tensor(output)
        batch = y.shape[0]
        extra = [cast(getattr(edit.owner, edit.which), y) for edit in group.values() if isinstance(edit, Append)]
        if route is None:
            rows = torch.cat(extra).expand(batch, -1, -1)
        else:
            if len({part.shape[0] for part in extra}) > 1 or -1 in route.numbers or len(group) < len(route.names):
                raise UnsupportedError(
                    "routed rows with different prefix lengths need an attention mask, which this model cannot take; "
                    "route rows of one prefix length, or use a gated prefix"
                )
            numbers = {number: position for position, number in enumerate(group)}
            index = torch.tensor([numbers[number] for number in range(len(route.names))], device=y.device)
            rows = torch.stack(extra)[index[route.expanded(batch, y.device)]]
        return with_output(output, torch.cat([rows, y], dim=1))


def _append(owner: JointKV, which: str) -> Append:
    edit = Append()
    edit.__dict__["owner"] = owner
    edit.__dict__["which"] = which
    return edit


class DecoupledKV(Edit):
    """``output + scale * gate * softmax(q k') v'`` with own keys and values, before the output projection.

    Either learned ``tokens`` (``tokens x width`` keys and values), or projections ``to_k`` and ``to_v`` of a context
    that is bound before the call (``bind``; ``b tokens context_width``), as for image prompts.  ``gated`` multiplies
    each head by ``tanh(gate)`` with the gate starting at zero: an identity start.
    """

    acts_before = True
    acts_after = False

    def __init__(
        self,
        heads: int,
        width: int,
        tokens: int | None = None,
        context_width: int | None = None,
        scale: float = 1.0,
        gated: bool = False,
        spread: float = 0.02,
        bound: float | None = None,
    ) -> None:
        super().__init__()
        if (tokens is None) == (context_width is None):
            raise SiteError("give either a number of tokens or the width of a context")
        self.attention_heads, self.scale = heads, float(scale)
        if tokens is not None:
            self.keys = learned_rows(tokens, width, spread=spread, bound=bound)
            self.values = learned_rows(tokens, width, spread=spread, bound=bound)
        else:
            assert context_width is not None
            self.to_k = nn.Linear(context_width, width, bias=False)
            self.to_v = nn.Linear(context_width, width, bias=False)
        self.learned = tokens is not None
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None
        self.memo = Memo()
        self.query_part = slice(None)
        self._context: Tensor | None = None
        self._members: Tensor | None = None

    def bind(self, context: Tensor | None) -> None:
        """The context of the next calls, ``b tokens context_width``; None adds nothing."""
        self._context = context

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        if "output" not in site.part_paths:
            raise SiteError(f"{site.path!r} is not an attention layer: it has no known output projection")
        if is_bypassed(site.module, "qkv"):
            raise UnsupportedError(
                f"the attention layer {site.path!r} of {site.anatomy.family} never calls its projection 'qkv', so its "
                "queries cannot be read"
            )
        if "qkv" in site.part_paths:
            self.query_part = slice(0, self.keys.shape[1] if self.learned else self.to_k.out_features)
        query = site.part_paths.get("q", site.part_paths.get("qkv"))
        if query is None:
            raise SiteError(f"the attention layer {site.path!r} has no known query projection")
        yield site.part_paths["output"], self
        yield query, Tap(self.memo, reads="output")

    def rows(self, members: Tensor) -> None:
        self._members = members

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        query = self.memo.take()[..., self.query_part]
        members, self._members = self._members, None
        if members is not None:
            query = query[members]
        if self.learned:
            keys = cast(self.keys, query).expand(query.shape[0], -1, -1)
            values = cast(self.values, query).expand(query.shape[0], -1, -1)
        else:
            if self._context is None:
                return x
            context = self._context if members is None else self._context[members]
            if context.shape[0] != query.shape[0]:
                context = context.repeat_interleave(query.shape[0] // context.shape[0], dim=0)
            keys = F.linear(cast(context, query), cast(self.to_k.weight, query))
            values = F.linear(cast(context, query), cast(self.to_v.weight, query))
        extra = F.scaled_dot_product_attention(
            self._split(query), self._split(keys), self._split(values)
        )  # b heads t d
        if self.gate is not None:
            extra = extra * cast(self.gate, extra).tanh()[None, :, None, None]
        extra = extra.transpose(1, 2).reshape(x.shape)
        return x + (extra * self.scale).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.attention_heads, x.shape[-1] // self.attention_heads).transpose(1, 2)


def projection_width(site: Site, name: str) -> int:
    """Output width of a projection of an attention site; a third of a fused one."""
    if name in site.parts and "qkv" not in site.parts:
        width = width_out(site.parts[name])
    elif "qkv" in site.parts:
        fused = width_out(site.parts["qkv"])
        width = None if fused is None else fused // 3
    else:
        width = None
    if width is None:
        raise SiteError(f"{site.path!r} is not an attention layer with a known {name} projection")
    return width
