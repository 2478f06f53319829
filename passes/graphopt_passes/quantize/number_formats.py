"""Narrow number formats: from numbers to their bit patterns and back, one by one and in blocks.

An element is a format of single numbers: a float of a few bits, an integer, a table of levels. A
`Format` adds what a weight needs: the numbers of a block share a scale, so that

    number = codebook[code] * scale (* factor)

The shared scales follow the OCP Microscaling Formats (MX) specification v1.0 where a format has
the name of one of its formats. Everything is a few operations on whole arrays, whose memory is a
small multiple of the weight's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol

import ml_dtypes
import numpy as np

Specials = Literal["ieee", "nan", "none"]
Scale = Literal["float32", "e8m0", "e4m3"]

_USUAL = np.finfo(np.float32)


# ------------------------------------------------------------------ elements


class Element(Protocol):
    """A format of single numbers."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def codebook(self) -> np.ndarray:
        """The number of each code, float32 of shape [2^bits], all finite."""

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """The codes of the nearest numbers, uint8 up to 8 bits; what is too large saturates."""


@dataclass(frozen=True)
class FloatElement:
    """A binary float: a sign bit, then the exponent, then the mantissa, with subnormals.

    Attributes:
        name: as in messages.
        exponent_bits: of the exponent.
        mantissa_bits: without the implied first one.
        bias: the number of exponent field e and mantissa 0 is 2^(e - bias).
        specials: the patterns that are no finite number. "ieee" takes the highest exponent for
            infinity and NaN; "nan" takes only the highest pattern, for NaN; "none" takes none.
        is_scale: has neither sign nor zero, so that pattern 0 is 2^-bias, as in E8M0. What lies
            between it and pattern 1 becomes pattern 1, as in ml_dtypes.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "none"
    is_scale: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self._magnitude_bits + (not self.is_scale)

    @property
    def code_maximum(self) -> int:
        """The code of the largest finite number."""
        patterns = 1 << self._magnitude_bits
        taken = {"ieee": 1 << self.mantissa_bits, "nan": 1, "none": 0}
        return patterns - taken[self.specials] - 1

    @property
    def codebook(self) -> np.ndarray:
        """The number of each code, float32 of shape [2^bits].

        It is finite throughout: where a pattern is infinite or NaN, the largest number stands,
        with the pattern's sign.
        """
        return self._saturated(np.arange(1 << self.bits))

    def encode(self, numbers: np.ndarray, saturate: bool = True) -> np.ndarray:
        """The bit patterns of the nearest numbers, ties to even.

        A float64 is rounded once, not to float32 first.

        Args:
            numbers: float32 or float64, of any shape; others are taken as float32.
            saturate: what is too large, infinity included, becomes the largest number of its sign.
                Otherwise it becomes infinity or, in a format without, NaN; where there is neither,
                it saturates nevertheless.

        Returns:
            uint8, or uint16 for more than 8 bits, of the same shape. NaN becomes the quiet NaN of
            its sign; in E8M0, so do zero and all below.

        Raises:
            ValueError: a number is NaN, and the format has none.
        """
        numbers = numbers if numbers.dtype == np.float64 else numbers.astype(np.float32, copy=False)
        if self.specials == "none":
            _refuse_nan(numbers, self.name)
        undefined = np.isnan(numbers) | (self.is_scale & (numbers <= 0))
        # The largest float32 is beyond all these formats, and so as good as infinity.
        codes = self._rounded(np.fmin(np.abs(numbers), np.finfo(numbers.dtype).max))
        overflow = 0 if saturate or self.specials == "none" else 1
        codes = np.minimum(codes, self.code_maximum + overflow)
        codes = np.where(undefined, self._nan, codes)
        if not self.is_scale:
            codes |= np.signbit(numbers).astype(np.int32) << self._magnitude_bits
        return codes.astype(np.uint8 if self.bits <= 8 else np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of bit patterns, float32 of the same shape; exact, and bits above ignored."""
        numbers = self._saturated(codes)
        above = self._magnitudes(codes) - self.code_maximum
        special = np.where((above == 1) & (self.specials == "ieee"), np.inf, np.nan)
        return np.where(above > 0, np.copysign(special, numbers), numbers).astype(np.float32)

    @property
    def _magnitude_bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def _nan(self) -> int:
        quiet = 1 << (self.mantissa_bits - 1) if self.specials == "ieee" else 0
        return self.code_maximum + 1 + quiet

    def _rounded(self, magnitudes: np.ndarray) -> np.ndarray:
        """Codes without sign, as if the exponents went on beyond those that there are."""
        lowest = 1 - self.bias
        above = np.frexp(np.maximum(magnitudes, 2.0**lowest))[1] - 1 - lowest
        significands = np.rint(np.ldexp(magnitudes, self.mantissa_bits - lowest - above))
        # A significand that was rounded up to the next power of two carries into the exponent.
        return np.asarray(significands.astype(np.int32) + (above << self.mantissa_bits))

    def _magnitudes(self, codes: np.ndarray) -> np.ndarray:
        return np.asarray(codes, np.int32) & ((1 << self._magnitude_bits) - 1)

    def _saturated(self, codes: np.ndarray) -> np.ndarray:
        magnitudes = np.minimum(self._magnitudes(codes), self.code_maximum)
        # Subnormals have the exponent of field 1, without the implied one.
        fields = np.maximum(magnitudes >> self.mantissa_bits, 1)
        significands = (magnitudes - ((fields - 1) << self.mantissa_bits)).astype(np.float32)
        if self.is_scale:
            significands = np.where(magnitudes == 0, np.float32(0.5), significands)
        numbers = np.ldexp(significands, fields - self.bias - self.mantissa_bits)
        negative = np.asarray(codes, np.int32) >> self._magnitude_bits & (not self.is_scale)
        return np.asarray(np.where(negative, -numbers, numbers), np.float32)


