"""Results kept on disk, by a hash of all that they depend on, so that no work is done twice."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError


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
        """The result of that key; None where there is none, or what is there is damaged."""
        try:
            return json.loads(self._path(key).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, result: Any) -> None:
        """Keep a result.

        Raises:
            GraphoptError: the folder cannot be written.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "w") as file:
                json.dump(result, file)
            Path(name).replace(path)
        except OSError as error:
            raise self._unwritable(error) from error

    def check(self) -> None:
        """See that the folder can be written, before hours of work are to be kept in it.

        Raises:
            GraphoptError: it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> GraphoptError:
        return GraphoptError(
            f"the cache {self.folder} cannot be written ({error.strerror}); "
            "give another folder with --cache"
        )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def default_folder() -> Path:
    """The user's folder for caches: of XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "graphopt"
