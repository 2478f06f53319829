"""The content of tensors: read in chunks, hashed, compared. Memory stays a few MB."""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError

CHUNK_BYTES = 8 << 20
PROBE_BYTES = 4096

_DIGEST, _KIND, _LOCK = "graphopt.sha256", "graphopt.kind", "graphopt.lock"

T = TypeVar("T")


def chunks(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """The bytes of a tensor as it is stored, little-endian, as flat uint8 arrays of a few MB.

    Types narrower than a byte stay packed. External data is mapped in small windows: a mapping of
    the whole would count as resident memory.

    Raises:
        ModelError: the external data is gone, cannot be read, or is too short.
    """
    if isinstance(tensor, ir.ExternalTensor):
        yield from _file_chunks(tensor)
        return
    if tensor.dtype == ir.DataType.STRING:
        flat = np.frombuffer(repr(tensor.numpy().tolist()).encode(), np.uint8)
    elif tensor.dtype.itemsize < 1:
        flat = np.frombuffer(tensor.tobytes(), np.uint8)
    else:
        flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES]


def _file_chunks(tensor: ir.ExternalTensor) -> Iterator[np.ndarray]:
    position, end = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
    with open_data(tensor) as file:
        while position < end:
            missing_bytes = end - os.fstat(file.fileno()).st_size
            if missing_bytes > 0:
                raise ModelError(
                    f"the data file {tensor.path} ended while tensor {tensor.name!r} was read: "
                    f"{missing_bytes} bytes are missing"
                )
            start = position - position % mmap.ALLOCATIONGRANULARITY
            # Chunks are of whole elements, wherever in a page the tensor begins.
            size = min(position - start + CHUNK_BYTES, end - start)
            # A window goes, with its pages, when the last array over it does. Mapping takes half
            # the time of reading into a buffer.
            window = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
            yield np.frombuffer(window, np.uint8)[position - start :]
            position = start + size


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The array of a tensor; that of external data without leaving its file mapped.

    Raises:
        ModelError: the external data is gone, cannot be read, or is too short.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.itemsize < 1:
        return tensor.numpy()
    raw = np.empty(tensor.nbytes, np.uint8)
    done = 0
    for chunk in chunks(tensor):
        raw[done : done + chunk.size] = chunk
        done += chunk.size
    return raw.view(tensor.dtype.numpy()).reshape(tuple(tensor.shape.numpy()))


def part(tensor: ir.TensorProtocol, start: int, stop: int) -> ir.TensorProtocol:
    """The bytes of a tensor from `start` up to `stop`, as a tensor of uint8 over the same data."""
    if isinstance(tensor, ir.ExternalTensor):
        offset, shape = (tensor.offset or 0) + start, ir.Shape([stop - start])
        return ir.ExternalTensor(
            tensor.path,
            offset,
            stop - start,
            ir.DataType.UINT8,
            shape=shape,
            name=tensor.name or "",
        )
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return ir.tensor(flat[start:stop], name=tensor.name)


def bits_of(tensor: ir.TensorProtocol) -> np.dtype[np.unsignedinteger]:
    """The unsigned integers as which elements of 1, 2, 4 or 8 bytes are compared by their bits."""
    return np.dtype(f"<u{int(tensor.dtype.itemsize)}")


