"""The same command line for sounds and for texts, on tiny models of both kinds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Epitaxy
from tests.data.makers import tone
from tests.report.page_parser import Page

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "bad", "awful", "the", "day", "was", "<i>"]


@pytest.fixture(scope="module")
def ear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny audio spectrogram transformer."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=16,
        max_length=32,
    )
    folder = tmp_path_factory.mktemp("ear") / "tiny-ast"
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of a dozen words."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reader") / "tiny-bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_sounds(epitaxy: Epitaxy, ear: Path, tmp_path: Path) -> None:
    sounds, run = tmp_path / "sounds", tmp_path / "run"
    for number in range(10):
        tone(sounds / "low" / f"{number}.wav", 300 + 5 * number)
        tone(sounds / "high" / f"{number}.wav", 3000 + 50 * number)
    outcome = epitaxy(
        *("train", "own/sounds", f"base={ear}", f"data.source={sounds}", f"out={run}"),
        *("train.epochs=6", "train.learning_rate=3e-2", "train.patience=null", "method.bottleneck.bottleneck=4"),
    )
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "result.json").read_text())
    assert result["data"]["modality"] == "audio"
    assert result["test"]["accuracy"] == 1.0
    page = Page(run / "report.html")
    assert page.faults == []
    assert any("Sound of 0.25 s: low, recognised" in attributes["aria-label"] for attributes in page.named("svg"))
    outcome = epitaxy("merge", ear, run, "--out", tmp_path / "merged")
    assert outcome.code == 1
    assert "bottleneck" in outcome.err.lower() or "branch" in outcome.err.lower()


def test_texts(epitaxy: Epitaxy, reader: Path, tmp_path: Path) -> None:
    table, run = tmp_path / "mails.csv", tmp_path / "run"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "mood"])
        for number in range(24):
            mood, words = ("happy", ("good", "fine")) if number % 2 else ("sad", ("bad", "awful"))
            writer.writerow([f"the day was {3 * (words[number % 4 // 2] + chr(32))}<i>{number}", mood])
    outcome = epitaxy(
        *("train", "own/texts", f"base={reader}", f"data.source={table}", f"out={run}", "data.text_column=body"),
        *("data.label_column=mood", "train.epochs=20", "train.batch=8", "train.evaluate_every=15"),
        *("train.learning_rate=3e-2", "train.patience=null"),
    )
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "result.json").read_text())
    assert result["data"]["modality"] == "text"
    assert result["test"]["accuracy"] == 1.0
    page = Page(run / "report.html")
    assert page.faults == []
    assert "the day was" in page.text
    assert "<i>" not in page.source
    assert len(page.named("blockquote")) == len(page.named("figure")) > 0
    outcome = epitaxy("export", run, "--to", "peft", "--out", tmp_path / "lora")
    assert outcome.code == 0, outcome.err
    assert "exact, every value equal" in outcome.out
