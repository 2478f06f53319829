"""The content of tensors: read in chunks, hashed, compared. Memory stays a few MB."""

from __future__ import annotations

import hashlib
import io
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

_DIGEST, _LOCK = "graphopt.sha256", "graphopt.lock"

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
            size = min(CHUNK_BYTES, end - start)
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
    items: Iterable[T], tensor_of: Callable[[T], ir.TensorProtocol]
) -> Iterator[list[T]]:
    """Groups of two and more whose tensors have the same element type, shape and bytes.

    They are told apart by ever more expensive keys: type and shape, a few bytes of large tensors
    in external data, and only where those agree a hash of the content.

    Args:
        items: in the order in which a group will have them.
        tensor_of: gives the tensor of an item.

    Raises:
        ModelError: external data cannot be read.
    """
    groups = [list(items)]
    for key in (_kind, _probe, digest):
        groups = [part for group in groups for part in _split(group, tensor_of, key)]
    yield from groups


def _split(
    items: list[T],
    tensor_of: Callable[[T], ir.TensorProtocol],
    key: Callable[[ir.TensorProtocol], Hashable],
) -> Iterator[list[T]]:
    parts: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        parts[key(tensor_of(item))].append(item)
    yield from (part for part in parts.values() if len(part) > 1)


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tuple(tensor.shape.numpy())


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
