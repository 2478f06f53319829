"""Conv nodes of few channels that take several columns of an image as the channels of one.

Where the channels lie last, an image of W columns and C channels is, byte for byte, one of W / P
columns and P * C channels. A Conv of stride s can read P = Q * s columns as one and make Q as one:

    y[Q * i + q] = sum over t of w[t] * x[P * i + s * q - pad + t]

so that tap t of the q-th output lies in column p of group g, where P * g + p = s * q - pad + t. All
other weights of the wider window are zero, and the sums are those of before.

onnxruntime's integer Conv copies each window, and most of its time goes there if channels are few.
With Q columns at a time it copies a Q-th of them, and fills its blocks of outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.statistics import Patches
from graphopt_passes.quantize.layers import Layer

COLUMNS = (2, 4, 8)
"""Of the output, that are tried as one."""


@dataclass(frozen=True)
class Image:
    """Sizes of what a Conv reads or makes, whatever the number of images."""

    channels: int
    rows: int
    columns: int

    def channels_last(self, together: int = 1) -> list[int]:
        """Its shape with the channels last and so many columns as one."""
        return [-1, self.rows, self.columns // together, self.channels * together]


def image_of(value: ir.Value) -> Image | None:
    """The sizes of a value that is a batch of images of known sizes; None for others."""
    dims = () if value.shape is None else value.shape.dims
    sizes = [d for d in dims[1:] if isinstance(d, int)]
    return Image(*sizes) if len(dims) == 4 and len(sizes) == 3 else None


@dataclass(frozen=True)
class Fold:
    """How the columns of a Conv become fewer.

    Attributes:
        columns: of the output that become one, Q above.
        patches: the windows of the Conv.
        source: what it reads.
        made: what it makes.
    """

    columns: int
    patches: Patches
    source: Image
    made: Image

    @property
    def _stride(self) -> int:
        return self.patches.strides[1]

    @property
    def _pads(self) -> list[tuple[int, int]]:
        return self.patches.padding((self.source.rows, self.source.columns))

    @property
    def read(self) -> int:
        """Columns of the input that become one, P above."""
        return self.columns * self._stride

    @property
    def taps(self) -> int:
        """Of the folded window."""
        return self.patches.kernel[0] * self._width

    @property
    def shape_read(self) -> list[int]:
        """What the folded Conv reads, with the channels last."""
        return self.source.channels_last(self.read)

    @property
    def shape_made(self) -> list[int]:
        """What the Conv was to make, with the channels last."""
        return self.made.channels_last()

    @property
    def channels_made(self) -> int:
        """What the folded Conv makes."""
        return self.made.channels * self.columns

    @property
    def is_possible(self) -> bool:
        """All columns fall into whole groups, and the folded windows reach to the last."""
        whole = not self.source.columns % self.read and not self.made.columns % self.columns
        return whole and self._after >= 0

    @property
    def _before(self) -> int:
        """Folded columns of zeros before the first."""
        return -(-self._pads[1][0] // self.read)

    @property
    def _after(self) -> int:
        """Folded columns of zeros after the last; negative if the windows end before it."""
        read = self.source.columns // self.read + self._before
        return self.made.columns // self.columns - 1 + self._width - read

    @property
    def _width(self) -> int:
        """Of the folded window."""
        pad = self._pads[1][0]
        last = self._stride * (self.columns - 1) - pad + self.patches.kernel[1] - 1
        return last // self.read + self._before + 1

    def weight(self, weight: np.ndarray) -> np.ndarray:
        """The weight of the folded Conv.

        Args:
            weight: of shape [outputs, inputs, rows, taps], of any type.

        Returns:
            Of shape [columns * outputs, read * inputs, rows, folded taps].
        """
        outputs, inputs, rows, taps = weight.shape
        first = self._before * self.read - self._pads[1][0]
        folded = np.zeros(
            (self.columns, outputs, self._width * self.read, inputs, rows), weight.dtype
        )
        for column in range(self.columns):
            start = first + self._stride * column
            folded[column, :, start : start + taps] = weight.transpose(0, 3, 1, 2)
        apart = folded.reshape(-1, self._width, self.read, inputs, rows).transpose(0, 2, 3, 4, 1)
        return np.ascontiguousarray(apart.reshape(len(apart), -1, rows, self._width))

    def attributes(self) -> list[ir.Attr]:
        """The attributes of the folded Conv."""
        (top, bottom), _ = self._pads
        return [
            ir.AttrInt64s("kernel_shape", [self.patches.kernel[0], self._width]),
            ir.AttrInt64s("strides", [self.patches.strides[0], 1]),
            ir.AttrInt64s("dilations", [self.patches.dilations[0], 1]),
            ir.AttrInt64s("pads", [top, self._before, bottom, self._after]),
        ]


def folds_of(layer: Layer) -> list[Fold]:
    """The ways in which the columns of a layer can become fewer."""
    patches = layer.patches()
    source, made = image_of(layer.source), image_of(layer.node.outputs[0])
    if patches is None or layer.group > 1 or source is None or made is None:
        return []
    if patches.dilations[1] != 1:
        return []
    folds = (Fold(columns, patches, source, made) for columns in COLUMNS)
    return [fold for fold in folds if fold.is_possible]
