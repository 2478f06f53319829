"""A data file in the making: tensors are appended, and go to the disk past the page cache.

A copy through the cache spends most of its time on filling pages that nobody reads again, and
pushes others out: 4 GB took 7 s that way, and 3 s with direct writes. `copy_file_range` is such a
copy where the file system (ext4) has nothing better: 1.3 GB took 3.2 s, and 1.3 s with direct
writes. Where blocks can be shared between files (Btrfs, XFS), those of a large tensor are.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.content import chunks, open_data

ALIGNMENT_BYTES = 64
BLOCK_BYTES = 4096
"""Direct writes are whole blocks; the last one is cut to the size of the file in the end."""
BUFFER_BYTES = 4 << 20
CLONED_BYTES = 1 << 20
"""Tensors in external data from this size on may share their blocks with the old file."""

_FICLONERANGE = 0x4020940D
"""As in linux/fs.h. Where the number means something else, the system refuses it."""


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
        self._clones = sys.platform == "linux"

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
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= CLONED_BYTES:
            self._append_blocks(tensor)
        else:
            self._append_bytes(tensor)
        return offset

    def _append_bytes(self, tensor: ir.TensorProtocol) -> None:
        for chunk in chunks(tensor):
            self._write(chunk)

    def _append_blocks(self, tensor: ir.ExternalTensor) -> None:
        """Append a tensor whose whole blocks may be those of its old file.

        Both files have them at multiples of their size: see `_next_offset`.
        """
        start, end = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
        first = start + -start % BLOCK_BYTES
        last = end - end % BLOCK_BYTES
        self._append_bytes(_part(tensor, start, first))
        if self._clone(tensor, first, last):
            first = last
        self._append_bytes(_part(tensor, first, end))

    def _clone(self, tensor: ir.ExternalTensor, start: int, end: int) -> bool:
        """Let the file go on with blocks of another one, where the file system can."""
        if not self._clones:
            return False
        import fcntl  # not on every system

        self._flush()
        with open_data(tensor) as file:
            wanted = struct.pack("=qQQQ", file.fileno(), start, end - start, self.size_bytes)
            try:
                fcntl.ioctl(self._handle, _FICLONERANGE, wanted)
            except OSError:
                # Another file system, or one without; what else may be wrong, writing will tell.
                self._clones = False
                return False
        self.size_bytes += end - start
        return True

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


def _part(tensor: ir.ExternalTensor, start: int, end: int) -> ir.ExternalTensor:
    """The bytes of a tensor from one offset in its file to another."""
    size = end - start
    return ir.ExternalTensor(
        tensor.path, start, size, ir.DataType.UINT8, shape=ir.Shape([size]), name=tensor.name or ""
    )


def _next_offset(position: int, tensor: ir.TensorProtocol) -> int:
    """The first offset from a position on at which to write the tensor.

    One from external data keeps its place relative to aligned addresses, a large one relative to
    blocks. Such tensors are written in the order of their old offsets, so this never takes them
    beyond those, and the new file is no longer than the old one.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return position + -position % ALIGNMENT_BYTES
    alignment = BLOCK_BYTES if tensor.nbytes >= CLONED_BYTES else ALIGNMENT_BYTES
    return position + ((tensor.offset or 0) - position) % alignment
