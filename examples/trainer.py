"""Two passes tied by a KL, in the Trainer of transformers: three lines beside an ordinary run."""

from __future__ import annotations

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import epitaxy
from epitaxy.data.splits import DataSpec, load_splits
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification
from epitaxy.train.with_trainer import WithObjective


class Mine(WithObjective, Trainer):
    objective = epitaxy.TwoPass()


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    data = load_splits(DataSpec("builtin:fashion-unseen"))
    base = open_classifier("reference-vit", labels=data.classes)
    task = Classification(base, data.classes)
    epitaxy.attach(base.model, epitaxy.Bottleneck(bottleneck=16, dropout=0.1) + epitaxy.Head(), name="clothes")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        Mine(model=base.model, args=arguments, train_dataset=data.train, data_collator=task.batch).train()  # type: ignore[arg-type]
    print(f"test accuracy {task.evaluate(base.model, data.test, batch_size=64).accuracy:.3f}")


if __name__ == "__main__":
    main()
