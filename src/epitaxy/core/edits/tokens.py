"""Tokens: learned tokens put into a sequence and taken out again (soft prompts).

Encoders: the tokens enter before the first chosen block and leave after the last one.  With ``depth > 1`` they are
replaced by fresh ones before every later block (VPT-Deep, Jia et al. 2022, 2203.12119).  Causal language models: the
tokens enter at the inner decoder, so that masks, positions and the key-value cache are built for the longer sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit, cast, first_tensor, output_tensor, with_first, with_output
from epitaxy.core.errors import SiteError, UnsupportedError
from epitaxy.core.route import Route

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class Tokens(Edit):
    """``depth x tokens x width`` learned tokens; what moves them are the pieces below, which share them."""

    acts_after = False

    def __init__(self, tokens: int, width: int, depth: int = 1, spread: float = 0.02) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(depth, tokens, width) * spread)
        self.prefilling = True
        self.in_trunk = False
        self.masked = True
        self.blocks = range(0)

    @property
    def count(self) -> int:
        """Tokens in the sequence."""
        return self.tokens.shape[1]

    @property
    def depth(self) -> int:
        """Blocks that have tokens of their own."""
        return self.tokens.shape[0]

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        anatomy = site.anatomy
        if anatomy.token_obstacle is not None:
            raise UnsupportedError(f"{anatomy.family} takes no extra tokens: {anatomy.token_obstacle}")
        paths = [spot.path for spot in anatomy.spots("block")]
        if site.path not in paths or site.last_path not in paths:
            raise SiteError(f"tokens enter and leave at blocks, {site.path!r} is none")
        first, last = paths.index(site.path), paths.index(site.last_path)
        self.blocks = range(first, last + 1)
        if len(self.blocks) != site.count:
            raise SiteError(f"prompts take blocks in a row, not {site.count} of the blocks {first} to {last}")
        self.in_trunk, self.masked = anatomy.causal, anatomy.masked
        yield site.path, self
        for number, path in enumerate(paths[first + 1 : last + 1], start=1):
            if number < self.depth or not anatomy.causal:
                yield path, _piece(Renew, self, number)
        if anatomy.causal:
            if first or last != len(paths) - 1:
                raise UnsupportedError(f"prompts of {anatomy.family}, a causal language model, span all its blocks")
            assert anatomy.trunk is not None
            yield anatomy.trunk, _piece(TrunkTokens, self, 0)
            return
        yield site.path, _piece(Enter, self, 0)
        for spot in anatomy.roles.get("attention", ()):
            if "core" in spot.parts and spot.layer is not None and first <= spot.layer <= last:
                yield spot.parts["core"], _piece(KeyMask, self, 0)
        yield site.last_path, _piece(Strip, self, 0)


class _Piece(Edit):
    """A part of ``Tokens`` on another module; ``owner`` holds the tokens and is not registered a second time."""

    rowwise = False
    acts_after = False
    owner: Tokens
    index: int


def _piece(kind: type[_Piece], owner: Tokens, index: int) -> _Piece:
    piece = kind()
    piece.__dict__["owner"] = owner
    piece.__dict__["index"] = index
    return piece


class Enter(_Piece):
    """Before the first block of an encoder: put the tokens in front of the sequence."""

    acts_before = True

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        x = first_tensor(call)
        edits = owners(group)
        if visible(edits, route, x.shape[0], x.device) is not None and not _masks_reach(host, edits):
            raise UnsupportedError(
                "rows with different numbers of prompt tokens need an attention mask, which this model cannot take"
            )
        tokens = gather(edits, route, 0, x.shape[0], x)
        return _widen_mask(with_first(call, torch.cat([tokens, x], dim=1)), tokens.shape[1])


class Renew(_Piece):
    """Before a later block: widen its mask, and with deep prompts replace the tokens by this block's own."""

    acts_before = True

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        edits, some = owners(group), next(iter(group.values()))
        assert isinstance(some, _Piece)
        if not some.owner.prefilling:
            return call
        count = _total(edits, route)
        if any(some.index < edit.depth for edit in edits.values()):
            x = first_tensor(call)
            tokens = gather(edits, route, some.index, x.shape[0], x, carried=x[:, :count])
            call = with_first(call, torch.cat([tokens, x[:, count:]], dim=1))
        return call if some.owner.in_trunk else _widen_mask(call, count)


class Strip(_Piece):
    """After the last block: take the tokens out."""

    acts_after = True

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        return with_output(output, output_tensor(output)[:, _total(owners(group), route) :])


class KeyMask(_Piece):
    """On an attention module: hides the padding tokens of routed rows that have fewer tokens than others."""

    acts_before = False

    @classmethod
    def seen(cls, group: Mapping[int, Edit], route: Route, batch: int, device: torch.device) -> Tensor | None:
        """Which of the leading tokens each row may see, ``b tokens``, or None when every row sees all."""
        return visible(owners(group), route, batch, device)


