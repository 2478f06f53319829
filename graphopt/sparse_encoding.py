"""Stores where a weight is not zero, and its other numbers one after the other.

A mask has a bit for each number, and bytes become bits by one lookup (graphopt.code_fields):

    bits   = Gather(digits, Cast<int32>(mask))                  of shape [N]
    weight = Gather([zero, *numbers], CumSum(bits) * bits)

Where few numbers are left, the steps from one to the next take less, in 4, 8 or 16 bits; a step
that is longer is several, between which a zero is stored:

    weight = ScatterElements(Expand(zero, N), CumSum(steps), numbers)

All of it hangs on constants, so that onnxruntime folds it to one initializer when it loads the
model; see `graphopt.encoding`. The numbers may themselves be what nodes make of codes. Zero stands
for any number that most are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.code_fields import Field
from graphopt.folded_nodes import CUT_BYTES, FoldedNodes

MASK_BYTES, STEPS_BYTES = 330, 270
"""What the nodes and small initializers take in the file, about, beside those of the numbers."""

MASK, STEPS, SHORT_STEPS = Field(2, 1), Field(256, 1), Field(16, 1)

LONGEST = 65535
"""Of steps that are stored in 16 bits."""

STEPS_SHARE = 0.25
"""Of more numbers, a mask takes fewer bits than steps of 4 bits."""

_INT32 = ir.DataType.INT32
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_FLOATS = (*_HALVES, np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True, eq=False)
class Placement:
    """Which of many numbers are stored; all others are zero.

    Attributes:
        count: of all numbers.
        positions: of those that are stored, increasing, int64 of shape [stored].
        field: how its codes lie in bytes: `MASK`, `STEPS` or `SHORT_STEPS`; None for steps of 16
            bits.
    """

    count: int
    positions: np.ndarray
    field: Field | None

    @property
    def is_mask(self) -> bool:
        """A bit for each number says whether it is stored."""
        return self.field == MASK

    @cached_property
    def codes(self) -> np.ndarray:
        """uint8: bits of shape [count], or steps of shape [stored], the first one from 0.

        uint16 where there is no field.
        """
        if not self.is_mask:
            kind = np.uint16 if self.field is None else np.uint8
            return np.diff(self.positions, prepend=0).astype(kind)
        bits = np.zeros(self.count, np.uint8)
        bits[self.positions] = 1
        return bits

    @property
    def stored_bytes(self) -> int:
        """Of the codes, and of the nodes around them."""
        codes = self.count if self.is_mask else self.positions.size
        nodes_bytes = MASK_BYTES if self.is_mask else STEPS_BYTES
        if self.field is None:
            return 2 * codes + nodes_bytes
        cut_bytes = CUT_BYTES if codes % self.field.digits else 0
        return self.field.stored_bytes(codes) + nodes_bytes + cut_bytes


def placements(is_stored: np.ndarray) -> list[Placement]:
    """The ways to place numbers, of which the one of the fewest bytes depends on their bits.

    Args:
        is_stored: bool of shape [count], for each number whether it is not zero. Steps may have
            some zeros stored, too.
    """
    count, found = is_stored.size, []
    positions = np.flatnonzero(is_stored)
    if positions.size:
        found.append(Placement(count, positions, MASK))
    if count and positions.size <= STEPS_SHARE * count:
        for field in (STEPS, SHORT_STEPS, None):
            longest = LONGEST if field is None else field.base - 1
            found.append(Placement(count, _stepped(positions, longest), field))
    return found


def _stepped(positions: np.ndarray, longest: int) -> np.ndarray:
    """The positions, with more between those that are farther apart than a step goes."""
    if not positions.size:
        return np.zeros(1, np.int64)
    gaps = np.diff(positions, prepend=0)
    steps = np.maximum(-(-gaps // longest), 1)
    taken = np.full(int(steps.sum()), longest, np.int64)
    taken[np.cumsum(steps) - 1] = gaps - (steps - 1) * longest
    return np.cumsum(taken)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A weight whose zeros are not stored.

    Attributes:
        placement: of its other numbers.
        numbers: as they are stored, of shape [stored]; of floating point or int8. Before those of
            a mask is a zero.
        shape: of the weight.
    """

    placement: Placement
    numbers: np.ndarray
    shape: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """In the file, about, its nodes included and tables of digits left out."""
        return self.placement.stored_bytes + self.numbers.nbytes


def sparse_of(array: np.ndarray) -> Sparse | None:
    """The smallest form of a weight without its zeros; None where it has none or no numbers.

    -0.0 is a number like any other. Where all numbers are float16 or bfloat16 as such, they are
    stored so.

    Args:
        array: of floating point or int8, of any shape.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    is_stored = flat.view(f"u{flat.dtype.itemsize}") != 0
    if is_stored.all():
        return None
    kind = narrowest_type(flat)
    found = []
    for placement in placements(is_stored):
        numbers = flat[placement.positions].astype(kind)
        if placement.is_mask:
            numbers = np.concatenate([np.zeros(1, kind), numbers])
        found.append(Sparse(placement, numbers, array.shape))
    return min(found, key=lambda sparse: sparse.stored_bytes)


def narrowest_type(array: np.ndarray) -> np.dtype:
    """The narrowest type of floating point that holds all numbers bit for bit; else their own.

    NaN stays in its own type: a Cast may change its bits.
    """
    own = array.dtype
    if own not in _FLOATS or not np.isfinite(array).all():
        return own
    bits = f"u{own.itemsize}"
    for kind in _FLOATS:
        if kind.itemsize >= own.itemsize:
            break
        with np.errstate(over="ignore"):
            back = array.astype(kind).astype(own)
        if (back.view(bits) == array.view(bits)).all():
            return kind
    return own


def write_sparse(
    nodes: FoldedNodes, placement: Placement, numbers: ir.Value, zero: np.ndarray
) -> ir.Value:
    """Nodes that put numbers where they belong, and zeros everywhere else.

    Args:
        nodes: of the graph.
        placement: of the numbers.
        numbers: of shape [stored]; with a mask of shape [1 + stored], the first of them the zero.
        zero: of their type and shape [1]; any number.

    Returns:
        Of shape [count].
    """
    assert numbers.dtype is not None
    axis = nodes.shared("axis", np.array(0, np.int32))
    codes = _codes(nodes, placement)
    ends = nodes.node("CumSum", [codes, axis], _INT32)
    if placement.is_mask:
        index = nodes.node("Mul", [ends, codes], _INT32)
        return nodes.node("Gather", [numbers, index], numbers.dtype)
    count = nodes.shared("count", np.array([placement.count], np.int64))
    zeros = nodes.once("Expand", [nodes.shared("zero", zero), count], numbers.dtype)
    return nodes.node("ScatterElements", [zeros, ends, numbers], numbers.dtype)


def _codes(nodes: FoldedNodes, placement: Placement) -> ir.Value:
    """The codes, int32 in one row."""
    if placement.field is not None:
        return nodes.codes(placement.field, placement.codes)
    stored = nodes.constant(placement.codes, "c")
    return nodes.node("Cast", [stored], _INT32, to=_INT32)
