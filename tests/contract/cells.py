"""The cells of the matrix, and the verdict on one: the promise is kept, or the declared exception is real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from epitaxy import EpitaxyError
from tests.contract.checks import CHECKS, BaseError, Case, DifferenceError, assert_same_base, snapshot
from tests.contract.declared import Limit, declared
from tests.contract.families import FAMILIES, PADDED, Family
from tests.contract.methods import Variant, variants

FOR_PADDED = ("identity", "several", "route", "route_base", "checkpointing", "compiles")
COMPILED_ON_VIT = ("lora", "bottleneck_parallel", "mosa", "prompt_deep", "prefix", "prefix_gated", "lora_bitfit_head")
COMPILED_EVERYWHERE = "bottleneck_norm_prefix"
FIRST = (  # the others are variations of these
    "lora",
    "lora_conv",
    "bottleneck_parallel",
    "mosa",
    "dense_moa",
    "soft_moa",
    "prompt_deep",
    "prefix",
    "bitfit",
    "norm_tuning",
    "head_labels",
    "lora_bitfit_head",
)
FEW: dict[str, tuple[str, ...]] = {
    "sdxl": ("lora", "lora_conv", "prefix"),  # the largest; built like sd15
    "clip": ("lora", "bottleneck_parallel", "prompt_deep", "head_labels"),  # built like the other vision transformers
    "timm": ("lora", "bottleneck_parallel", "prompt_deep", "head_labels"),
}


@dataclass(frozen=True)
class Cell:
    """One method on one family under one check."""

    method: Variant
    family: Family
    check: str

    @property
    def name(self) -> str:
        """As shown in test ids."""
        return f"{self.check}-{self.family.name.replace(' ', '_')}-{self.method.name}"

    @property
    def exception(self) -> Limit | None:
        """What is declared for this cell."""
        return declared(self.method, self.family.kind, self.check)

    @property
    def slow(self) -> bool:
        """Whether the cell belongs to the second stage."""
        family, method = self.family.name, self.method.name
        if self.check != "compiles":
            return method not in FEW.get(family, FIRST) and self.check != "attaches"
        first = family == "vit" and method in COMPILED_ON_VIT
        first |= family in FAMILIES.keys() - FEW.keys() and method == COMPILED_EVERYWHERE
        return not first and (family, method) != ("llama", "prompt_deep")


def cells() -> Iterator[Cell]:
    """Every cell; where a method cannot be attached at all, that is its only one."""
    for family in (*FAMILIES.values(), *PADDED.values()):
        for method in variants().values():
            if declared(method, family.kind, "attaches") is not None:
                if family.like is None:
                    yield Cell(method, family, "attaches")
                continue
            for check in CHECKS if family.like is None else FOR_PADDED:
                yield Cell(method, family, check)


def verify(cell: Cell, scratch: Callable[[], Path]) -> str | None:
    """Run a cell; returns None where the promise is kept, else what the library says.

    ``scratch`` makes empty directories.
    Raises ``AssertionError`` where a promise is broken or a declared exception does not show.
    """
    case, line = Case.of(cell.method, cell.family, scratch), cell.exception
    if line is None:
        CHECKS[cell.check](case)
        return None
    before = snapshot(case.model)
    how, says = "works", ""
    try:
        CHECKS[cell.check](case)
    except EpitaxyError as error:
        how, says = "refused", str(error)
        assert_one_sentence(says)
        assert_same_base(case.model, before)
    except DifferenceError as error:
        how, says = "differs", str(error)
    except BaseError as error:
        how, says = "base", str(error)
    assert how == line.how, f"declared as {line.how!r} ({line.reason}), but found {how!r} {says}"
    assert line.says in says, f"refused for another reason than {line.says!r}: {says}"
    return says


def assert_one_sentence(message: str) -> None:
    """Not empty, one line, no second sentence, no class name of an inner error."""
    assert message
    assert "\n" not in message
    assert not message.endswith("."), message
    assert ". " not in message, message
