"""Adapt the shipped vision transformer to pictures of classes it has not seen; save, load and merge the adapter."""

from __future__ import annotations

import tempfile

import torch
from torch.nn.functional import cross_entropy

import epitaxy
from epitaxy.data.splits import DataSpec, load_splits
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    data = load_splits(DataSpec("builtin:fashion-unseen"))
    base = open_classifier("reference-vit", labels=data.classes)
    task = Classification(base, data.classes)

    adapter = epitaxy.attach(base.model, epitaxy.LoRA(rank=8) + epitaxy.Head(), name="clothes")
    print(epitaxy.explain(base.model))
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    order = torch.randperm(len(data.train))
    for step in range(steps):
        rows = [data.train[int(number)] for number in order[torch.arange(step * 16, step * 16 + 16) % len(order)]]
        batch = task.batch(rows)
        loss = cross_entropy(base.model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    accuracy = task.evaluate(base.model, data.test, batch_size=64).accuracy
    with tempfile.TemporaryDirectory() as folder:
        epitaxy.save(base.model, folder, name="clothes")
        print(epitaxy.inspect(folder))
        epitaxy.detach(base.model)
        epitaxy.load(base.model, folder)
    print(epitaxy.merge(base.model))
    merged = task.evaluate(base.model, data.test, batch_size=64).accuracy
    print(f"test accuracy {accuracy:.3f}; after loading and merging {merged:.3f}")


if __name__ == "__main__":
    main()
