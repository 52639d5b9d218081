"""Tokens: learned tokens put into a sequence and taken out again (soft prompts).

Encoders: the tokens enter before the first chosen block and leave after the last one.  With ``depth > 1`` they are
replaced by fresh ones before every later block (VPT-Deep, Jia et al. 2022, 2203.12119).  Causal language models: the
tokens enter at the inner decoder, so that masks, positions and the key-value cache are built for the longer sequence.

Tokens that span the last block of an encoder stay until after its final norm, where a pooled head may read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit, first_tensor, output_tensor, with_first, with_output
from epitaxy.core.edits.start import learned_rows
from epitaxy.core.edits.token_rows import fit_mask, gather, gone, hiding, leading, total, visible
from epitaxy.core.errors import SiteError, UnsupportedError
from epitaxy.core.route import Route

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class Tokens(Edit):
    """``depth x tokens x width`` learned tokens; what moves them are the pieces below, which share them.

    They start from a normal distribution of deviation ``spread``, or uniform within ``bound`` where that is given.
    With ``drop_distillation`` the distillation token leaves the sequence while they are in it; its place is then
    given to a copy of the class token, which the model's own pooling reads.
    """

    acts_after = False

    def __init__(
        self,
        tokens: int,
        width: int,
        depth: int = 1,
        spread: float = 0.02,
        bound: float | None = None,
        drop_distillation: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = learned_rows(depth, tokens, width, spread=spread, bound=bound)
        self.drop_distillation = drop_distillation
        self.dropped: int | None = None  # the distillation token's place in the model's own sequence
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
        if anatomy.one_length and site.count != len(paths):
            raise UnsupportedError(
                f"prompts of {anatomy.family} span all its blocks: the first one makes the position bias of all, for "
                "one length of the sequence; leave layers out"
            )
        self.in_trunk, self.masked = anatomy.causal, anatomy.masked
        if self.drop_distillation:
            if anatomy.distillation is None:
                raise SiteError(f"{anatomy.family} has no distillation token to drop")
            self.dropped = anatomy.distillation
        yield site.path, self
        for number, path in enumerate(paths[first + 1 : last + 1], start=1):
            if number < self.depth or not anatomy.causal:
                yield path, _piece(Renew, self, number)
        if anatomy.causal:
            if first or last != len(paths) - 1:
                raise UnsupportedError(f"prompts of {anatomy.family}, a causal language model, span all its blocks")
            assert anatomy.trunk is not None
            yield anatomy.trunk, _piece(TrunkTokens, self, 0)
            if anatomy.last is not None:
                yield anatomy.last, _piece(Present, self, 0)
            return
        yield site.path, _piece(Enter, self, 0)
        for spot in anatomy.roles.get("attention", ()):
            if "core" in spot.parts and spot.layer is not None and first <= spot.layer <= last:
                yield spot.parts["core"], _piece(KeyMask, self, 0)
        if last == len(paths) - 1 and anatomy.last is not None:
            yield anatomy.last, _piece(Present, self, 0)
            yield anatomy.last, _piece(Strip, self, 0)
        else:
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
        if leading(edits, route, x.shape[0], x.device) is not None and not _masks_reach(host, edits):
            raise UnsupportedError(
                "rows with different numbers of prompt tokens need an attention mask, which this model cannot take"
            )
        tokens = gather(edits, route, 0, x.shape[0], x)
        place = gone(edits, route)
        if place is not None:
            x = torch.cat([x[:, :place], x[:, place + 1 :]], dim=1)
        return fit_mask(with_first(call, torch.cat([tokens, x], dim=1)), tokens.shape[1], place)


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
        count = total(edits, route)
        if any(some.index < edit.depth for edit in edits.values()):
            x = first_tensor(call)
            tokens = gather(edits, route, some.index, x.shape[0], x, carried=x[:, :count])
            call = with_first(call, torch.cat([tokens, x[:, count:]], dim=1))
        return call if some.owner.in_trunk else fit_mask(call, count, gone(edits, route))


class Present(_Piece):
    """On the module that gives the last hidden states: tells a pooled head that the tokens are still in them."""


class Strip(_Piece):
    """After the last block, or the norm that follows it: take the tokens out."""

    acts_after = True
    late = True

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        edits = owners(group)
        x = output_tensor(output)[:, total(edits, route) :]
        place = gone(edits, route)
        if place is not None:
            x = torch.cat([x[:, :place], x[:, :1], x[:, place:]], dim=1)
        elif (rows := hiding(edits, route, x.shape[0], x.device)) is not None:
            place = next(edit.dropped for edit in edits.values() if edit.dropped is not None)
            instead = torch.where(rows[:, None, None], x[:, :1], x[:, place : place + 1])
            x = torch.cat([x[:, :place], instead, x[:, place + 1 :]], dim=1)
        return with_output(output, x)


class KeyMask(_Piece):
    """On an attention module: hides from routed rows the padding tokens, and a distillation token others still see."""

    acts_before = False

    @classmethod
    def seen(cls, group: Mapping[int, Edit], route: Route, batch: int, device: torch.device) -> Tensor | None:
        """Which of the leading tokens each row may see, ``b tokens``, or None when every row sees all."""
        return leading(owners(group), route, batch, device)


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
            _require_close(host, mask, keep, count)
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
        count = total(edits, route)
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


def _require_close(host: nn.Module, mask: Tensor, keep: Tensor | None, count: int) -> None:
    """Raise where padding between a row's tokens and its text would push the tokens out of a sliding window.

    Windows are counted in places of the sequence, padding included; the model itself pads before everything.
    """
    config = getattr(host, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(window, int) or mask.shape[1] + count <= window or (kinds and "sliding_attention" not in kinds):
        return
    apart = mask[:, 0] == 0
    if keep is not None:
        apart = apart & keep.any(dim=1)
    fault = (
        f"prompts on a model with a sliding window of {window} take padding at the right, found rows that are padded "
        f"at the left in a sequence of {mask.shape[1] + count}; pad at the right, or give rows of one length"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~apart.any(), fault)
    elif bool(apart.any()):
        raise UnsupportedError(fault)


def owners(group: Mapping[int, Edit]) -> dict[int, Tokens]:
    """The ``Tokens`` behind each edit of a group."""
    return {number: edit.owner for number, edit in group.items() if isinstance(edit, _Piece)}


def _masks_reach(host: nn.Module, edits: Mapping[int, Tokens]) -> bool:
    slot = host._modules["epitaxy"]
    return bool(slot.state.interface) and all(edit.masked for edit in edits.values())  # type: ignore[union-attr]
