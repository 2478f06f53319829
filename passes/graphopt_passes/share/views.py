"""Which tensors hold the numbers of another one: reshaped, transposed, or some of its rows.

Tensors are told apart by ever more expensive keys, and read in blocks of a few MB, so that memory
does not grow with them. Most are never read: a few numbers at places that no permutation moves, or
the beginnings of rows, tell that they have nothing in common.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.content import (
    CHUNK_BYTES,
    PROBE_BYTES,
    bits_of,
    chunks,
    digest,
    equal_groups,
    groups_by,
    part,
    read_block,
)

RANKS = (2, 3, 4)
"""Of tensors that are looked at for permutations of their axes."""

BLOCK_ELEMENTS = 1 << 21
"""Permuted tensors are compared in blocks of this size."""

HEAD_BYTES = 16
"""Rows are looked for by so many bytes at their beginning; shorter rows are not looked at."""

PLACES_MAXIMUM = 8
"""Where more rows than that begin as a tensor does, the search in that table is given up."""

_DIAGONAL = 8
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class View:
    """What a tensor is of another: its rows from `start` to `stop`, permuted, then reshaped.

    Attributes:
        value: the initializer that need not be stored.
        source: the initializer that holds its numbers.
        permutation: of the axes of the source; None where they stay in order.
        rows: the range along axis 0 of the source; None for all.
    """

    value: ir.Value
    source: ir.Value
    permutation: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None


def find_views(values: Sequence[ir.Value]) -> list[View]:
    """The initializers that are views of others.

    Args:
        values: initializers with tensors of elements of 1, 2, 4 or 8 bytes, none of them empty.
            Of several that are the same up to order and shape, the first is the source.

    Returns:
        The views. The source of one may be a view that comes after it, and is none that comes
        before.

    Raises:
        ModelError: external data cannot be read.
    """
    views: list[View] = []
    left = list(values)
    for search in (_reshaped, _permuted, _sliced):
        found = list(search(left))
        views += found
        gone = {view.value for view in found}
        left = [value for value in left if value not in gone]
    return views


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


# ------------------------------------------------------------------ the same bytes


def _reshaped(values: Sequence[ir.Value]) -> Iterator[View]:
    for source, *others in equal_groups(values, _tensor, same_shape=False):
        yield from (View(v, source) for v in others if _shape(v) != _shape(source))


# ------------------------------------------------------------------ permuted axes


def _permuted(values: Sequence[ir.Value]) -> Iterator[View]:
    candidates = [value for value in values if len(_shape(value)) in RANKS]
    for group in groups_by(candidates, _tensor, _sorted_shape, _ends, _diagonal):
        # Two are compared as fast as they are read to be told apart.
        alike = [group] if len(group) == 2 else groups_by(group, _tensor, _fingerprint)
        for members in alike:
            yield from _permutations_of_another(members)


def _permutations_of_another(values: Sequence[ir.Value]) -> Iterator[View]:
    sources: list[ir.Value] = []
    for value in values:
        found = (
            View(value, source, permutation)
            for source in sources
            if (permutation := _permutation(source, value)) is not None
        )
        view = next(found, None)
        if view is None:
            sources.append(value)
        else:
            yield view


def _sorted_shape(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, *sorted(tensor.shape.numpy())


def _ends(tensor: ir.TensorProtocol) -> Hashable:
    """The first and the last number, which stay where they are however the axes are permuted."""
    shape = tuple(tensor.shape.numpy())
    return _at(tensor, (0,) * len(shape)), _at(tensor, tuple(size - 1 for size in shape))


def _diagonal(tensor: ir.TensorProtocol) -> Hashable:
    """A few more numbers that stay where they are."""
    shape = tuple(tensor.shape.numpy())
    return tuple(_at(tensor, (k,) * len(shape)) for k in range(1, min(*shape, _DIAGONAL)))


def _at(tensor: ir.TensorProtocol, place: Sequence[int]) -> int:
    number: int = read_block(tensor, [slice(k, k + 1) for k in place]).item()
    return number


def _fingerprint(tensor: ir.TensorProtocol) -> Hashable:
    """A number that depends on which elements a tensor has and not on their order."""
    bits = bits_of(tensor)
    factor = _FIRST_FACTOR.astype(bits)
    half = np.array(4 * bits.itemsize, bits)
    total = 0
    for elements in _elements(tensor):
        mixed = elements * factor
        mixed ^= mixed >> half
        mixed *= factor
        total += int(mixed.sum(dtype=np.uint64))
    return total


def _elements(tensor: ir.TensorProtocol) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    bits = bits_of(tensor)
    for start in range(0, tensor.nbytes, CHUNK_BYTES // 4):
        stop = min(start + CHUNK_BYTES // 4, tensor.nbytes)
        yield np.concatenate(list(chunks(part(tensor, start, stop)))).view(bits)


def _permutation(source: ir.Value, value: ir.Value) -> tuple[int, ...] | None:
    """How the axes of the source are permuted in the value; None where they are not."""
    before, after = _shape(source), _shape(value)
    for permutation in permutations(range(len(before))):
        in_order = permutation == tuple(range(len(before)))
        if in_order or tuple(before[axis] for axis in permutation) != after:
            continue
        if _is_transposed(_tensor(source), _tensor(value), permutation):
            return permutation
    return None


def _is_transposed(
    source: ir.TensorProtocol, tensor: ir.TensorProtocol, permutation: tuple[int, ...]
) -> bool:
    shape = tuple(source.shape.numpy())
    block_shape = _block_shape(shape, permutation)
    starts = (range(0, size, step) for size, step in zip(shape, block_shape, strict=True))
    for start in product(*starts):
        block = [
            slice(first, min(first + step, size))
            for first, step, size in zip(start, block_shape, shape, strict=True)
        ]
        ours = read_block(source, block).transpose(permutation)
        if not np.array_equal(ours, read_block(tensor, [block[axis] for axis in permutation])):
            return False
    return True


def _block_shape(shape: tuple[int, ...], permutation: tuple[int, ...]) -> list[int]:
    """A block of which both tensors are read in runs as long as possible."""
    block = list(shape)

    def shortest_run(axis: int) -> int:
        halved = [-(-size // 2) if a == axis else size for a, size in enumerate(block)]
        permuted = [halved[a] for a in permutation]
        return min(_run(halved, shape), _run(permuted, [shape[a] for a in permutation]))

    while math.prod(block) > BLOCK_ELEMENTS:
        axis = max((a for a, size in enumerate(block) if size > 1), key=shortest_run)
        block[axis] = -(-block[axis] // 2)
    return block


def _run(block: Sequence[int], shape: Sequence[int]) -> int:
    """How many elements of a block lie side by side in the tensor."""
    length = 1
    for size, whole in zip(reversed(block), reversed(shape), strict=True):
        length *= size
        if size < whole:
            break
    return length


# ------------------------------------------------------------------ rows of a table


def _sliced(values: Sequence[ir.Value]) -> Iterator[View]:
    """Each among the rows of larger tables, the largest first."""
    long = [value for value in values if _tensor(value).nbytes >= HEAD_BYTES]
    for group in groups_by(long, _tensor, lambda tensor: tensor.dtype):
        beginnings: dict[int, list[ir.Value]] = defaultdict(list)
        for value in group:
            beginnings[_hashes(_heads(_tensor(value), 1, HEAD_BYTES)).item()].append(value)
        gone: set[ir.Value] = set()
        for table in sorted(group, key=lambda value: -_tensor(value).nbytes):
            if table in gone or _row_bytes(table) < HEAD_BYTES:
                continue
            for value, start in _rows(table, beginnings):
                if value not in gone:
                    gone.add(value)
                    stop = start + _tensor(value).nbytes // _row_bytes(table)
                    yield View(value, table, rows=(start, stop))


def _row_bytes(table: ir.Value) -> int:
    return _tensor(table).nbytes // _shape(table)[0]


def _rows(
    table: ir.Value, beginnings: Mapping[int, Sequence[ir.Value]]
) -> Iterator[tuple[ir.Value, int]]:
    """The values that are rows of the table, and at which row each begins.

    Args:
        table: with rows of at least `HEAD_BYTES`.
        beginnings: the values by the hashes of their heads; the table may be among them.
    """
    wanted = np.sort(np.array(list(beginnings), np.uint64))
    places: dict[int, list[int]] = defaultdict(list)
    first_row = 0
    for block in _heads_in_blocks(table):
        found = _hashes(block)
        nearest = wanted[np.minimum(np.searchsorted(wanted, found), wanted.size - 1)]
        for index in np.flatnonzero(nearest == found).tolist():
            place = places[int(found[index])]
            # One more than the maximum says that there are too many.
            if len(place) <= PLACES_MAXIMUM:
                place.append(first_row + index)
        first_row += len(block)
    for head, place in places.items():
        if len(place) > PLACES_MAXIMUM:
            continue
        for value in beginnings[head]:
            start = next((row for row in place if _is_at(value, table, row)), None)
            if start is not None:
                yield value, start


def _heads_in_blocks(table: ir.Value) -> Iterator[npt.NDArray[np.uint8]]:
    row_bytes, rows = _row_bytes(table), _shape(table)[0]
    # Less than a chunk, whose start is rounded down to a page.
    step = max(1, CHUNK_BYTES // 2 // row_bytes)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        block = part(_tensor(table), first * row_bytes, stop * row_bytes)
        yield _heads(block, stop - first, row_bytes)


def _heads(block: ir.TensorProtocol, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """The first bytes of each of so many rows; of the other bytes the pages are not touched."""
    window = next(chunks(block))
    if rows == 1:
        return window[np.newaxis, :HEAD_BYTES]
    return window.reshape(rows, row_bytes)[:, :HEAD_BYTES]


def _hashes(heads: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    first, second = np.ascontiguousarray(heads).view("<u8").T
    mixed: npt.NDArray[np.uint64] = (first * _FIRST_FACTOR) ^ (second * _SECOND_FACTOR)
    return mixed


def _is_at(value: ir.Value, table: ir.Value, row: int) -> bool:
    ours, whole = _tensor(value), _tensor(table)
    row_bytes = _row_bytes(table)
    start, stop = row * row_bytes, row * row_bytes + ours.nbytes
    if ours.nbytes >= whole.nbytes or ours.nbytes % row_bytes or stop > whole.nbytes:
        return False
    theirs = part(whole, start, stop)
    for place in (0, ours.nbytes // 2, max(0, ours.nbytes - PROBE_BYTES)):
        stop = min(place + PROBE_BYTES, ours.nbytes)
        if digest(part(ours, place, stop)) != digest(part(theirs, place, stop)):
            return False
    return digest(ours) == digest(theirs)
