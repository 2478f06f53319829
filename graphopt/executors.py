"""Where probes run: processes of this machine, or a Dask cluster.

Both are executors as `concurrent.futures` defines them, so any other one serves too. Every worker
computes with one thread, so that what it finds does not depend on where it runs.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, SpecError
from graphopt.trial import packed

PROCESSES, DASK = "processes", "dask://"

CONNECT_SECONDS = 20


@dataclass(frozen=True)
class Workers:
    """What runs probes.

    Attributes:
        executor: of `concurrent.futures`.
        count: how many work at a time.
        share: makes of the folder of a trial what a worker opens it by.
        shares_disk: workers see this machine's files.
    """

    executor: Executor
    count: int
    share: Callable[[Path], Any]
    shares_disk: bool


@contextmanager
def open_workers(spec: str | None, count: int | None = None) -> Iterator[Workers]:
    """Workers for as long as they are needed.

    Args:
        spec: "processes" (also None), or "dask://HOST:PORT" of a scheduler.
        count: of processes; by default as many as this process may use cores.

    Raises:
        SpecError: the text is neither.
        GraphoptError: Dask is not installed, or there is no cluster.
    """
    spec = spec or PROCESSES
    if spec == PROCESSES:
        yield from _processes(count or len(os.sched_getaffinity(0)))
    elif spec.startswith(DASK):
        yield from _cluster(spec.removeprefix(DASK))
    else:
        raise SpecError(f"{spec!r} is no executor; write processes, or dask://HOST:PORT")


def _processes(count: int) -> Iterator[Workers]:
    # Not forked: onnxruntime's and BLAS's threads would be missing in a child.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, context, initializer=_end_with_parent)
    try:
        yield Workers(executor, count, str, shares_disk=True)
    finally:
        # What still runs is for nothing, and `shutdown` would wait for it.
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cluster(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError:
        raise GraphoptError(
            "--executor dask://... needs Dask: pip install 'graphopt[dask]'"
        ) from None
    try:
        client = Client(f"tcp://{address}", timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise GraphoptError(
            f"there is no Dask scheduler at {address} ({error}); start one with `dask scheduler`, "
            "and workers with `dask worker`"
        ) from error
    with client:
        count = sum(client.nthreads().values())
        if not count:
            raise GraphoptError(
                f"the Dask cluster at {address} has no workers; start `dask worker`"
            )
        yield Workers(
            client.get_executor(),
            count,
            lambda folder: client.scatter(packed(folder), broadcast=True),
            shares_disk=False,
        )
