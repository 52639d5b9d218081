"""Tiny random models of each kind, saved as anybody's models are: weights, config and processor in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

WORDS = ["good", "bad", "fine", "poor", "very", "film", "book", "number", "train", "val", "test"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _named(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}


def save_vit(path: Path, labels: Sequence[str] = ("one", "two"), headless: bool = False) -> Path:
    """A ViT of 16 x 16 pictures; ``headless`` saves the trunk alone."""
    config = ViTConfig(**SIZES, image_size=16, patch_size=8, **_named(labels))
    torch.manual_seed(1)
    model = ViTModel(config, add_pooling_layer=False) if headless else ViTForImageClassification(config)
    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def save_ast(path: Path, labels: Sequence[str] = ("one", "two")) -> Path:
    """An audio spectrogram transformer of short sounds."""
    config = ASTConfig(
        **SIZES, max_length=32, num_mel_bins=16, patch_size=8, time_stride=8, frequency_stride=8, **_named(labels)
    )
    torch.manual_seed(1)
    ASTForAudioClassification(config).save_pretrained(path)
    ASTFeatureExtractor(max_length=32, num_mel_bins=16).save_pretrained(path)
    return path


def save_wav2vec2(path: Path, labels: Sequence[str] = ("one", "two")) -> Path:
    """A Wav2Vec2 that reads raw sound."""
    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        mask_time_prob=0.3,
        mask_time_length=2,
        **_named(labels),
    )
    torch.manual_seed(1)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(path)
    return path


def tokenizer(padding: bool = True) -> Any:
    """Words to numbers, unknown ones included."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = {"pad_token": "[PAD]"} if padding else {"eos_token": "test"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", **extra)


def save_bert(path: Path, labels: Sequence[str] = ("one", "two")) -> Path:
    """A BERT over a few words."""
    config = BertConfig(
        **SIZES, vocab_size=len(WORDS) + 2, max_position_embeddings=24, pad_token_id=1, **_named(labels)
    )
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def save_gpt2(path: Path, labels: Sequence[str] = ("one", "two")) -> Path:
    """A GPT-2 over the same words, without a padding token."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=24, vocab_size=len(WORDS) + 2, **_named(labels))
    config.pad_token_id = None
    torch.manual_seed(1)
    GPT2ForSequenceClassification(config).save_pretrained(path)
    tokenizer(padding=False).save_pretrained(path)
    return path


SAVERS = {"vit": save_vit, "ast": save_ast, "wav2vec2": save_wav2vec2, "bert": save_bert, "gpt2": save_gpt2}
