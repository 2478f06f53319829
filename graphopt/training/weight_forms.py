"""The forms in which a graph stores a weight: which numbers there can be, and what is stored.

A weight is plain numbers, integers that a grid makes numbers of, or codes into a codebook, each
perhaps with zeros that stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.code_fields import Field

FLOATS = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}
"""Types of plain numbers."""


@dataclass(frozen=True)
class Operand:
    """What a layer takes its weight from.

    Attributes:
        value: the weight.
        reader: the layer.
        is_vector: it is a bias or a scale, rather than a matrix or a kernel.
    """

    value: ir.Value
    reader: ir.Node
    is_vector: bool


class StoredWeight(ABC):
    """Numbers of a graph that can learn.

    Attributes:
        operand: the whole weight, and whose it is.
        value: what is given to the interpreter: a constant, or what is looked up by codes.
        numbers: as they are stored: float32 of the shape of the value; integers where they are
            codes.
    """

    operand: Operand
    value: ir.Value
    numbers: Tensor

    @property
    def reader(self) -> ir.Node:
        """The layer that the weight belongs to."""
        return self.operand.reader

    @property
    def is_vector(self) -> bool:
        """A bias or a scale, rather than a matrix or a kernel."""
        return self.operand.is_vector

    @property
    def is_rounded(self) -> bool:
        """The numbers are few, so that what learns is rounded to them."""
        return False

    @abstractmethod
    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest numbers that can be stored: float32 of the same shape."""

    def cell(self) -> tuple[Tensor, Tensor]:
        """Bounds of what is rounded to the numbers that are stored: float32 of the same shape."""
        return self.numbers, self.numbers

    def around(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The two nearest numbers that can be stored, below and above: float32 of the same shape.

        Beyond the last one both are the last one.
        """
        return numbers, numbers

    @abstractmethod
    def fed(self, numbers: Tensor) -> Tensor:
        """What the interpreter takes for numbers that can be stored."""

    @abstractmethod
    def constants(self, numbers: Tensor) -> dict[ir.Value, np.ndarray]:
        """What is stored for numbers that can be: for each constant its array."""


@dataclass(frozen=True, eq=False)
class PlainNumbers(StoredWeight):
    """A constant of floating point. Zeros of a matrix stay zeros.

    Attributes:
        dtype: of the constant.
        kept: bool of its shape, False where a zero stays; None where none need stay.
    """

    operand: Operand
    value: ir.Value
    numbers: Tensor
    dtype: ir.DataType
    kept: Tensor | None

    def nearest(self, numbers: Tensor) -> Tensor:
        """Rounded to the type of the constant, and zero where it was."""
        rounded = numbers.to(FLOATS[self.dtype]).to(numbers.dtype)
        return rounded if self.kept is None else rounded * self.kept.to(rounded)

    def fed(self, numbers: Tensor) -> Tensor:
        """In the type of the constant."""
        return numbers.to(FLOATS[self.dtype])

    def constants(self, numbers: Tensor) -> dict[ir.Value, np.ndarray]:
        """The constant itself."""
        array = numbers.detach().cpu().numpy().astype(self.dtype.numpy())
        return {self.value: array}


@dataclass(frozen=True, eq=False)
class GridCodes(StoredWeight):
    """Integers that a grid makes numbers of: the grid stays, and the range of the codes.

    Attributes:
        dtype: of the constant.
        least: of the codes.
        most: of the codes.
        kept: bool of the shape of the numbers, False where a code of zero stays; None where none
            need stay.
        in_byte: how many codes lie in a byte, along the last axis.
    """

    operand: Operand
    value: ir.Value
    numbers: Tensor
    dtype: ir.DataType
    least: float
    most: float
    kept: Tensor | None
    in_byte: int = 1

    @property
    def is_rounded(self) -> bool:
        """Integers are."""
        return True

    def nearest(self, numbers: Tensor) -> Tensor:
        """Rounded half to even, within the range, and unmoved where a zero stays."""
        codes = numbers.round().clamp(self.least, self.most)
        return codes if self.kept is None else torch.where(self.kept, codes, self.numbers)

    def cell(self) -> tuple[Tensor, Tensor]:
        """Half a step to each side."""
        return self.numbers - 0.5, self.numbers + 0.5

    def around(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded down and up, within the range."""
        bounded = numbers.clamp(self.least, self.most)
        return bounded.floor(), bounded.ceil()

    def fed(self, numbers: Tensor) -> Tensor:
        """Integers as floats, so that gradients reach them."""
        return numbers

    def constants(self, numbers: Tensor) -> dict[ir.Value, np.ndarray]:
        """The constant itself."""
        codes = numbers.detach().cpu().numpy().astype(self.dtype.numpy())
        if self.in_byte > 1:
            digits = codes.reshape(*codes.shape[:-1], -1, self.in_byte)
            places = np.arange(0, 8, 8 // self.in_byte, dtype=np.uint8)
            codes = np.bitwise_or.reduce(digits << places, axis=-1)
        return {self.value: codes}


@dataclass(frozen=True, eq=False)
class CodebookNumbers(StoredWeight):
    """What a Gather looks up in a codebook: the codebook stays.

    Attributes:
        levels: the numbers in use, float32 of shape [groups, levels], ascending; infinite behind
            the last one.
        codes: int64 of the same shape: the code of each.
        fields: how codes lie in bytes, with the constant that holds the bytes of each.
        dtype: of the codebook.
        kept: bool of the shape of the value, False where a zero stays; None where none need stay.
    """

    operand: Operand
    value: ir.Value
    numbers: Tensor
    levels: Tensor
    codes: Tensor
    fields: tuple[tuple[ir.Value, Field], ...]
    dtype: ir.DataType
    kept: Tensor | None

    @property
    def is_rounded(self) -> bool:
        """Numbers of a codebook are."""
        return True

    @property
    def _middles(self) -> Tensor:
        """Between the levels, [groups, levels - 1]; between infinities there is none, infinite."""
        middles = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
        return middles.contiguous()

    def _rows(self, numbers: Tensor) -> Tensor:
        """Shape [groups, numbers in a group]."""
        return numbers.detach().reshape(len(self.levels), -1).contiguous()

    def _places(self, numbers: Tensor) -> Tensor:
        """Which level is nearest: int64 of shape [groups, numbers in a group]."""
        return torch.searchsorted(self._middles, self._rows(numbers))

    def cell(self) -> tuple[Tensor, Tensor]:
        """To the middles between the levels; behind the last ones without an end."""
        places, middles = self._places(self.numbers), self._middles
        endless = torch.full_like(self.levels[:, :1], torch.inf)
        lower = torch.cat((-endless, middles), 1).gather(1, places)
        upper = torch.cat((middles, endless), 1).gather(1, places)
        return lower.reshape(self.numbers.shape), upper.reshape(self.numbers.shape)

    def around(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The levels between which it lies."""
        last = self.levels.isfinite().sum(1, keepdim=True) - 1
        above = torch.searchsorted(self.levels, self._rows(numbers)).minimum(last)
        below = (above - 1).clamp_min(0)
        beyond = self._rows(numbers) > self.levels.gather(1, last)
        below = torch.where(beyond, last, below)
        found = (self.levels.gather(1, places) for places in (below, above))
        lower, upper = (levels.reshape(numbers.shape) for levels in found)
        return lower, upper

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest number in use of the codebook of the group."""
        found = self.levels.gather(1, self._places(numbers)).reshape(numbers.shape)
        return found if self.kept is None else torch.where(self.kept, found, self.numbers)

    def fed(self, numbers: Tensor) -> Tensor:
        """In the type of the codebook; of integers as floats, so that gradients reach them."""
        return numbers.to(FLOATS.get(self.dtype, torch.float32))

    def constants(self, numbers: Tensor) -> dict[ir.Value, np.ndarray]:
        """The bytes of each field."""
        codes = self.codes.gather(1, self._places(numbers)).reshape(-1).cpu().numpy()
        return {value: field.pack(codes.astype(np.uint8)) for value, field in self.fields}


def forms_of(weights: Sequence[StoredWeight]) -> list[str]:
    """In which form each is stored, in words."""
    return [_form(weight) for weight in weights]


def _form(weight: StoredWeight) -> str:
    if isinstance(weight, CodebookNumbers):
        return "codebook"
    if isinstance(weight, GridCodes):
        return "integers on a grid"
    is_pruned = isinstance(weight, PlainNumbers) and weight.kept is not None
    return "pruned" if is_pruned else "plain"
