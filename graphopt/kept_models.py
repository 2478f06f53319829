"""Models that a search built, kept until it ends, so that one that was interrupted finds them."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import SearchStopped


@contextmanager
def kept_models(cache: Path, key: str) -> Iterator[Path]:
    """A folder for models; what is in it goes when the search ends, and stays when it fails.

    While a search has it, another one that asks for the same has an empty one of its own.

    Args:
        cache: the folder of the cache; made where it is not there.
        key: a hash of what is searched for.

    Raises:
        SearchStopped: the cache cannot be written.
    """
    folder = cache / "models" / key
    lock = folder.with_suffix(".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise SearchStopped(
            f"the cache {cache} cannot be used ({error.strerror}); give another folder with --cache"
        ) from error
    with file:
        try:
            # It ends with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with tempfile.TemporaryDirectory(prefix="graphopt-") as other:
                yield Path(other)
            return
        # The one that had it may have ended since and taken the folder away; never the lock: two
        # could have one each.
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
