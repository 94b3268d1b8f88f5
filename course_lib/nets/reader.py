"""Classifiers that judge samples: they read an image back."""

from __future__ import annotations

from torch import Tensor, nn


class ConvReader(nn.Module):
    """Four convolution stages and two linear layers: (B, C, 16, 16) -> logits (B, classes); `features` are (B, width)."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 64):
        super().__init__()

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())

        self.body = nn.Sequential(
            stage(channels, width // 2, 1), stage(width // 2, width, 2), stage(width, width, 1), stage(width, width, 2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * 16, width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class MixingBlock(nn.Module):
    """x + pointwise(gelu(pointwise(norm(depthwise 5 x 5 (x))))), as in ConvNeXt (Liu et al. 2022, Fig. 4). Shape kept."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width),
            nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(4 * width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class MixingReader(nn.Module):
    """A second opinion of another architecture: depthwise blocks at 8 x 8 and 4 x 4, (B, C, 16, 16) -> (B, classes)."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 48):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1), MixingBlock(width), MixingBlock(width),
            nn.Conv2d(width, width, 2, stride=2), MixingBlock(width), MixingBlock(width), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(16 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
