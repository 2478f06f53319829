"""Arrays on disk: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from graphopt.memo import Memo

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1], np.uint8)}


def test_arrays_come_back(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "new")

    memo.put("key, of: any kind/\0", ARRAYS)
    found = memo.get("key, of: any kind/\0")

    assert found is not None
    assert memo.get("other") is None
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_other_types_than_those_of_numpy_are_not_kept(tmp_path: Path) -> None:
    memo = Memo(tmp_path)

    memo.put("key", {**ARRAYS, "c": np.ones(2, ml_dtypes.bfloat16)})

    assert memo.get("key") is None


def test_of_a_file_that_was_cut_nothing_is_taken(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    memo.put("key", ARRAYS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert memo.get("key") is None


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="file"):
        Memo(tmp_path / "file").put("key", ARRAYS)
