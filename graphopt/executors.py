"""Where probes run: processes of this machine, a Dask cluster, or an executor of the caller's.

All are executors as `concurrent.futures` defines them. Every worker
computes with one thread, so that what it finds does not depend on where it runs.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from graphopt.errors import GraphoptError, SearchStopped, SpecError
from graphopt.trial import packed

PROCESSES, DASK = "processes", "dask://"

CONNECT_SECONDS = 20

Result = TypeVar("Result")


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

    def submit(self, work: Callable[..., Result], *args: Any) -> Future[Result]:
        """Begin with work.

        Raises:
            SearchStopped: there is no worker left to do it.
        """
        try:
            return self.executor.submit(work, *args)
        except RuntimeError as error:
            raise _lost(error) from error


def result_of(future: Future[Result]) -> Result:
    """What came of the work.

    Raises:
        SearchStopped: its worker was lost, or failed in a way that is not the model's.
        GraphoptError: what the work itself raised.
    """
    try:
        return future.result()
    except GraphoptError:
        raise
    except (Exception, CancelledError) as error:  # an executor's own: they differ in all of them
        raise _lost(error) from error


def _lost(error: BaseException) -> SearchStopped:
    return SearchStopped(
        f"a worker was lost, or failed ({type(error).__name__}: {error}); what was found is kept, "
        "and the same call goes on from there (called from a script, it has to stand under "
        "`if __name__ == '__main__':`)"
    )


@contextmanager
def open_workers(spec: str | Executor | None, count: int | None = None) -> Iterator[Workers]:
    """Workers for as long as they are needed.

    Args:
        spec: "processes" (also None), "dask://HOST:PORT" of a scheduler, or an executor that sees
            the files of this machine; it stays open.
        count: of processes; by default as many as this process may use cores.

    Raises:
        SpecError: the text is neither, or the count is not above 0.
        GraphoptError: Dask is not installed, or there is no cluster.
    """
    if count is not None and count < 1:
        raise SpecError(f"jobs is {count}; it must be 1 or more")
    cores = len(os.sched_getaffinity(0))
    spec = spec or PROCESSES
    if isinstance(spec, Executor):
        # Threads share one limit: those that end must not lift it for others.
        with threadpool_limits(1):
            yield Workers(spec, count or cores, str, shares_disk=True)
    elif spec == PROCESSES:
        yield from _processes(count or cores)
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
        sent: dict[Path, Any] = {}

        def share(folder: Path) -> Any:
            if folder not in sent:
                content = packed(folder)
                try:
                    sent[folder] = client.scatter(content, broadcast=True)
                except Exception as error:  # Dask's own: they differ by what was lost, and when
                    raise _lost(error) from error
            return sent[folder]

        yield Workers(client.get_executor(), count, share, shares_disk=False)
