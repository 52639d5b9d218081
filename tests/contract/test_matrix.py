"""Every method on every family keeps every promise, or the declared exception shows."""

from __future__ import annotations

import pytest

from tests.contract.cells import Cell, cells, verify
from tests.contract.checks import CHECKS
from tests.contract.declared import DECLARED
from tests.contract.families import FAMILIES
from tests.contract.methods import variants

CELLS = [pytest.param(cell, id=cell.name, marks=[pytest.mark.slow] if cell.slow else []) for cell in cells()]


@pytest.mark.parametrize("cell", CELLS)
def test_cell(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> None:
    verify(cell, lambda: tmp_path_factory.mktemp("cell"))


def test_size_of_the_matrix() -> None:
    assert len(FAMILIES) >= 12
    assert len(variants()) >= 8
    assert len(CHECKS) >= 15


def test_every_declared_exception_is_met_by_a_cell() -> None:
    met = {cell.exception for cell in cells()}
    assert [line for line in DECLARED if line not in met] == []
