"""The optimiser of a run: AdamW, in the form that the config and the parameters ask for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from epitaxy.methods.partition import split_parameters
from epitaxy.train.config import TrainConfig
from epitaxy.train.lazy_adam import LazyAdamW, Split
from epitaxy.train.trainable import Trainable


def optimizer_of(model: nn.Module, trainable: Trainable, config: TrainConfig) -> torch.optim.AdamW:
    """Torch's own AdamW, or where parameters of ``trainable`` are in parts one that knows which were drawn."""
    groups = trainable.groups(config.weight_decay, config.decay)
    learning_rate, betas, epsilon = config.learning_rate, config.betas, config.epsilon
    trained = set(trainable.parameters.values())

    def split() -> Iterator[Split]:
        return (entry for entry in split_parameters(model) if entry[1] in trained)

    published = config.optimiser == "hf_adamw"
    if published or any(True for _ in split()):
        return LazyAdamW(groups, split, learning_rate, betas, epsilon, idle=config.idle, published=published)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)
