"""Where things are in a model: roles (``attention.q``, ``mlp``, ``block``, ``norm`` ...) resolved from its structure.

This is the only place that knows model families.  A ``Layout`` describes one kind of transformer block by the
relative paths of its parts; ``describe`` finds every module that fits a layout.  Users describe an unusual model by
writing a ``Layout`` of their own and passing it to ``attach``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from epitaxy.core.errors import SiteError, nearest
from epitaxy.core.kinds import is_bypassed, is_linear, is_norm, uses_interface
from epitaxy.core.layouts import BLOCK_LAYOUTS, HEAD_PATHS, OUTER_ROLES, SPECIAL_TOKENS, UNREAD, Layout, Part

INTERFACE_PREFIX = "epitaxy_"  # of the names of our attention implementations
TYPE_ROLES = ("norm", "bias", "linear", "conv")


@dataclass(frozen=True)
class Spot:
    """One place that plays a role.

    ``path`` is the module whose output is the role's output; ``entry`` the module that receives the role's input,
    where that is another one (BERT's feed-forward enters at ``intermediate`` and leaves at ``output.dense``);
    ``stream`` the module that receives the residual stream on its way to a sub-layer: the norm before it, or, where the
    norm comes after the sum, the entry itself; None where it is not known or arranged in another way (windows);
    ``causal`` says of a block that its tokens see no later ones.
    """

    path: str
    layer: int | None = None
    entry: str | None = None
    heads: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    causal: bool = False
    stream: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """The roles of one model: role name -> its spots in the order of the network.

    ``trunk`` is the inner decoder of a ``causal`` language model; ``token_obstacle`` says why the model takes no
    extra tokens; ``masked`` tells whether all its attention layers take masks of ours; ``one_length`` that its blocks
    hand on a position bias that the first of them makes for one length of the sequence (WavLM).
    ``fixed_outputs`` names a buffer that the model adds to what its language head gives, one value for each output.
    ``last`` is the module whose output is the last hidden states: the norm after the blocks, or the last block where
    none follows.  ``special`` counts the tokens that lead the sequence (class, distillation, registers);
    ``distillation`` is the position of the distillation token among them.
    """

    family: str
    roles: Mapping[str, tuple[Spot, ...]]
    causal: bool = False
    trunk: str | None = None
    token_obstacle: str | None = None
    masked: bool = True
    one_length: bool = False
    fixed_outputs: str | None = None
    grid_obstacle: str | None = None
    last: str | None = None
    special: int = 0
    distillation: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys: dict[str, str] = {}
        for role, spots in self.roles.items():
            if role not in TYPE_ROLES:
                for number, spot in enumerate(spots):
                    keys.setdefault(spot.path, f"{role}.{number}")
        object.__setattr__(self, "keys", keys)

    def spots(self, role: str) -> tuple[Spot, ...]:
        """Return the spots of ``role``; raises ``SiteError`` naming the nearest roles when the model has none."""
        if role not in self.roles:
            raise SiteError(f"{self.family} has no role {role!r}{nearest(role, self.roles)}")
        return self.roles[role]

    def block_of(self, path: str) -> Spot | None:
        """The block that ``path`` is or lies in."""
        return next((spot for spot in self.roles.get("block", ()) if f"{path}.".startswith(f"{spot.path}.")), None)


OUTPUT_BIAS = "final_logits_bias"  # of BART and its like


def describe(model: nn.Module, layout: Layout | None = None) -> Anatomy:
    """Find the roles of ``model``; with ``layout`` given, blocks are recognised by it alone."""
    modules = base_modules(model)
    layouts = (layout,) if layout is not None else BLOCK_LAYOUTS
    roles: dict[str, list[Spot]] = {}
    layer = 0
    blocks: list[tuple[str, Layout]] = []
    for path, _ in _candidates(modules, layout):
        fitting = next((known for known in layouts if _fits(path, known, modules)), None)
        if fitting is None:
            continue
        blocks.append((path, fitting))
        _add_block(roles, path, layer, fitting, modules)
        layer += 1
    if layout is not None and not blocks:
        missing = sorted(layout.required())
        raise SiteError(f"no module of {type(model).__name__} has the parts {missing} of the layout {layout.name!r}")
    _add_outer(roles, modules, model)
    _add_by_type(roles, modules)
    stacks = _stacks(blocks)
    decodes = any(known.causal for _, known in blocks) or (len(stacks) == 1 and _looks_back(modules, *blocks[0]))
    trunk = _trunk(model, blocks[0][0], modules) if decodes else None
    obstacle = next((known.token_obstacle for _, known in blocks if known.token_obstacle), None)
    if not blocks:
        obstacle = "it has no transformer blocks that were recognised"
    grid = _grid_obstacle(modules, blocks)
    obstacle = obstacle or grid or _pair_obstacle(modules) or _stack_obstacle(stacks)
    cores = [modules[spot.parts["core"]] for spot in roles.get("attention", ()) if "core" in spot.parts]
    special, distillation = _special_tokens(modules, blocks)
    return Anatomy(
        _family(model),
        {role: tuple(spots) for role, spots in roles.items()},
        causal=trunk is not None,
        trunk=trunk,
        token_obstacle=obstacle,
        grid_obstacle=grid,
        masked=all(uses_interface(core) for core in cores),
        one_length=any(
            "position_bias" in inspect.signature(type(modules[path]).forward).parameters for path, _ in blocks
        ),
        fixed_outputs=next((OUTPUT_BIAS for module in modules.values() if OUTPUT_BIAS in module._buffers), None),
        last=_last(roles, modules, blocks, layout),
        special=special,
        distillation=distillation,
    )


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the base by path, in the order of ``named_modules``; adapters are not entered, however many."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found[path] = module
        inner = [(name, child) for name, child in module._modules.items() if child is not None and name != "epitaxy"]
        waiting.extend((f"{path}.{name}" if path else name, child) for name, child in reversed(inner))
    return found


def _candidates(modules: dict[str, nn.Module], layout: Layout | None) -> list[tuple[str, nn.Module]]:
    if layout is not None and layout.pattern is not None:
        return [(path, module) for path, module in modules.items() if re.fullmatch(layout.pattern, path)]
    containers = {path for path, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    return [(path, module) for path, module in modules.items() if path.rpartition(".")[0] in containers and path]


def _fits(block: str, layout: Layout, modules: dict[str, nn.Module]) -> bool:
    return all(f"{block}.{relative}" in modules for relative in layout.required())


def _add_block(
    roles: dict[str, list[Spot]], block: str, layer: int, layout: Layout, modules: dict[str, nn.Module]
) -> None:
    heads, causal = _heads(modules, block, layout), _is_causal(modules, block, layout)
    roles.setdefault("block", []).append(Spot(block, layer, heads=heads, causal=causal))
    for role, part in layout.parts.items():
        path = f"{block}.{part.exit}"
        entry = f"{block}.{part.entry}" if part.entry is not None else None
        if role.endswith(".core") or path not in modules or (entry is not None and entry not in modules):
            continue
        inner = _attention_parts(role, block, layout, modules) if role in ("attention", "cross_attention") else {}
        stream = _stream(role, block, layout, modules)
        roles.setdefault(role, []).append(Spot(path, layer, entry, heads, inner, stream=stream))


def _stream(role: str, block: str, layout: Layout, modules: dict[str, nn.Module]) -> str | None:
    """Path of the module that the residual stream enters on its way to a sub-layer."""
    norm = layout.parts.get(f"norm.{role}")
    if norm is None or f"{block}.{norm.exit}" not in modules:
        return None
    if role == "attention" and _in_windows(modules[block]):
        return None
    first = _norms_first(modules[block], layout)
    entry = layout.parts[role].entry or layout.parts[role].exit
    return None if first is None else f"{block}.{norm.exit if first else entry}"


def _norms_first(block: nn.Module, layout: Layout) -> bool | None:
    """Whether the norms of a block stand before its sub-layers; None where the block's class does not show it.

    Where models of both kinds share a structure, the order in which the block's code names its attention and the norm
    of its attention decides (OPT has a switch).
    """
    if layout.norms != "either":
        return layout.norms == "before"
    switch = getattr(block, "do_layer_norm_before", None)
    if isinstance(switch, bool):
        return switch
    code = getattr(inspect.unwrap(type(block).forward), "__code__", None)
    names = code.co_names if code is not None else ()
    attention, norm = (layout.parts[role].exit.partition(".")[0] for role in ("attention", "norm.attention"))
    return names.index(norm) < names.index(attention) if {attention, norm} <= set(names) else None


def _attention_parts(role: str, block: str, layout: Layout, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Paths of an attention layer's projections and of ``core``, the module that computes the softmax."""
    named = {"core": layout.parts.get(f"{role}.core", layout.parts[role])}
    for name in ("q", "k", "v", "qkv", "output"):
        if f"{role}.{name}" in layout.parts:
            named[name] = layout.parts[f"{role}.{name}"]
    paths = {name: f"{block}.{part.exit}" for name, part in named.items()}
    return {name: path for name, path in paths.items() if path in modules}


def _is_causal(modules: dict[str, nn.Module], block: str, layout: Layout) -> bool:
    """By the layout, or (decoders that share a layout with encoders) by what the attention module says of itself."""
    attention = layout.parts.get("attention")
    module = modules.get(f"{block}.{attention.exit}") if attention is not None else None
    return layout.causal or getattr(module, "is_causal", False) is True


def _heads(modules: dict[str, nn.Module], block: str, layout: Layout) -> int | None:
    if isinstance(layout.heads, int):
        return layout.heads
    for part in ("attention.core", "attention"):
        if part not in layout.parts:
            continue
        module = modules.get(f"{block}.{layout.parts[part].exit}")
        for name in ("num_heads", "num_attention_heads", "n_heads", "heads"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
        config = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            return heads
    return None


def _add_outer(roles: dict[str, list[Spot]], modules: dict[str, nn.Module], model: nn.Module) -> None:
    head = next((path for path in HEAD_PATHS if isinstance(modules.get(path), nn.Linear)), None)
    composite = head.rpartition(".")[0] if head else ""  # AST's has a norm, which is not the trunk's final one
    for role, patterns in OUTER_ROLES.items():
        taken = {spot.path for spots in roles.values() for spot in spots}
        for path in modules:
            if path in taken or (composite and path.startswith(composite + ".")):
                continue
            if role == "norm.final" and not _reads_all_tokens(path, modules):
                continue
            if any(re.fullmatch(pattern, path) for pattern in patterns):
                roles.setdefault(role, []).append(Spot(path))
    if head is not None:
        roles["head"] = [Spot(head)]
        return
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    for path, module in modules.items():
        if output is not None and module is output:
            roles["head"] = [Spot(path)]


def _reads_all_tokens(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module can be the norm of the last hidden states: CLIP's last norm sees its class token alone."""
    owner, _, name = path.rpartition(".")
    embeddings = modules.get(f"{owner}.embeddings" if owner else "embeddings")
    return is_norm(modules[path]) and not (name == "post_layernorm" and hasattr(embeddings, "class_embedding"))


def _add_by_type(roles: dict[str, list[Spot]], modules: dict[str, nn.Module]) -> None:
    """The roles that ask what a module *is*, not where: every norm, every bias, every linear map and convolution."""
    layers = {spot.path: spot.layer for spots in roles.values() for spot in spots}
    heads = {spot.path for spot in roles.get("head", ())}
    unread = UNREAD.get(type(modules[""]).__name__, ())
    for path, module in modules.items():
        if any(f"{path}.".startswith(f"{idle}.") for idle in unread):
            continue
        if is_bypassed(modules.get(path.rpartition(".")[0]), path.rpartition(".")[2]):
            continue
        layer = layers.get(path, _layer_of(path, roles))
        spot = Spot(path, layer)
        if is_norm(module):
            roles.setdefault("norm", []).append(spot)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and bias.dim() == 1 and path not in heads:
            roles.setdefault("bias", []).append(spot)
        if is_linear(module) and path not in heads:
            roles.setdefault("linear", []).append(spot)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            roles.setdefault("conv", []).append(spot)


def _layer_of(path: str, roles: dict[str, list[Spot]]) -> int | None:
    return next((spot.layer for spot in roles.get("block", ()) if path.startswith(spot.path + ".")), None)


def _looks_back(modules: dict[str, nn.Module], block: str, layout: Layout) -> bool:
    """Whether a block's attention is causal in a layout that encoders share (OPT has BART's)."""
    core = layout.parts.get("attention.core", layout.parts.get("attention"))
    return core is not None and getattr(modules[f"{block}.{core.exit}"], "is_causal", False) is True


def _trunk(model: nn.Module, block: str, modules: dict[str, nn.Module]) -> str | None:
    """Path of the innermost decoder that takes ``input_ids`` and returns hidden states; None where there is none."""
    trunk = "" if callable(getattr(model, "get_input_embeddings", None)) else None
    for path, module in modules.items():
        if path and callable(getattr(module, "get_input_embeddings", None)) and block.startswith(path + "."):
            trunk = path
    return trunk


def _last(
    roles: dict[str, list[Spot]],
    modules: dict[str, nn.Module],
    blocks: list[tuple[str, Layout]],
    described: Layout | None,
) -> str | None:
    """Path of the module that gives the last hidden states."""
    if not blocks:
        return None
    block, layout = blocks[-1]
    if described is not None:  # of a stranger's norms we cannot tell whether they come before the blocks or after
        if described.final_norm is not None and described.final_norm not in modules:
            raise SiteError(f"the layout {described.name!r} names a final norm {described.final_norm!r} that is absent")
        return described.final_norm or block
    if layout.name == "wav2vec2" and "StableLayerNorm" not in type(modules[block]).__name__:
        return block  # its encoder's norm comes before the blocks
    for spot in roles.get("norm.final", ()):
        parent = spot.path.rpartition(".")[0]
        if is_norm(modules[spot.path]) and (not parent or block.startswith(parent + ".")):
            return spot.path
    return block


def _special_tokens(modules: dict[str, nn.Module], blocks: list[tuple[str, Layout]]) -> tuple[int, int | None]:
    """How many tokens lead the sequence, and which of them is for distillation."""
    told = next((known.special_tokens for _, known in blocks if known.special_tokens is not None), None)
    if told is not None:
        return told, None
    for module in modules.values():
        found = [
            next((token for name in names if isinstance(token := getattr(module, name, None), nn.Parameter)), None)
            for names in SPECIAL_TOKENS
        ]
        if found[0] is None:
            continue
        counts = [0 if token is None else token.numel() // token.shape[-1] for token in found]
        return sum(counts), counts[0] if counts[1] else None
    return 0, None


def _grid_obstacle(modules: dict[str, nn.Module], blocks: list[tuple[str, Layout]]) -> str | None:
    for path, _ in blocks:
        parent = path.rpartition(".")[0].rpartition(".")[0]
        if _in_windows(modules[path]):
            return f"the blocks of {type(modules.get(parent, modules[path])).__name__} work on windows of a fixed grid"
    return None


def _pair_obstacle(modules: dict[str, nn.Module]) -> str | None:
    """BEiT's and EVA's positions; asked after the windows, whose positions are of one window."""
    if any(isinstance(getattr(module, "relative_position_bias_table", None), Tensor) for module in modules.values()):
        return "its attention has a learned bias for every pair of positions of its own grid"
    if any(isinstance(getattr(modules.get(path), "rope", None), nn.Module) for path in ("", "timm_model")):
        return "its attention turns every patch by its place on its own grid"
    return None


def _in_windows(block: nn.Module) -> bool:
    return "windows" in type(block).__name__.lower() or hasattr(block, "window_size")


def _stacks(blocks: list[tuple[str, Layout]]) -> list[str]:
    """The containers of the blocks; those of a layout with a pattern may stand anywhere."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path, known in blocks if known.pattern is None))


def _stack_obstacle(stacks: list[str]) -> str | None:
    if len(stacks) > 1:
        return f"its blocks form {len(stacks)} stacks, the first two are {stacks[0]!r} and {stacks[1]!r}"
    return None


def _family(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    return str(kind) if kind else type(model).__name__


__all__ = [
    "Anatomy",
    "Layout",
    "Part",
    "Spot",
    "base_modules",
    "describe",
]