def _refuse_nan(numbers: np.ndarray, what: str) -> None:
    if np.isnan(numbers).any():
        raise ValueError(f"{what} has no code for NaN")


@dataclass(frozen=True)
class IntegerElement:
    """A two's complement integer over a power of two; symmetric, so the lowest code is unused.

    Attributes:
        bits: of a code, 2 to 8.
        fraction_bits: how many of them are behind the binary point.
    """

    bits: int
    fraction_bits: int = 0

    @property
    def codebook(self) -> np.ndarray:
        """The number of each code, float32 of shape [2^bits]."""
        half = 1 << (self.bits - 1)
        integers = (np.arange(2 * half) ^ half) - half
        return np.asarray(np.ldexp(integers, -self.fraction_bits), np.float32)

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """The bit patterns of the nearest numbers, ties to even; NaN raises ValueError."""
        _refuse_nan(numbers, "an integer")
        high = (1 << (self.bits - 1)) - 1
        integers = np.clip(np.rint(np.ldexp(numbers, self.fraction_bits)), -high, high)
        return np.asarray(integers.astype(np.int8).view(np.uint8) & np.uint8(2 * high + 1))


@dataclass(frozen=True)
class TableElement:
    """Numbers that follow no formula; a code is the place of its number.

    Attributes:
        levels: ascending, a power of two of them, each a float32.
    """

    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Of a code."""
        return len(self.levels).bit_length() - 1

    @property
    def codebook(self) -> np.ndarray:
        """The number of each code, float32 of shape [2^bits]."""
        return np.array(self.levels, np.float32)

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """The places of the nearest levels, ties to the lower one; NaN raises ValueError."""
        _refuse_nan(numbers, "a table of levels")
        levels = np.array(self.levels)
        return np.asarray(np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers), np.uint8)


def _normal_levels() -> tuple[float, ...]:
    """The levels of NF4: equally probable steps of a normal distribution, over [-1, 1].

    QLoRA (arXiv 2305.14314, section 3 and appendix E) takes 8 quantiles for the negative numbers
    and 9 for the positive, each half with its zero, drops one of the zeros, and scales to a
    magnitude of 1. The outermost probability, which must be less than 1, lies half a step from 1 on
    the average of both halves: their steps are 1/15 and 1/16.
    """
    outermost = 1 - (1 / 15 + 1 / 16) / 4
    quantile = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        probabilities = np.linspace(0.5, outermost, count)[1:]
        return [quantile(p) / quantile(outermost) for p in probabilities]

    levels = [*(-level for level in reversed(half(8))), 0.0, *half(9)]
    return tuple(np.array(levels, np.float32).tolist())


FLOAT16 = FloatElement("float16", 5, 10, 15, "ieee")
BFLOAT16 = FloatElement("bfloat16", 8, 7, 127, "ieee")
FLOAT8_E4M3FN = FloatElement("float8e4m3fn", 4, 3, 7, "nan")
FLOAT8_E5M2 = FloatElement("float8e5m2", 5, 2, 15, "ieee")
FLOAT8_E8M0 = FloatElement("float8e8m0", 8, 0, 127, "nan", is_scale=True)
FLOAT6_E2M3 = FloatElement("float6e2m3", 2, 3, 1)
FLOAT6_E3M2 = FloatElement("float6e3m2", 3, 2, 3)
FLOAT4_E2M1 = FloatElement("float4e2m1", 2, 1, 1)
LOG2 = FloatElement("log2", 3, 0, 7)
"""Zero, and 2^-6 to 1 of both signs: a float without a mantissa."""
INT8 = IntegerElement(8)
MX_INT8 = IntegerElement(8, fraction_bits=6)
INT4 = IntegerElement(4)
INT2 = IntegerElement(2)
NF4 = TableElement(_normal_levels())


# ------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Format:
    """How a weight is stored: `dataclasses.replace` makes one with another block.

    Attributes:
        name: of the format.
        element: of the codes.
        scale: how a scale is found and stored. "float32": the largest magnitude of the block over
            the largest level. "e8m0": the largest power of two in the block over that in the
            levels (MX v1.0, section 6.3). "e4m3": as "float32", but as a share of one factor for
            the whole weight, which is the weight's largest magnitude over what level and scale can
            reach together (NVFP4).
        block: how many numbers share a scale; None for all along the axes.
    """

    name: str
    element: Element
    scale: Scale = "float32"
    block: int | None = None

    @property
    def bits(self) -> int:
        """Of a code, scales not counted."""
        return self.element.bits

    @property
    def codebook(self) -> np.ndarray:
        """The levels in the order of the codes, finite, float32 of shape [2^bits]."""
        return self.element.codebook


FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        Format("float8e4m3fn", FLOAT8_E4M3FN),
        Format("float8e5m2", FLOAT8_E5M2),
        Format("mxfp8", FLOAT8_E4M3FN, "e8m0", 32),
        Format("mxfp8e5m2", FLOAT8_E5M2, "e8m0", 32),
        Format("mxfp6", FLOAT6_E2M3, "e8m0", 32),
        Format("mxfp6e3m2", FLOAT6_E3M2, "e8m0", 32),
        Format("mxfp4", FLOAT4_E2M1, "e8m0", 32),
        Format("mxint8", MX_INT8, "e8m0", 32),
        Format("nvfp4", FLOAT4_E2M1, "e4m3", 16),
        Format("nf4", NF4, block=64),
        Format("log2", LOG2),
        Format("int8", INT8),
        Format("int4", INT4, block=32),
        Format("int2", INT2, block=32),
    )
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight in a number format: codebook[codes] * scales (* factor).

    Attributes:
        codes: uint8, of the shape of the weight.
        codebook: the levels in the order of the codes, float32 of shape [levels].
        scales: positive, float32, float8_e8m0fnu or float8_e4m3fn, of the weight's rank; each
            dimension divides the weight's, and a block of that many numbers shares a scale.
        factor: of all scales.
    """

    codes: np.ndarray
    codebook: np.ndarray
    scales: np.ndarray
    factor: np.float32 | None = None

    def numbers(self) -> np.ndarray:
        """The weight that they stand for, float32 of the shape of the codes."""
        numbers = self.codebook[self.codes].reshape(_split(self.codes.shape, self.scales.shape))
        numbers *= _spread(self.scales)
        if self.factor is not None:
            numbers *= self.factor
        return np.asarray(numbers.reshape(self.codes.shape))


