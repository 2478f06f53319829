"""Models stay for a search that was interrupted, and are one search's at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import SearchStopped
from graphopt.kept_models import kept_models


def test_they_go_when_the_search_ends(tmp_path: Path) -> None:
    with kept_models(tmp_path, "key") as folder:
        (folder / "a.onnx").write_text("a")

    assert not folder.exists()


def test_they_stay_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(SearchStopped), kept_models(tmp_path, "key") as folder:
        (folder / "a.onnx").write_text("a")
        raise SearchStopped("a worker was lost")

    with kept_models(tmp_path, "key") as again:
        assert [path.name for path in again.iterdir()] == ["a.onnx"]
    with kept_models(tmp_path, "other") as other:
        assert list(other.iterdir()) == []


def test_two_searches_at_a_time_have_one_each(tmp_path: Path) -> None:
    with kept_models(tmp_path, "key") as first:
        (first / "a.onnx").write_text("a")
        with kept_models(tmp_path, "key") as second:
            assert second != first
            assert list(second.iterdir()) == []
        assert (first / "a.onnx").exists()
        assert not second.exists()


def test_a_process_that_is_killed_gives_them_free(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from graphopt.kept_models import kept_models
with kept_models(Path({str(tmp_path)!r}), "key") as folder:
    (folder / "a.onnx").write_text("a")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9

    with kept_models(tmp_path, "key") as folder:
        assert (folder / "a.onnx").exists()


def test_a_cache_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with (
        pytest.raises(SearchStopped, match="give another folder"),
        kept_models(tmp_path / "file", "key"),
    ):
        pass
