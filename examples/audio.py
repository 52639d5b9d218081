"""Two adapters of one audio model in one batch: every row takes its own, in training and in inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ASTConfig, ASTForAudioClassification

import epitaxy


def spectrograms(count: int, axis: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright band, low or high (axis 2), or early or late (axis 1)."""
    pictures, labels = torch.randn(count, 64, 32), torch.randint(0, 2, (count,))
    for picture, label in zip(pictures, labels, strict=True):
        half = picture.shape[axis - 1] // 2
        picture.narrow(axis - 1, int(label) * half, half).add_(1.0)
    return pictures, labels


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=64,
        num_mel_bins=32,
        num_labels=2,
    )
    model = ASTForAudioClassification(config)  # in earnest: from_pretrained("MIT/ast-finetuned-audioset-10-10-0.4593")

    pitch = epitaxy.attach(model, epitaxy.Bottleneck(bottleneck=8) + epitaxy.Head(), name="pitch")
    time = epitaxy.attach(model, epitaxy.LoRA(rank=4) + epitaxy.Head(), name="time")
    optimiser = torch.optim.AdamW([*pitch.parameters(), *time.parameters()], lr=1e-2)
    rows = ["pitch"] * 16 + ["time"] * 16
    for _ in range(steps):
        (high, is_high), (late, is_late) = spectrograms(16, axis=2), spectrograms(16, axis=1)
        with epitaxy.route(model, rows):
            logits = model(input_values=torch.cat([high, late])).logits
        cross_entropy(logits, torch.cat([is_high, is_late])).backward()
        optimiser.step()
        optimiser.zero_grad()

    model.eval()
    (high, is_high), (late, is_late) = spectrograms(64, axis=2), spectrograms(64, axis=1)
    with torch.no_grad(), epitaxy.route(model, ["pitch"] * 64 + ["time"] * 64):
        guesses = model(input_values=torch.cat([high, late])).logits.argmax(-1)
    right = guesses == torch.cat([is_high, is_late])
    print(f"accuracy: pitch {right[:64].float().mean():.2f}, time {right[64:].float().mean():.2f}")


if __name__ == "__main__":
    main()
