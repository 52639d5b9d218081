"""Measure the reference model on the shipped picture sets, none of whose classes it was trained on.

Each set is judged by a linear probe and by the nearest neighbours on the frozen class token, next to a model of the
same shape with random weights.  Every seed draws its own three quarters of the training pictures, and its own random
weights.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import torch
from PIL import Image
from scripts.archives import SHIPPED
from scripts.probing import NEIGHBOURS, Split, judge, show
from scripts.reference_vit.assets import DEFAULT_CACHE
from scripts.reference_vit.model import build_model
from scripts.reference_vit.pictures import FASHION_CLASSES, HELD_OUT_FASHION, load_fashion
from scripts.reference_vit.train import DEFAULT_OUTPUT as MODEL
from torch import Tensor
from transformers import AutoImageProcessor, ViTForImageClassification

SETS = ("fashion-unseen", "emoji-unseen", "digits")


def prepare(pictures: list[Image.Image]) -> Tensor:
    """Resize and normalise as the shipped preprocessing file says."""
    processor = AutoImageProcessor.from_pretrained(MODEL)
    return processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]


def read_set(name: str) -> dict[str, Split]:
    """The three parts of a shipped picture set."""
    pictures: dict[str, list[Image.Image]] = {"train": [], "val": [], "test": []}
    classes: dict[str, list[str]] = {part: [] for part in pictures}
    with zipfile.ZipFile(SHIPPED / f"{name}.zip") as archive:
        for entry in archive.namelist():
            part, label, _ = entry.split("/")
            pictures[part].append(Image.open(io.BytesIO(archive.read(entry))))
            classes[part].append(label)
    order = {label: index for index, label in enumerate(sorted(set(classes["train"])))}
    return {
        part: Split(prepare(pictures[part]), torch.tensor([order[label] for label in classes[part]]))
        for part in pictures
    }


@torch.inference_mode()
def features(model: ViTForImageClassification, pixels: Tensor) -> Tensor:
    """The class token after the last normalisation."""
    model.eval()
    return torch.cat([model.vit(batch).last_hidden_state[:, 0] for batch in pixels.split(128)])


def look(model: ViTForImageClassification, parts: dict[str, Split]) -> dict[str, Split]:
    """The same parts with features in place of pixels."""
    return {part: Split(features(model, split.inputs), split.labels) for part, split in parts.items()}


@torch.inference_mode()
def seen_garment_accuracy(model: ViTForImageClassification, cache: Path) -> float:
    """The model's own classifier on garments it was trained on, every third of their test pictures."""
    pictures, labels = load_fashion(cache, "t10k")
    names = [FASHION_CLASSES[label] for label in labels.tolist()]
    rows = [row for row in range(0, len(names), 3) if names[row] not in HELD_OUT_FASHION]
    pixels = prepare([Image.fromarray(pictures[row]) for row in rows])
    chosen = torch.cat([model(batch).logits.argmax(1) for batch in pixels.split(128)]).tolist()
    labels_by_index = model.config.id2label
    right = sum(labels_by_index[index] == f"garment: {names[row]}" for index, row in zip(chosen, rows, strict=True))
    return right / len(rows)


def main() -> None:
    """Print the table of the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    trained = ViTForImageClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    labels = [trained.config.id2label[index] for index in range(trained.config.num_labels)]
    print(f"| {'set':14s} | {'model':7s} | linear probe % | {NEIGHBOURS} neighbours % |")
    print("|---|---|---|---|")
    for name in SETS:
        parts = read_set(name)
        for kind in ("trained", "random"):
            once = look(trained, parts) if kind == "trained" else None
            scores = [judge(once or look(build_model(labels, seed), parts), seed) for seed in range(arguments.seeds)]
            probes, neighbours = zip(*scores, strict=True)
            print(f"| {name:14s} | {kind:7s} | {show(list(probes))} | {show(list(neighbours))} |", flush=True)
    accuracy = seen_garment_accuracy(trained, arguments.cache)
    print(f"own classifier on the six garments of the pretraining, test pictures: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
