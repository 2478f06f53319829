"""Writes narrow weights into a graph, as standard nodes that onnxruntime computes at load.

A weight is codes, a codebook and scales: numbers = codebook[codes] * scales + offsets. In the graph
that is

    index  = Cast<int32>(bytes)                 one byte holds several codes (graphopt.code_fields)
    table  = Gather(codebook, digits)           the numbers of every byte, a small table
    values = Gather(table, index)               several numbers at once
    weight = Reshape(values, shape) * scales + offsets

All of it hangs on constants, so that onnxruntime folds it to one initializer when it loads the
model, and runs the kernels, the fusions and the speed of the unpacked model, with its memory. What
becomes smaller is the file. With int8 numbers in the codebook and a DequantizeLinear behind, the
folded initializer is the int8 weight of the integer kernels.

A weight may also be few rows of numbers, and for each of its rows which of these it is:

    weight = Gather<axis>(table, Cast<int32>(index)) * scales

Or some of its inputs are narrow and the others not, side by side and then put into order:

    weight = Gather<axis>(Concat<axis>(narrow, kept), Cast<int32>(places))

Codes of which most are one, as of pruned weights, are stored without it where that takes fewer
bytes; see `graphopt.sparse_encoding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.code_fields import Field, bits_per_code, fields_of
from graphopt.folded_nodes import CUT_BYTES, FoldedNodes
from graphopt.packing import FOLDED_BYTES_MAXIMUM
from graphopt.sparse_encoding import Placement, Sparse, placements, write_sparse

FIRST_OPSET = 13
"""From it on, all nodes that are written have the form they have here."""

_FLOAT = ir.DataType.FLOAT
_CODEBOOK, _SCALES = "b", "s"
"""How values are called, with a number; see `folded_nodes`."""

NUMPY_TYPES = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.DOUBLE: np.dtype(np.float64),
    ir.DataType.INT8: np.dtype(np.int8),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.INT32: np.dtype(np.int32),
    ir.DataType.INT64: np.dtype(np.int64),
}
"""Of weights that can be written."""


@dataclass(frozen=True, eq=False)
class Narrow:
    """A weight as codes: numbers = codebook[codes] * scales + offsets.

    Attributes:
        codes: uint8 of the shape of the weight.
        codebook: the number of each code, of shape [levels]; or [groups, levels], where each of as
            many equal parts of the first axis has a codebook of its own. int8 only without scales
            and offsets.
        scales: of the rank of the weight; each dimension divides that of the weight, and a block
            of numbers shares one. Of any type whose numbers are all float32, as float16 and those
            of 8 bits. None stands for 1.
        offsets: of the shape of the scales, where there are any; None stands for 0.

    Raises:
        ValueError: the parts do not fit each other.
    """

    codes: np.ndarray
    codebook: np.ndarray
    scales: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.codebook.ndim not in (1, 2):
            raise ValueError("a codebook is of shape [levels] or [groups, levels]")
        if self.codebook.ndim == 2 and self.codes.shape[0] % len(self.codebook):
            raise ValueError(f"{self.codes.shape[0]} rows are no {len(self.codebook)} equal groups")
        fields_of(self.levels)
        for part in self._blocked:
            if part.ndim != self.codes.ndim or any(
                not few or many % few
                for many, few in zip(self.codes.shape, part.shape, strict=True)
            ):
                raise ValueError(f"blocks of shape {part.shape} in a weight {self.codes.shape}")
        if len({part.shape for part in self._blocked}) > 1:
            raise ValueError("scales and offsets are of one shape")
        if self._blocked and self.codebook.dtype == np.int8:
            raise ValueError("int8 numbers get their scales from a DequantizeLinear")

    @property
    def _blocked(self) -> tuple[np.ndarray, ...]:
        return tuple(part for part in (self.scales, self.offsets) if part is not None)

    @property
    def levels(self) -> int:
        """Of a codebook."""
        return int(self.codebook.shape[-1])

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """How codes lie in bytes."""
        return fields_of(self.levels)

    @property
    def parameter_bytes(self) -> int:
        """Of codebook, scales and offsets."""
        return self.full_codebook.nbytes + sum(part.nbytes for part in self._blocked)

    @property
    def stored_bytes(self) -> int:
        """What the numbers take in the file; see `NODES_BYTES` for the nodes around them."""
        return self.parameter_bytes + sum(f.stored_bytes(self.codes.size) for f in self.fields)

    @property
    def bits_per_weight(self) -> float:
        """Of codes, codebook, scales and offsets."""
        return 8 * self.stored_bytes / max(self.codes.size, 1)

    @property
    def is_scaled(self) -> bool:
        """There are scales, or offsets."""
        return bool(self._blocked)

    @property
    def has_table(self) -> bool:
        """Bytes become numbers by one lookup."""
        return len(self.fields) == 1 and self.codebook.ndim == 1

    @property
    def full_codebook(self) -> np.ndarray:
        """The codebooks in one vector, with a number for every digit that a byte could hold."""
        whole = math.prod(f.base for f in self.fields)
        if not self.has_table or self.fields[0].digits == 1:
            return self.codebook.reshape(-1)
        return np.pad(self.codebook, (0, whole - self.levels))

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of the weight, with axes split where blocks are neither one nor all of it."""
        return _flat(
            (few, many // few) if 1 < few < many else (many,)
            for many, few in zip(self.codes.shape, self._blocks, strict=True)
        )

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape in which scales and offsets broadcast to `block_shape`."""
        return _flat(
            (few, 1) if 1 < few < many else (few,)
            for many, few in zip(self.codes.shape, self._blocks, strict=True)
        )

    @property
    def _blocks(self) -> tuple[int, ...]:
        """How many lie along each axis."""
        return self._blocked[0].shape if self._blocked else (1,) * self.codes.ndim

    def numbers(self) -> np.ndarray:
        """The weight: int8 where the codebook is, else float32 of the shape of the codes."""
        if self.codebook.ndim == 1:
            values = self.codebook[self.codes]
        else:
            parts = self.codes.reshape(len(self.codebook), -1)
            values = np.take_along_axis(self.codebook, parts.astype(np.intp), axis=1)
            values = values.reshape(self.codes.shape)
        if self.codebook.dtype == np.int8:
            return np.asarray(values)
        values = values.astype(np.float32)
        if self.scales is not None:
            values = values * spread(self.scales, self.codes.shape)
        if self.offsets is not None:
            values = values + spread(self.offsets, self.codes.shape)
        return np.asarray(values)


def spread(blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What blocks share, for each number: float32, broadcastable to the shape of the weight.

    Args:
        blocks: of the rank of the weight; each dimension divides that of the weight.
        shape: of the weight.
    """
    wide = blocks.astype(np.float32)
    for axis, (many, few) in enumerate(zip(shape, blocks.shape, strict=True)):
        if 1 < few < many:
            wide = np.repeat(wide, many // few, axis)
    return wide


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight whose rows are multiples of fewer rows: numbers = table[index] * scales.

    Attributes:
        table: of the rank of the weight, with fewer entries along the axis.
        index: integers of shape [rows]: which of the table's rows each is.
        axis: of the weight, along which its rows lie.
        scales: float32 of shape [rows]; None stands for 1.

    Raises:
        ValueError: the parts do not fit each other.
    """

    table: np.ndarray
    index: np.ndarray
    axis: int
    scales: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.axis < self.table.ndim:
            raise ValueError(f"no axis {self.axis} in a table of shape {self.table.shape}")
        if self.index.ndim != 1 or not self.index.size:
            raise ValueError(f"an index is of shape [rows], not {self.index.shape}")
        if self.index.min() < 0 or self.index.max() >= self.table.shape[self.axis]:
            raise ValueError("the index names rows that the table does not have")
        if self.scales is not None and self.scales.shape != self.index.shape:
            raise ValueError(f"{self.scales.shape} scales of {self.index.shape} rows")

    @cached_property
    def stored_index(self) -> np.ndarray:
        """The index in the narrowest unsigned type that holds it."""
        return self.index.astype(np.min_scalar_type(int(self.index.max())))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.table.shape)
        shape[self.axis] = len(self.index)
        return tuple(shape)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """In which scales broadcast to the weight."""
        return tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.shape))

    @property
    def stored_bytes(self) -> int:
        """What the numbers take in the file; see `NODES_BYTES` for the nodes around them."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.table.nbytes + self.stored_index.nbytes + scales

    def numbers(self) -> np.ndarray:
        """The weight: of the type of the table, or float32 where there are scales."""
        rows = np.take(self.table, self.index, self.axis)
        if self.scales is None:
            return rows
        return np.asarray(rows.astype(np.float32) * self.scales.reshape(self.scales_shape))


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The codes of a narrow weight, without the one that most are.

    Attributes:
        placement: of the other codes.
        others: these, in one row, with what they stand for.
        common: what the code that is left out stands for, of shape [1].
    """

    placement: Placement
    others: Narrow
    common: np.ndarray

    @property
    def stored_bytes(self) -> int:
        """In the file, about; what takes as many bytes for all codes is left out."""
        cut = any(self.others.codes.size % f.digits for f in self.others.fields)
        return self.placement.stored_bytes + self.others.stored_bytes + cut * CUT_BYTES


def sparse_codes(narrow: Narrow) -> SparseCodes | None:
    """The codes without the one that most are; None where that takes no fewer bytes."""
    codes, bits = narrow.codes.reshape(-1), bits_per_code(narrow.levels)
    if narrow.codebook.ndim != 1 or why_too_large(codes.size, ir.DataType.INT32) is not None:
        return None
    counts = np.bincount(codes, minlength=narrow.levels)
    common = int(counts.argmax())
    if counts[common] * max(bits, 2) <= codes.size:
        return None
    found = [_without(narrow, common, placement) for placement in placements(codes != common)]
    best = min(found, key=lambda sparse: sparse.stored_bytes, default=None)
    whole = replace(narrow, scales=None, offsets=None).stored_bytes
    return best if best is not None and best.stored_bytes < whole else None


def _without(narrow: Narrow, common: int, placement: Placement) -> SparseCodes:
    """The codes that are placed; the others are the common one."""
    codes, book = narrow.codes.reshape(-1)[placement.positions], narrow.codebook
    if not (codes == common).any():
        codes, book = codes - (codes > common), np.delete(book, common)
    others = Narrow(codes.astype(np.uint8), book)
    return SparseCodes(placement, others, narrow.codebook[common : common + 1])


# ------------------------------------------------------------------ what it costs


NODES_BYTES, SCALES_BYTES, FIELD_BYTES = 190, 80, 175
"""What the nodes and the small initializers of a weight take in the file, about: of any weight; of
one with scales, more; and for each field after the first. See also `folded_nodes.CUT_BYTES`."""


def why_too_large(count: int, dtype: ir.DataType) -> str | None:
    """Why onnxruntime would not fold a weight of so many numbers; None where it does."""
    itemsize = max(NUMPY_TYPES[dtype].itemsize, 4 if dtype != ir.DataType.INT8 else 1)
    if count * itemsize <= FOLDED_BYTES_MAXIMUM:
        return None
    return "over 1 GiB onnxruntime would widen it at every inference"


def _flat(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(size for part in parts for size in part)


# ------------------------------------------------------------------ writing


class Encoding(FoldedNodes):
    """Writes weights into one graph; what they can share, they share."""

    def weight(self, narrow: Narrow, dtype: ir.DataType, name: str) -> ir.Value:
        """A value that is a narrow weight. `close` puts its nodes into the graph.

        Args:
            narrow: the weight.
            dtype: float, float16, double, bfloat16; int8 for a codebook of int8.
            name: of the value; the graph must have no other of it by then, and gets none.

        Raises:
            ValueError: onnxruntime would not fold what is so large.
        """
        reason = why_too_large(narrow.codes.size, dtype)
        if reason is not None:
            raise ValueError(reason)
        self.names.keep(name)
        return self._last(self._scaled(narrow), dtype, narrow.codes.shape, name)

    def total(self, narrows: Sequence[Narrow], dtype: ir.DataType, name: str) -> ir.Value:
        """A value that is the sum of narrow weights of one shape; see `weight`."""
        self.names.keep(name)
        first, *others = map(self._scaled, narrows)
        for other in others:
            first = self.node("Add", [first, other], _FLOAT)
        return self._last(first, dtype, narrows[0].codes.shape, name)

    def sparse(self, sparse: Sparse, dtype: ir.DataType, name: str) -> ir.Value:
        """A value that is a weight stored without its zeros; see `weight`.

        Args:
            sparse: the weight; its numbers may be narrower than the value, as float16.
            dtype: of the value: any of floating point, or int8.
            name: as for `weight`.

        Raises:
            ValueError: onnxruntime would not fold what is so large.
        """
        reason = why_too_large(sparse.placement.count, ir.DataType.INT32)
        if reason is not None:
            raise ValueError(reason)
        self.names.keep(name)
        numbers, zero = self.constant(sparse.numbers, "n"), np.zeros(1, NUMPY_TYPES[dtype])
        if numbers.dtype != dtype:
            numbers = self.node("Cast", [numbers], dtype, to=dtype)
        flat = write_sparse(self, sparse.placement, numbers, zero)
        value = self.reshaped(flat, sparse.shape, (sparse.placement.count,))
        return self._last(value, dtype, sparse.shape, name)

    def repeated(self, rows: Rows, dtype: ir.DataType, name: str) -> ir.Value:
        """A value that is a weight of shared rows; see `weight`."""
        self.names.keep(name)
        table, kind = self.constant(rows.table, "rows"), ir.DataType.from_numpy(rows.table.dtype)
        if rows.scales is not None and kind != _FLOAT:
            # onnxruntime's CPU provider has no Mul of float16 that it could compute at load.
            table, kind = self.node("Cast", [table], _FLOAT, to=_FLOAT), _FLOAT
        value = self._picked(table, rows.stored_index, rows.axis, kind)
        if rows.scales is not None:
            scales = self.constant(rows.scales.reshape(rows.scales_shape), _SCALES)
            value = self.node("Mul", [value, scales], kind)
        return self._last(value, dtype, rows.shape, name)

    def interleaved(
        self,
        narrow: Narrow,
        kept: np.ndarray,
        places: np.ndarray,
        axis: int,
        dtype: ir.DataType,
        name: str,
    ) -> ir.Value:
        """A value that is a weight of which a part is narrow; see `weight`.

        Args:
            narrow: the part.
            kept: the rest, float32 of the same shape but for one axis.
            places: for each index along that axis of the weight, where it is in both parts one
                after the other.
            axis: along which they lie.
            dtype: as for `weight`.
            name: as for `weight`.
        """
        self.names.keep(name)
        pair = [self._scaled(narrow), self.constant(kept, "kept")]
        both = self.node("Concat", pair, _FLOAT, axis=axis)
        stored = places.astype(np.min_scalar_type(len(places) - 1))
        value = self._picked(both, stored, axis, _FLOAT)
        shape = list(kept.shape)
        shape[axis] = len(places)
        return self._last(value, dtype, shape, name)

    def _picked(self, table: ir.Value, which: np.ndarray, axis: int, kind: ir.DataType) -> ir.Value:
        """Entries of a table along an axis, by an index that is stored narrow."""
        stored = self.constant(which, "which")
        index = self.node("Cast", [stored], ir.DataType.INT32, to=ir.DataType.INT32)
        return self.node("Gather", [table, index], kind, **({"axis": axis} if axis else {}))

    def _last(
        self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> ir.Value:
        if value.dtype != dtype:
            value = self.node("Cast", [value], dtype, to=dtype)
        value.name, value.shape = name, ir.Shape(shape)
        return value

    # -------------------------------------------------------------- steps

    def _values(self, narrow: Narrow) -> ir.Value:
        """The numbers of the codebook, in the shape of the blocks of the weight."""
        if narrow.codebook.dtype != np.float32 and narrow.is_scaled:
            # onnxruntime's CPU provider has no Mul of float16 that it could compute at load.
            narrow = replace(narrow, codebook=narrow.codebook.astype(np.float32))
        sparse = sparse_codes(narrow)
        if sparse is None:
            return self.reshaped(self._looked_up_in(narrow), narrow.block_shape)
        numbers = self.reshaped(self._looked_up_in(sparse.others), (-1,))
        if sparse.placement.is_mask:
            pair = [self.shared("zero", sparse.common), numbers]
            numbers = self.node("Concat", pair, ir.DataType.from_numpy(sparse.common.dtype), axis=0)
        flat = write_sparse(self, sparse.placement, numbers, sparse.common)
        return self.reshaped(flat, narrow.block_shape)

    def _looked_up_in(self, narrow: Narrow) -> ir.Value:
        """The numbers of the codebook, in some shape."""
        kind = ir.DataType.from_numpy(narrow.codebook.dtype)
        codebook = self.shared(_CODEBOOK, narrow.full_codebook)
        if not narrow.has_table:
            return self.node("Gather", [codebook, self._indices(narrow)], kind)
        (only,) = narrow.fields
        index = self.bytes_of(only, narrow.codes)
        if only.digits > 1:
            codebook = self.once("Gather", [codebook, self.digits(only)], kind)
        values = self.node("Gather", [codebook, index], kind)
        if narrow.codes.size % only.digits:
            values = self.cut(values, only, narrow.codes.size)
        return values

    def _indices(self, narrow: Narrow) -> ir.Value:
        """The index of each number in the codebooks, int32: the sum of the digits."""
        first, *others = (self.codes(part, narrow.codes) for part in narrow.fields)
        for digits in others:
            first = self.node("Add", [first, digits], ir.DataType.INT32)
        if narrow.codebook.ndim == 1:
            return first
        starts = np.arange(len(narrow.codebook), dtype=np.int32) * narrow.levels
        rows = self.reshaped(first, (len(starts), -1))
        return self.node(
            "Add", [rows, self.shared("starts", starts[:, np.newaxis])], ir.DataType.INT32
        )

    def _scaled(self, narrow: Narrow) -> ir.Value:
        """The weight, in its shape."""
        value = self._values(narrow)
        for op_type, blocks in (("Mul", narrow.scales), ("Add", narrow.offsets)):
            if blocks is not None:
                value = self.node(
                    op_type, [value, self.floats(blocks.reshape(narrow.scales_shape))], _FLOAT
                )
        return self.reshaped(value, narrow.codes.shape, narrow.block_shape)

    def floats(self, blocks: np.ndarray) -> ir.Value:
        """Scales of any type that is a float32 as such, in their shape; see `close`."""
        if blocks.dtype.itemsize == 1:
            return self._wide_scales(blocks)
        stored = self.constant(blocks, _SCALES)
        if stored.dtype == _FLOAT:
            return stored
        return self.node("Cast", [stored], _FLOAT, to=_FLOAT)

    def zeros(self, count: int) -> ir.Value:
        """So many int8 zeros; the same for all that ask for as many."""
        return self.shared("zeros", np.zeros(count, np.int8))

    def _wide_scales(self, blocks: np.ndarray) -> ir.Value:
        """Scales of 8 bits by a table of all: the types themselves need the latest opsets."""
        every = np.arange(256, dtype=np.uint8).view(blocks.dtype).astype(np.float32)
        table = self.shared("scales", np.nan_to_num(every, posinf=0.0, neginf=0.0))
        stored = self.constant(blocks.view(np.uint8), _SCALES)
        index = self.node("Cast", [stored], ir.DataType.INT32, to=ir.DataType.INT32)
        return self.node("Gather", [table, index], _FLOAT)
