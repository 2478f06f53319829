"""float16 and bfloat16: what they hold of a float32, and what becomes of a constant in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.content import read_array

T = ir.DataType

HEADROOM = 2
"""What samples show of a value may be so many times as large on other inputs."""

MASK_MAGNITUDE_MINIMUM = 1e9
"""A positive constant this large stands for infinity; a negative one does once it is too large."""

TINY_BITS = 2
"""Of values below so many powers of two above the smallest normal number, most are subnormal."""

Role = Literal["divisor", "factor", "floor", "term"]
"""What a constant is for: in a divisor nothing may become 0; a factor must keep its digits; a floor
keeps something else from being 0, so that its size matters; a term is added to what is larger."""

_LOSS_MAXIMUM: dict[Role, float] = {"divisor": 2**-8, "factor": 2**-8, "floor": 2**-3}
"""Relative L2 error of a constant that is rounded to float16; a term may be rounded to 0."""


@dataclass(frozen=True)
class Half:
    """A floating-point type of 16 bits.

    Attributes:
        dtype: in ONNX.
        numpy: the same for arrays.
        largest: the largest finite number.
        smallest: the smallest normal number.
        step: from 1 to the next number, twice the largest relative error of a rounding.
        first_opset: from which on Cast knows it.
    """

    dtype: ir.DataType
    numpy: np.dtype[np.generic]
    largest: float
    smallest: float
    step: float
    first_opset: int

    @property
    def name(self) -> str:
        """As in ONNX."""
        return self.dtype.name.lower()

    def why_out_of_range(self, low: float, high: float) -> str | None:
        """Why values between these do not fit with headroom, or None.

        All of them may be too large, or all so small that they are subnormal or nearly so.
        """
        magnitude = max(abs(low), abs(high))
        if magnitude * HEADROOM > self.largest:
            return f"reaches {magnitude:.3g}, and {self.name} ends at {self.largest:.6g}"
        if 0 < magnitude < self.smallest * 2**TINY_BITS:
            return f"stays below {magnitude:.3g}, where {self.name} has few digits"
        return None

    def why_lost(self, tensor: ir.TensorProtocol, role: Role) -> str | None:
        """Why a constant, float32, would not do the same in this type, or None."""
        array = read_array(tensor)
        finite = array[np.isfinite(array)]
        large = np.abs(finite) > self.largest
        odd = finite[large & (finite > 0) & (finite < MASK_MAGNITUDE_MINIMUM)]
        if odd.size:
            return f"{odd.max():.3g} is too large for {self.name}, which ends at {self.largest:.6g}"
        kept = finite[~large]
        rounded = kept.astype(self.numpy).astype(np.float32)
        if role == "divisor" and np.any((rounded == 0) & (kept != 0)):
            return f"{np.abs(kept[kept != 0]).min():.3g} becomes 0 in {self.name}"
        limit = max(_LOSS_MAXIMUM.get(role, np.inf), self.step)
        if _norm(rounded - kept) > limit * _norm(kept):
            return f"{np.abs(kept).max():.3g} is too small for {self.name}"
        return None

    def holds(self, tensor: ir.TensorProtocol) -> bool:
        """A weight, float32, loses nothing but digits: nothing is a mask, or too small."""
        array = read_array(tensor)
        finite = array[np.isfinite(array)]
        return not np.any(np.abs(finite) > self.largest) and not self.why_lost(tensor, "factor")

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """The numbers in this type; what is finite and too large becomes the largest finite one.

        Masks are such: -1e9 or the lowest float32 become -65504 in float16. Infinity and NaN stay.

        Args:
            array: float32.
        """
        limited = np.clip(array, -self.largest, self.largest)
        with np.errstate(invalid="ignore"):  # NaN
            return np.asarray(np.where(np.isinf(array), array, limited).astype(self.numpy))


def _norm(array: np.ndarray) -> float:
    wide = array.reshape(-1).astype(np.float64)
    return float(np.sqrt(wide @ wide))


FLOAT16 = Half(T.FLOAT16, np.dtype(np.float16), (2 - 2**-10) * 2.0**15, 2.0**-14, 2.0**-10, 6)
BFLOAT16 = Half(
    T.BFLOAT16, np.dtype(ml_dtypes.bfloat16), (2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-7, 13
)
