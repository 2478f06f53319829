"""A data file in the making: tensors are appended, and go to the disk past the page cache.

A copy through the cache spends most of its time on filling pages that nobody reads again, and
pushes others out: 4 GB took 7 s that way, and 3 s with direct writes.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.content import chunks

ALIGNMENT_BYTES = 64
BLOCK_BYTES = 4096
"""Direct writes are whole blocks; the last one is cut to the size of the file in the end."""
BUFFER_BYTES = 4 << 20


class DataFile:
    """A new file of tensors, one after another.

    Attributes:
        size_bytes: how far it has come.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        # Memory of its own pages: direct writes want an aligned address.
        self._buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)
        self._filled_bytes = 0
        self._handle = _open_direct(path)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def append(self, tensor: ir.TensorProtocol) -> int:
        """Append the bytes of a tensor; the offset at which they start.

        Raises:
            ModelError: the tensor is in external data that cannot be read.
            OSError: the disk is full, or the like.
        """
        offset = _next_offset(self.size_bytes, tensor)
        self._write(np.zeros(offset - self.size_bytes, np.uint8))
        for chunk in chunks(tensor):
            self._write(chunk)
        return offset

    def sync(self) -> None:
        """Bring all that was appended to the disk. Nothing can be appended after."""
        self._flush()
        os.truncate(self._handle, self.size_bytes)
        os.fsync(self._handle)

    def _write(self, data: np.ndarray) -> None:
        while data.size:
            part = data[: BUFFER_BYTES - self._filled_bytes]
            self._buffer[self._filled_bytes : self._filled_bytes + part.size] = part
            self._filled_bytes += part.size
            self.size_bytes += part.size
            data = data[part.size :]
            if self._filled_bytes == BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Write the buffer, up to the end of the block where it is not full."""
        start = self.size_bytes - self._filled_bytes
        end = self._filled_bytes + -self._filled_bytes % BLOCK_BYTES
        done = 0
        while done < end:
            done += self._write_at(start + done, self._buffer[done:end])
        self._filled_bytes = 0

    def _write_at(self, offset: int, data: np.ndarray) -> int:
        try:
            return os.pwrite(self._handle, data.data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # A file system that opens files for direct writes and then wants larger blocks, or none.
        _clear_direct(self._handle)
        return os.pwrite(self._handle, data.data, offset)


def _open_direct(path: Path) -> int:
    """A handle that writes past the page cache, where the system and file system have that."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)


def _clear_direct(handle: int) -> None:
    import fcntl  # not on every system, and only those that have it have direct writes

    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))


def _next_offset(position: int, tensor: ir.TensorProtocol) -> int:
    """The first offset from a position on at which to write the tensor.

    One from external data keeps its place relative to aligned addresses. Such tensors are written
    in the order of their old offsets, so this never takes them beyond those, and the new file is no
    longer than the old one.
    """
    old = tensor.offset or 0 if isinstance(tensor, ir.ExternalTensor) else 0
    return position + (old - position) % ALIGNMENT_BYTES
