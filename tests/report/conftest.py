"""Run directories made by hand: what a run leaves behind, without the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CLASSES = ["<script>alert(1)</script>", 'a "quoted" & odd one', "plain"]
CONFUSION = [[4, 1, 0], [2, 3, 0], [0, 0, 5]]
MakeRun = Callable[..., Path]


def _predictions(classes: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(t, p) for t, row in enumerate(CONFUSION) for p, count in enumerate(row) for _ in range(count)]
    return {
        "classes": classes,
        "confusion": CONFUSION,
        "names": [f"/somewhere/test/x/{number}.png" for number in range(len(pairs))],
        "targets": [target for target, _ in pairs],
        "predictions": [said for _, said in pairs],
        "confidences": [0.5 + 0.03 * number for number in range(len(pairs))],
        "samples": samples,
    }


def _result(accuracy: float, seed: int, method: str, parameters: int, classes: list[str]) -> dict[str, Any]:
    return {
        "name": "run",
        "method": method,
        "base": {"source": "reference-vit", "class": "ViT", "parameters": 2_000_000},
        "data": {
            "source": "pictures & sounds",
            "modality": "vision",
            "classes": classes,
            "counts": {"train": 40, "validation": 8, "test": 15},
            "skipped": [["broken.png", "the file is <empty>"]],
            "notes": ["validation was cut from train"],
        },
        "seed": seed,
        "test": {"accuracy": accuracy, "unweighted_accuracy": 0.78, "macro_f1": 0.79, "loss": 0.4},
        "validation": {"metric": "accuracy", "best": 0.75, "step": 20},
        "steps": 30,
        "stopped_early": True,
        "trained_parameters": parameters,
        "stored_parameters": parameters,
        "file": "adapter/adapter.safetensors",
        "file_bytes": 4 * parameters + 1000,
        "train_seconds": 61.0,
        "seconds": 75.2,
        "peak_memory": {"bytes": 512_000_000, "what": "resident, of the whole process"},
    }


def _log() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 40, 10):
        norms = {f"lora.attention.q.{layer}": 0.001 * step * (layer + 1) for layer in range(3)} | {"head.head.0": 0.07}
        line: dict[str, Any] = {"step": step, "loss": 2.0 / step, "lr": 0.001 * (40 - step)}
        lines.append(line | {"validation_accuracy": 0.02 * step, "validation_loss": 1 / step, "update_norms": norms})
    return lines


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run directory; ``finished=False`` leaves out what only a finished run has."""

    def make(
        name: str = "run",
        *,
        finished: bool = True,
        accuracy: float = 0.8,
        seed: int = 0,
        method: str = "lora (rank 8) + head",
        rank: int = 8,
        parameters: int = 12_345,
        classes: list[str] = CLASSES,
    ) -> Path:
        run = tmp_path / name
        (run / "samples").mkdir(parents=True)
        (run / "recipe.yaml").write_text(
            f"name: {name}\nout: {run}\nmethod:\n- method: lora\n  rank: {rank}\ndata:\n  source: <pictures>\n"
            f"train:\n  metric: accuracy\n  seed: {seed}\n"
        )
        environment = {
            "device": "CPU",
            "torch_threads": 2,
            "packages": {"torch": "2.13"},
            "command": ["epitaxy", "<x>"],
        }
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _log()))
        if finished:
            Image.new("RGB", (8, 8), (200, 30, 30)).save(run / "samples/000004.png")
            samples = [
                {"index": 4, "kind": "image", "file": "samples/000004.png"},
                {"index": 0, "kind": "image", "file": "samples/absent.png"},
                {"index": 5, "kind": "text", "text": "<b>bold claims</b>"},
                {"index": 6, "kind": "audio", "envelope": [0.1, 0.9, 0.4], "seconds": 1.5},
            ]
            (run / "predictions.json").write_text(json.dumps(_predictions(classes, samples)))
            result = _result(accuracy, seed, method, parameters, classes)
            (run / "result.json").write_text(json.dumps(result))
        return run

    return make
