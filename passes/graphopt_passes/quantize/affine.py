"""The affine map between numbers and 8-bit codes, as in QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt_passes.quantize.ranges import affine_parameters


@dataclass(frozen=True)
class Affine:
    """number = scale * (code - zero_point).

    Attributes:
        scale: positive.
        zero_point: the code of 0.
        low: the lowest code.
        high: the highest code.
    """

    scale: np.float32
    zero_point: int
    low: int = 0
    high: int = 255

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        """The codes of numbers, uint8 of the same shape."""
        codes = np.rint(numbers / self.scale) + self.zero_point
        return np.asarray(np.clip(codes, self.low, self.high), np.uint8)

    def rounded(self, numbers: np.ndarray) -> np.ndarray:
        """What the codes of numbers stand for, float32 of the same shape."""
        codes = np.rint(numbers / self.scale)
        codes += self.zero_point
        np.clip(codes, self.low, self.high, out=codes)
        codes -= self.zero_point
        codes *= self.scale
        return np.asarray(codes, np.float32)

    @property
    def range(self) -> tuple[float, float]:
        """The numbers of the lowest and the highest code."""
        scale = float(self.scale)
        return scale * (self.low - self.zero_point), scale * (self.high - self.zero_point)


def affine_of(low: float, high: float) -> Affine:
    """The map to uint8 codes that holds a range; see `affine_parameters`."""
    scale, zero_point = affine_parameters(low, high, np.uint8)
    return Affine(scale, zero_point)
