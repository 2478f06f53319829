"""A small convolutional digit classifier; `python -m graphopt_models.digits_cnn OUT_DIR`."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from graphopt_models.digits import CLASSES
from graphopt_models.export import main
from graphopt_models.training import Classifier


class DigitsCnn(nn.Module):
    """Convolutions with batch norm: explicit padding, a residual and a depthwise block."""

    def __init__(self) -> None:
        """Build the layers with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d(1), *_conv_norm(1, 24, 3), nn.ReLU())
        self.residual = nn.Sequential(
            *_conv_norm(24, 24, 3, padding=1), nn.ReLU(), *_conv_norm(24, 24, 3, padding=1)
        )
        self.downsample = nn.Sequential(*_conv_norm(24, 48, 3, padding=1, stride=2), nn.ReLU())
        self.depthwise = nn.Sequential(*_conv_norm(48, 48, 3, padding=1, groups=48), nn.ReLU())
        self.pointwise = nn.Sequential(*_conv_norm(48, 64, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: float32 [batch, 1, 8, 8], brightness in [0, 1].

        Returns:
            Logits, float32 [batch, 10].
        """
        features = self.stem(image)
        features = (features + self.residual(features)).relu()
        features = self.pointwise(self.depthwise(self.downsample(features)))
        logits: Tensor = self.head(self.dropout(self.pool(features).flatten(1)))
        return logits


def _conv_norm(
    channels: int, filters: int, kernel: int, *, padding: int = 0, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Return a convolution and the batch norm after it, whose shift stands in for a bias."""
    convolution = nn.Conv2d(
        channels, filters, kernel, stride=stride, padding=padding, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(filters)


CLASSIFIER: Final = Classifier("digits_cnn", "image", DigitsCnn, epochs=30)

if __name__ == "__main__":
    main(CLASSIFIER)
