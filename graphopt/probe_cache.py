"""Results kept on disk, by a hash of all that they depend on, so that no work is done twice."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from graphopt.errors import SearchStopped

SCHEMA_VERSION = 2


def cache_key(*parts: str) -> str:
    """A name for a result that depends on these parts alone."""
    return sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ProbeCache:
    """A folder of results as JSON, one file each.

    Processes may share it: a file appears whole, or not at all.

    Attributes:
        folder: made where it is not there.
    """

    folder: Path

    def get(self, key: str) -> Any | None:
        """The result of that key; None where there is none, or what is there is damaged.

        Raises:
            SearchStopped: the folder cannot be read.
        """
        try:
            content = json.loads(self._path(key).read_text())
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise self._unusable(error) from error
        is_whole = isinstance(content, dict) and content.get("schema_version") == SCHEMA_VERSION
        return content.get("result") if is_whole else None

    def put(self, key: str, result: Any) -> None:
        """Keep a result.

        Raises:
            SearchStopped: the folder is full, or cannot be written.
        """
        path = self._path(key)
        content = json.dumps({"schema_version": SCHEMA_VERSION, "result": result})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(content.encode())
        except OSError as error:
            raise self._unusable(error) from error

    def check(self) -> None:
        """See that results can be kept, before any is computed.

        Raises:
            SearchStopped: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> SearchStopped:
        return SearchStopped(
            f"the cache {self.folder} cannot be used ({error.strerror}); give another folder with "
            "--cache"
        )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears at its path whole, or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def default_folder() -> Path:
    """The user's folder for caches: of XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "graphopt"