def encode(weight: np.ndarray, format: Format, axis: int | Sequence[int]) -> Encoded:
    """A weight in a number format, each number at the nearest level of its block.

    Args:
        weight: finite as float32, and of one dimension or more.
        format: one of `FORMATS`, or made of one.
        axis: along which numbers share a scale: that of a layer's inputs or, to take the kernel of
            a convolution with it, the axes of inputs, rows and columns. Blocks fill them in that
            order: an axis not longer than (what is left of) the block lies within it as a whole; a
            longer one is cut into blocks, or where they do not divide it, into the largest powers
            of two below that do. An odd one then leaves each number its own scale.

    Returns:
        Codes never stand for infinity or NaN. A block of zeros has the codes of 0 and scale
        1 ("float32"), 2^-127 ("e8m0") or 2^-9 ("e4m3"). No "float32" scale is less than the
        smallest normal float32, so that nothing is divided by zero.

    Raises:
        ValueError: a number is not finite, or an axis is not one of the weight's.
    """
    with np.errstate(over="ignore"):
        numbers = np.asarray(weight, np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("weights must be finite as float32")
    blocks = numbers.reshape(_split(numbers.shape, _block_counts(numbers.shape, format, axis)))
    within = tuple(range(1, blocks.ndim, 2))
    scales, factor = _scales(np.abs(blocks).max(axis=within, initial=0), format)
    step = _spread(scales) if factor is None else _spread(scales) * factor
    codes = format.element.encode(blocks / step).reshape(numbers.shape)
    return Encoded(codes, format.codebook, scales, factor)


def _scales(largest: np.ndarray, format: Format) -> tuple[np.ndarray, np.float32 | None]:
    """The scale of each block as it is stored, and the factor of all.

    Args:
        largest: the largest magnitude in each block, float32.
        format: says how.
    """
    level = format.codebook.max()
    if format.scale == "e8m0":
        exponents = np.frexp(largest)[1] - np.frexp(level)[1]
        codes = np.clip(exponents + FLOAT8_E8M0.bias, 0, FLOAT8_E8M0.code_maximum)
        codes = np.where(largest > 0, codes, 0).astype(np.uint8)
        return codes.view(ml_dtypes.float8_e8m0fnu), None
    if format.scale == "float32":
        # Rounded up, the largest of all scales would take the largest level to infinity.
        return _positive(np.minimum(largest / level, np.nextafter(_USUAL.max / level, 0))), None
    shares = FLOAT8_E4M3FN.codebook
    factor = np.float32(_positive(largest.max(initial=0) / (level * shares.max())))
    share = np.maximum(largest / (np.float64(level) * factor), shares[1])
    return FLOAT8_E4M3FN.encode(share).view(ml_dtypes.float8_e4m3fn), factor


def _positive(scales: np.ndarray) -> np.ndarray:
    return np.where(scales > 0, np.maximum(scales, _USUAL.tiny), np.float32(1))


def _block_counts(shape: Sequence[int], format: Format, axis: int | Sequence[int]) -> list[int]:
    """Into how many blocks each axis is cut; see `encode`."""
    counts = list(shape)
    left = sys.maxsize if format.block is None else format.block
    for place in [axis] if isinstance(axis, int) else axis:
        if not -len(shape) <= place < len(shape):
            raise ValueError(f"a weight of {len(shape)} dimensions has no axis {place}")
        size = _block_size(counts[place], left)
        counts[place] //= size
        left //= size
    return counts


def _block_size(length: int, most: int) -> int:
    if length <= most:
        return max(length, 1)
    if length % most == 0:
        return most
    return min(length & -length, 1 << (most.bit_length() - 1))


def _split(shape: Iterable[int], counts: Iterable[int]) -> list[int]:
    """Two dimensions for each: the number of blocks, and the numbers in a block."""
    pairs = zip(shape, counts, strict=True)
    return [part for length, count in pairs for part in (count, length // max(count, 1))]


def _spread(scales: np.ndarray) -> np.ndarray:
    """As float32, to be multiplied with blocks as `_split` lays them out."""
    places = tuple(range(1, 2 * scales.ndim, 2))
    return np.expand_dims(scales.astype(np.float32), places)
