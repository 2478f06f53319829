"""Results on disk: whole or not at all, whoever else writes, and never what is damaged."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graphopt.errors import SearchStopped
from graphopt.probe_cache import (
    SCHEMA_VERSION,
    ProbeCache,
    cache_key,
    default_folder,
    whole_file,
)

RESULT = [{"layer": "ä, \"b\": 'c'", "divergence": math.inf, "loss": None, "saved_bytes": -3}]


def file_of(cache: ProbeCache) -> Path:
    (found,) = cache.folder.rglob("*.json")
    return found


def test_a_result_comes_back(tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path / "not" / "there")

    cache.put("ab12", RESULT)

    assert cache.get("ab12") == RESULT
    assert cache.get("ab13") is None
    assert json.loads(file_of(cache).read_text())["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("result", [RESULT, 0.97123, "text", {"a": 1}])
def test_of_a_file_that_was_cut_nothing_is_taken(tmp_path: Path, result: object) -> None:
    cache = ProbeCache(tmp_path)
    cache.put("ab12", result)
    path = file_of(cache)
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert cache.get("ab12") is None
    cache.put("ab12", result)
    assert cache.get("ab12") == result


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[]", b"3", b"null", b'{"result": 3}', b'{"schema_version": 0}']
)
def test_of_another_form_nothing_is_taken(tmp_path: Path, content: bytes) -> None:
    cache = ProbeCache(tmp_path)
    cache.put("ab12", RESULT)

    file_of(cache).write_bytes(content)

    assert cache.get("ab12") is None


def test_where_there_is_no_folder_it_says_so_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ProbeCache(tmp_path / "file")

    for attempt in (cache.check, lambda: cache.put("ab", 1), lambda: cache.get("ab")):
        with pytest.raises(SearchStopped, match=r"file cannot be used .*give another folder with"):
            attempt()


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    ProbeCache(tmp_path / "new").check()

    assert list((tmp_path / "new").iterdir()) == []


def test_many_may_write_one_result(tmp_path: Path) -> None:
    cache = ProbeCache(tmp_path)

    def write_and_read(number: int) -> object:
        cache.put("ab12", [number] * 1000)
        return cache.get("ab12")

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(write_and_read, range(200)))

    assert all(len(set(one)) == 1 and len(one) == 1000 for one in found)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_of_what_fails_half_way_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise OSError("full")

    assert list(tmp_path.iterdir()) == []


def test_keys_tell_parts_apart() -> None:
    assert cache_key("a", "bc") != cache_key("ab", "c")
    assert cache_key("a") == cache_key("a")


def test_the_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert default_folder() == tmp_path / "graphopt"