def read_block(tensor: ir.TensorProtocol, block: Sequence[slice]) -> np.ndarray:
    """The bits of a block of a tensor, as unsigned integers of the size of its elements.

    Args:
        tensor: of elements of 1, 2, 4 or 8 bytes.
        block: a slice with both ends for each axis, of which there is at least one.

    Raises:
        ModelError: the external data is gone, cannot be read, or is too short.
    """
    bits = bits_of(tensor)
    if not isinstance(tensor, ir.ExternalTensor):
        return np.ascontiguousarray(tensor.numpy()[tuple(block)]).view(bits)
    shape = tuple(tensor.shape.numpy())
    result = np.empty([s.stop - s.start for s in block], bits)
    # A block that is as wide as the tensor is read several rows at a time.
    split = len(shape) - 1
    while split and result.shape[split] == shape[split]:
        split -= 1
    strides = [bits.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(s.start * stride for s, stride in zip(block, strides, strict=True))
    with open_data(tensor) as file:
        for index in np.ndindex(result.shape[:split]):
            ahead = sum(i * stride for i, stride in zip(index, strides, strict=False))
            file.seek((tensor.offset or 0) + first + ahead)
            run = result[index]
            if file.readinto(run.data) != run.nbytes:
                raise ModelError(
                    f"the data file {tensor.path} ended while tensor {tensor.name!r} was read"
                )
    return result


def open_data(tensor: ir.ExternalTensor) -> io.FileIO:
    """The file of a tensor in external data, unbuffered, at its beginning.

    Raises:
        ModelError: it cannot be opened.
    """
    try:
        return open(tensor.path, "rb", buffering=0)
    except FileNotFoundError:
        raise ModelError(
            f"the data file {tensor.path}, with tensor {tensor.name!r}, is gone; it was there when "
            "the model was loaded"
        ) from None
    except OSError as error:
        raise ModelError(
            f"cannot read the data of tensor {tensor.name!r} from {tensor.path}: {error.strerror}"
        ) from None


def digest(tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of the bytes of a tensor; remembered for tensors that `remember` was called for."""
    if _LOCK not in tensor.meta:
        return _hash(tensor)
    # Who comes while another thread is hashing waits for its result.
    with tensor.meta[_LOCK]:
        if _DIGEST not in tensor.meta:
            tensor.meta[_DIGEST] = _hash(tensor)
        known: bytes = tensor.meta[_DIGEST]
        return known


def remember(tensor: ir.TensorProtocol) -> None:
    """Let the digest of a tensor be computed once. For data that nobody changes meanwhile."""
    tensor.meta[_LOCK] = threading.Lock()


def _hash(tensor: ir.TensorProtocol) -> bytes:
    state = hashlib.sha256()
    for chunk in chunks(tensor):
        state.update(chunk.data)
    return state.digest()


def digests(tensors: Sequence[ir.TensorProtocol]) -> Iterator[bytes]:
    """The digests in order, computed by two threads: hashing releases the interpreter lock."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(digest, tensors)


def equal_groups(
    items: Iterable[T],
    tensor_of: Callable[[T], ir.TensorProtocol],
    *,
    same_shape: bool = True,
) -> Iterator[list[T]]:
    """Groups of two and more whose tensors have the same element type, shape and bytes.

    They are told apart by ever more expensive keys: type and shape, a few bytes of large tensors
    in external data, and only where those agree a hash of the content.

    Args:
        items: in the order in which a group will have them.
        tensor_of: gives the tensor of an item.
        same_shape: shapes must be the same; otherwise only the number of elements.

    Raises:
        ModelError: external data cannot be read.
    """
    yield from groups_by(items, tensor_of, _kind if same_shape else _size, _probe, digest)


def groups_by(
    items: Iterable[T],
    tensor_of: Callable[[T], ir.TensorProtocol],
    *keys: Callable[[ir.TensorProtocol], Hashable],
) -> list[list[T]]:
    """Groups of two and more whose tensors agree in all keys.

    A key is asked only of tensors that another one agrees with in all keys before it.
    """
    groups = [list(items)]
    for key in keys:
        groups = [found for group in groups for found in _split(group, tensor_of, key)]
    return groups


def _split(
    items: list[T],
    tensor_of: Callable[[T], ir.TensorProtocol],
    key: Callable[[ir.TensorProtocol], Hashable],
) -> Iterator[list[T]]:
    parts: dict[Hashable, list[T]] = defaultdict(list)
    if len(items) > 1:
        for item in items:
            parts[key(tensor_of(item))].append(item)
    yield from (found for found in parts.values() if len(found) > 1)


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    known: Hashable = tensor.meta.get(_KIND)
    if known is None:
        # A tensor in a proto makes its shape anew each time.
        known = tensor.meta[_KIND] = tensor.dtype, tuple(tensor.shape.numpy())
    return known


def _size(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tensor.size


def _probe(tensor: ir.TensorProtocol) -> Hashable:
    """A few bytes from the beginning, middle and end of a tensor in external data."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= 3 * PROBE_BYTES:
        return None
    start = tensor.offset or 0
    with open_data(tensor) as file:
        pieces = []
        for offset in (0, tensor.nbytes // 2, tensor.nbytes - PROBE_BYTES):
            file.seek(start + offset)
            pieces.append(file.read(PROBE_BYTES))
    return tuple(pieces)
