"""Settings of all tests: no network, no more threads than the workers leave, asserts explained in shared modules."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("same examples in every run", derandomize=True, deadline=None)
settings.load_profile("same examples in every run")

pytest.register_assert_rewrite("tests.contract.checks", "tests.contract.cells")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tiny models on many workers: one thread each is fastest, and sums come out the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests do not depend on the order they run in."""
    torch.manual_seed(0)
