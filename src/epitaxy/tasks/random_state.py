"""The state of every random generator a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states as tensors, and what is left of them as plain data."""
    python = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "python": torch.tensor(python[1], dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    facts = {
        "numpy": {"pos": int(numpy["state"]["pos"]), "has_gauss": int(numpy["has_gauss"]), "gauss": numpy["gauss"]},
        "python": {"version": python[0], "gauss": python[2]},
    }
    return tensors, facts


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
    """Set every generator to a captured state."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    elif device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type])
    numpy = facts["numpy"]
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    random.setstate((facts["python"]["version"], tuple(tensors["python"].tolist()), facts["python"]["gauss"]))
