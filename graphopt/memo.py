"""Arrays that are dear to compute, kept on disk while a search builds one model after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from graphopt.probe_cache import whole_file


@dataclass(frozen=True)
class Memo:
    """A folder of arrays. Processes may share it: a file appears whole, or not at all.

    Attributes:
        folder: made where it is not there.
    """

    folder: Path

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a key; None where there are none, or what is there is damaged.

        Args:
            key: a text that says all that the arrays depend on.
        """
        try:
            with np.load(self._path(key), allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (FileNotFoundError, BadZipFile, EOFError, ValueError):
            return None

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays of numpy's own types; others are not kept.

        Raises:
            OSError: the folder is full, or cannot be written.
        """
        if not all(array.dtype.isbuiltin == 1 for array in arrays.values()):
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _path(self, key: str) -> Path:
        return self.folder / f"{sha256(key.encode()).hexdigest()}.npz"
