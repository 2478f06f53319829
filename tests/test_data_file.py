"""Data files: every tensor is there, at an aligned offset, whatever the file system can do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import data_file
from graphopt.data_file import ALIGNMENT_BYTES, BLOCK_BYTES, BUFFER_BYTES, DataFile

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
