"""Codes in bytes: which of several layouts, and the arithmetic of their size.

A byte holds several digits of a base that need not be a power of two: five digits of base 3, say,
as 3^5 = 243. Bytes become digits by one lookup in a table of 256 rows, which onnxruntime does at
load several times as fast as it shifts and masks. A code of more levels than a base is a number of
two digits or three, each in bytes of its own: of 8 levels, one of base 4 and one of base 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import numpy as np

DIGITS_IN_A_BYTE = {2: 8, 3: 5, 4: 4, 16: 2, 256: 1}
"""By base."""

LEVELS_MAXIMUM = 256


@dataclass(frozen=True)
class Field:
    """Digits of one base and place, in bytes.

    Attributes:
        base: a digit is less.
        place: what a digit counts for in the code.
    """

    base: int
    place: int

    @property
    def digits(self) -> int:
        """In a byte."""
        return DIGITS_IN_A_BYTE[self.base]

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """The bytes that hold this digit of every code.

        Args:
            codes: uint8 of any shape.

        Returns:
            uint8 of shape [bytes]; the digits after the last code are 0.
        """
        digits = codes.reshape(-1) // np.uint8(self.place) if self.place > 1 else codes.reshape(-1)
        if self.base < LEVELS_MAXIMUM:
            digits = digits % np.uint8(self.base)
        missing = -digits.size % self.digits
        rows = np.pad(digits, (0, missing)).reshape(-1, self.digits)
        weights = self.base ** np.arange(self.digits)
        return np.asarray(rows @ weights.astype(np.uint8), np.uint8)

    def table(self) -> np.ndarray:
        """The digits of every byte, times their place: uint8 of shape [256 or fewer, digits]."""
        powers = self.base ** np.arange(self.digits)
        numbers = np.arange(self.base**self.digits)[:, np.newaxis]
        return np.asarray(numbers // powers % self.base * self.place, np.uint8)

    def stored_bytes(self, count: int) -> int:
        """What the digits of so many codes take."""
        return -(-count // self.digits)


@cache
def fields_of(levels: int) -> tuple[Field, ...]:
    """The fields of codes below a number of levels: the fewest bytes, then the fewest fields.

    Raises:
        ValueError: there are fewer than 1 or more than 256 levels.
    """
    if not 1 <= levels <= LEVELS_MAXIMUM:
        raise ValueError(f"codes have from 1 to {LEVELS_MAXIMUM} levels, not {levels}")
    enough = [
        bases
        for count in (1, 2, 3)
        for bases in combinations_with_replacement(sorted(DIGITS_IN_A_BYTE, reverse=True), count)
        if levels <= math.prod(bases) <= LEVELS_MAXIMUM
    ]
    best = min(enough, key=lambda bases: (bits_of(bases), len(bases)))
    places = np.cumprod([1, *best[:-1]])
    return tuple(Field(base, int(place)) for base, place in zip(best, places, strict=True))


def bits_of(bases: Sequence[int]) -> float:
    """Bits that a code of these digits takes."""
    return sum(8 / DIGITS_IN_A_BYTE[base] for base in bases)


def bits_per_code(levels: int) -> float:
    """Bits that a code of so many levels takes."""
    return bits_of([field.base for field in fields_of(levels)])


def unpack(fields: Sequence[Field], packed: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The first codes that bytes hold, uint8 of shape [count].

    Args:
        fields: of the codes.
        packed: the bytes of each field, uint8 of shape [bytes].
        count: of codes.
    """
    digits = (
        f.table()[stored].reshape(-1)[:count] for f, stored in zip(fields, packed, strict=True)
    )
    return np.asarray(sum(digits, np.zeros(count, np.uint8)), np.uint8)