class TrunkTokens(_Piece):
    """On the inner decoder of a causal language model: tokens enter with the embeddings and leave at the end."""

    acts_before = True
    acts_after = True

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        args, kwargs = call
        if len(args) > 1:
            raise UnsupportedError("prompts need the decoder to be called with keyword arguments")
        kwargs = {**kwargs, **({"input_ids": args[0]} if args else {})}
        edits = owners(group)
        past = kwargs.get("past_key_values")
        prefilling = past is None or past.get_seq_length() == 0
        for edit in edits.values():
            edit.prefilling = prefilling
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = host.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        tokens = gather(edits, route, 0, embeds.shape[0], embeds)
        keep = visible(edits, route, embeds.shape[0], embeds.device)
        count = tokens.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedError("prompts on a causal language model take a two-dimensional attention_mask")
        if keep is not None and mask is None:
            length = embeds.shape[1] + (0 if prefilling else past.get_seq_length() - count)  # type: ignore[union-attr]
            mask = torch.ones(embeds.shape[0], length, dtype=torch.long, device=embeds.device)
        if mask is not None:
            seen = torch.ones_like(mask[:, :1]).expand(-1, count) if keep is None else keep.to(mask.dtype)
            kwargs["attention_mask"] = torch.cat([seen, mask], dim=1)
        kwargs["position_ids"] = _positions(kwargs.get("position_ids"), keep, count, embeds, past, prefilling)
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([tokens, embeds], dim=1) if prefilling else embeds
        return (), kwargs

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        edits = owners(group)
        if not next(iter(edits.values())).prefilling:
            return output
        count = _total(edits, route)
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, count:]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(state[:, count:] for state in output.hidden_states)
        return output


def _positions(
    given: Tensor | None, keep: Tensor | None, count: int, embeds: Tensor, past: Any, prefilling: bool
) -> Tensor | None:
    """Tokens take the first positions of a row and push its text up by as many as it really has."""
    if given is None and keep is None:
        return None  # counted by the model itself, cache included
    batch, length = embeds.shape[:2]
    if given is None:
        start = 0 if prefilling else past.get_seq_length() - count
        given = torch.arange(start, start + length, device=embeds.device).expand(batch, -1)
    if given.shape[0] != batch:
        given = given.expand(batch, -1)
    shift = torch.full((batch, 1), count, device=embeds.device) if keep is None else keep.long().sum(1, keepdim=True)
    text = given + shift
    if not prefilling:
        return text
    if keep is None:
        own = torch.arange(count, device=embeds.device).expand(batch, -1)
    else:
        own = (keep.long().cumsum(1) - 1).clamp_min(0)
    return torch.cat([own, text], dim=1)


def owners(group: Mapping[int, Edit]) -> dict[int, Tokens]:
    """The ``Tokens`` behind each edit of a group."""
    return {number: edit.owner for number, edit in group.items() if isinstance(edit, _Piece)}


def _total(edits: Mapping[int, Tokens], route: Route | None) -> int:
    counts = [edit.count for edit in edits.values()]
    return sum(counts) if route is None else max(counts)


def gather(
    edits: Mapping[int, Tokens],
    route: Route | None,
    layer: int,
    batch: int,
    like: Tensor,
    carried: Tensor | None = None,
) -> Tensor:
    """Tokens of every row, ``b tokens width``.

    Without a route all edits apply to every row, one after the other.  Rows with fewer tokens are padded at the left.
    Edits without tokens for this layer keep their part of ``carried``, the tokens as the last block left them.
    """
    if route is None:
        parts, start = [], 0
        for edit in edits.values():
            if layer < edit.depth:
                parts.append(cast(edit.tokens[layer], like).expand(batch, -1, -1))
            elif carried is not None:
                parts.append(carried[:, start : start + edit.count])
            start += edit.count
        return torch.cat(parts, dim=1)
    index = route.expanded(batch, like.device)
    longest = max(edit.count for edit in edits.values())
    rows, renewed = [], []
    for number in range(len(route.names) + 1):
        routed = edits.get(number)
        fresh = routed is not None and layer < routed.depth
        own = cast(routed.tokens[layer], like) if routed is not None and fresh else like.new_zeros(0, like.shape[-1])
        rows.append(F.pad(own, (0, 0, longest - own.shape[0], 0)))
        renewed.append(fresh)
    tokens = torch.stack(rows)[index]
    if carried is not None and not all(renewed):
        tokens = torch.where(torch.tensor(renewed, device=like.device)[index][:, None, None], tokens, carried)
    return tokens


def visible(edits: Mapping[int, Tokens], route: Route | None, batch: int, device: torch.device) -> Tensor | None:
    """Which of the leading tokens of each row are real, ``b tokens``; None when all are."""
    if route is None:
        return None
    longest = max(edit.count for edit in edits.values())
    counts = [edits[number].count if number in edits else 0 for number in range(len(route.names) + 1)]
    if all(counts[number] == longest for number in route.numbers):
        return None
    real = [[position >= longest - count for position in range(longest)] for count in counts]
    return torch.tensor(real, device=device)[route.expanded(batch, device)]


def _masks_reach(host: nn.Module, edits: Mapping[int, Tokens]) -> bool:
    slot = host._modules["epitaxy"]
    return bool(slot.state.interface) and all(edit.masked for edit in edits.values())  # type: ignore[union-attr]


def _widen_mask(call: Arguments, count: int) -> Arguments:
    args, kwargs = call
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": widen(kwargs["attention_mask"], count)}
    if len(args) > 1 and isinstance(args[1], Tensor):
        return (args[0], widen(args[1], count), *args[2:]), kwargs
    return call


def widen(mask: Tensor | None, count: int) -> Tensor | None:
    """An encoder's mask for ``count`` more visible tokens at the start, in keys and, where it has them, queries."""
    if mask is None:
        return None
    visible = 1.0 if mask.dtype in (torch.bool, torch.long, torch.int) or mask.dim() == 2 else 0.0
    mask = F.pad(mask, (count, 0), value=visible)
    if mask.dim() == 4 and mask.shape[-2] > 1:
        mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], count, -1), mask], dim=-2)
    return mask
