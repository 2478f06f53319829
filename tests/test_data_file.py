"""Data files: every tensor is there, at an aligned offset, whatever the file system can do."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import data_file
from graphopt.data_file import (
    ALIGNMENT_BYTES,
    BLOCK_BYTES,
    BUFFER_BYTES,
    CLONED_BYTES,
    DataFile,
)

SIZES_BYTES = (
    1,
    0,
    BLOCK_BYTES,
    BLOCK_BYTES - 1,
    BUFFER_BYTES,
    BUFFER_BYTES + 1,
    2 * BUFFER_BYTES - ALIGNMENT_BYTES,
    3,
)
DIRECT = getattr(os, "O_DIRECT", 0)


def tensors() -> list[ir.Tensor[np.ndarray]]:
    generator = np.random.default_rng(0)
    return [ir.Tensor(generator.integers(0, 256, size, np.uint8)) for size in SIZES_BYTES]


def write(path: Path, given: list[ir.Tensor[np.ndarray]]) -> list[int]:
    with DataFile(path) as file:
        offsets = [file.append(tensor) for tensor in given]
        file.sync()
        assert path.stat().st_size == file.size_bytes
    return offsets


def check(path: Path) -> None:
    given = tensors()
    offsets = write(path, given)
    content = np.fromfile(path, np.uint8)
    end = 0
    for tensor, offset in zip(given, offsets, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert not content[end:offset].any()
        end = offset + tensor.nbytes
        np.testing.assert_array_equal(content[offset:end], tensor.numpy())
    assert end == content.size


def test_every_tensor_is_at_its_offset(tmp_path: Path) -> None:
    check(tmp_path / "data")


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\xff" * (8 * BUFFER_BYTES))
    check(path)


@pytest.mark.skipif(not DIRECT, reason="this system has no direct writes")
def test_a_file_system_may_refuse_to_open_for_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open, refused = os.open, []

    def without_direct(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain_open(path, flags, mode)

    monkeypatch.setattr(data_file.os, "open", without_direct)
    check(tmp_path / "data")
    assert refused


@pytest.mark.skipif(not DIRECT, reason="this system has no direct writes")
def test_a_file_system_may_open_for_direct_writes_and_refuse_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    plain_write, refused = os.pwrite, []

    def without_direct(handle: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain_write(handle, data, offset)

    monkeypatch.setattr(data_file.os, "pwrite", without_direct)
    check(tmp_path / "data")
    assert refused == [0]


def test_writes_may_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_write = os.pwrite

    def short(handle: int, data: Any, offset: int) -> int:
        return plain_write(handle, data[: max(BLOCK_BYTES, len(data) // 3 & -BLOCK_BYTES)], offset)

    monkeypatch.setattr(data_file.os, "pwrite", short)
    check(tmp_path / "data")


def test_external_data_keeps_its_alignment_and_never_grows(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(np.random.default_rng(1).bytes(50_000))
    given = [
        ir.ExternalTensor(
            source, offset, length, ir.DataType.UINT8, shape=ir.Shape([length]), name=""
        )
        for offset, length in ((5, 100), (112, 5000), (5120, 44_880))
    ]
    path = tmp_path / "data"
    with DataFile(path) as file:
        offsets = [file.append(tensor) for tensor in given]
        file.sync()
    content, original = path.read_bytes(), source.read_bytes()
    assert len(content) <= len(original)
    for tensor, offset in zip(given, offsets, strict=True):
        assert (offset - (tensor.offset or 0)) % ALIGNMENT_BYTES == 0
        old = original[tensor.offset : (tensor.offset or 0) + tensor.nbytes]
        assert content[offset : offset + tensor.nbytes] == old


def scattered(folder: Path) -> tuple[Path, list[ir.ExternalTensor]]:
    """Tensors of a file: large and small, side by side and apart, at even and odd offsets."""
    source, generator = folder / "source", np.random.default_rng(2)
    tensors, offset = [], 5
    for size in (CLONED_BYTES, 100, CLONED_BYTES + 4097, 3 * CLONED_BYTES, 5000, CLONED_BYTES - 1):
        shape = ir.Shape([size])
        tensors.append(
            ir.ExternalTensor(source, offset, size, ir.DataType.UINT8, shape=shape, name="")
        )
        offset += size + int(generator.choice([0, 64, 7000]))
    source.write_bytes(generator.bytes(offset))
    return source, tensors


def check_scattered(folder: Path) -> None:
    source, given = scattered(folder)
    original = np.fromfile(source, np.uint8)
    in_memory = [
        ir.Tensor(np.full(size, 7, np.uint8)) for size in (3, BUFFER_BYTES + 1, 9, 1, 2, 4)
    ]
    path = folder / "data"
    with DataFile(path) as file:
        offsets = []
        for tensor, other in zip(given, in_memory, strict=True):
            offsets.append(file.append(tensor))
            file.append(other)
        file.sync()
        assert path.stat().st_size == file.size_bytes
    content = np.fromfile(path, np.uint8)
    for tensor, offset in zip(given, offsets, strict=True):
        start = tensor.offset or 0
        np.testing.assert_array_equal(
            content[offset : offset + tensor.nbytes], original[start : start + tensor.nbytes]
        )


def test_large_tensors_of_other_files_are_there_with_or_without_shared_blocks(
    tmp_path: Path,
) -> None:
    check_scattered(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are shared on Linux only")
def test_a_file_system_may_share_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    ranges = []

    def clone(handle: int, request: int, argument: bytes) -> int:
        """What Btrfs and XFS do, by copying."""
        source, start, length, target = struct.unpack("=qQQQ", argument)
        assert request == 0x4020940D
        assert start % BLOCK_BYTES == length % BLOCK_BYTES == target % BLOCK_BYTES == 0
        assert length > 0
        content = os.pread(source, length, start)
        assert len(content) == length
        # The handle is one for direct writes.
        with open(f"/proc/self/fd/{handle}", "r+b") as file:
            file.seek(target)
            file.write(content)
        ranges.append(length)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    check_scattered(tmp_path)
    assert len(ranges) == 3
    assert sum(ranges) >= 5 * CLONED_BYTES - 3 * BLOCK_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are shared on Linux only")
@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_that_shares_no_blocks_is_asked_once(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    asked = []

    def refuse(*arguments: Any) -> int:
        asked.append(arguments)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    check_scattered(tmp_path)
    assert len(asked) == 1
