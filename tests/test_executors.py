"""Where probes run, and what is said when a worker is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

from graphopt.errors import GraphoptError, ModelError, SearchStopped, SpecError
from graphopt.executors import Workers, open_workers, result_of


def end(code: int) -> None:
    os._exit(code)


def refuse() -> None:
    raise ModelError("it has a cycle")


def fail() -> None:
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize("spec", ["threads", "dask:", "dask//x", " "])
def test_what_is_no_executor_is_told(spec: str) -> None:
    message = "is no executor; write processes, or dask://HOST:PORT"
    with pytest.raises(SpecError, match=message), open_workers(spec):
        pass


@pytest.mark.parametrize("count", [0, -1])
def test_jobs_are_counted_from_one(count: int) -> None:
    message = f"jobs is {count}; it must be 1 or more"
    with pytest.raises(SpecError, match=message), open_workers(None, count):
        pass


def test_a_ready_executor_is_taken_and_stays_open() -> None:
    with ThreadPoolExecutor(2) as threads:
        with open_workers(threads, 2) as workers:
            assert (workers.executor, workers.count, workers.shares_disk) == (threads, 2, True)
            assert workers.share(Path("a")) == "a"
            assert result_of(workers.submit(abs, -3)) == 3

        assert threads.submit(abs, -4).result() == 4


def test_in_threads_of_this_process_each_has_one_and_no_more_than_before_stays() -> None:
    before = threads_of_libraries()

    with ThreadPoolExecutor(2) as threads, open_workers(threads) as workers:
        futures = [workers.submit(threads_of_libraries) for _ in range(4)]
        assert {count for future in futures for count in result_of(future)} <= {1}

    assert threads_of_libraries() == before


def threads_of_libraries() -> list[int]:
    return [found["num_threads"] for found in threadpool_info()]


def test_a_process_that_is_lost_is_told_and_so_is_that_none_is_left() -> None:
    with open_workers("processes", 1) as workers:
        assert result_of(workers.submit(abs, -3)) == 3
        lost = workers.submit(end, 7)
        with pytest.raises(SearchStopped, match=r"a worker was lost.*BrokenProcessPool.*goes on"):
            result_of(lost)
        with pytest.raises(SearchStopped, match="a worker was lost"):
            workers.submit(abs, -3)


def test_what_is_the_models_fault_stays_what_it_is() -> None:
    with ThreadPoolExecutor(1) as threads, open_workers(threads) as workers:
        with pytest.raises(ModelError, match="it has a cycle"):
            result_of(workers.submit(refuse))
        with pytest.raises(SearchStopped, match="ZeroDivisionError: by zero"):
            result_of(workers.submit(fail))


def test_what_was_cancelled_is_lost() -> None:
    future: Future[int] = Future()
    future.cancel()

    with pytest.raises(SearchStopped):
        result_of(future)


def test_an_executor_that_was_shut_down_is_told() -> None:
    threads = ThreadPoolExecutor(1)
    threads.shutdown()

    with pytest.raises(SearchStopped, match="after shutdown"):
        Workers(threads, 1, str, True).submit(abs, 1)


def test_a_cluster_that_is_not_there_is_told() -> None:
    pytest.importorskip("distributed")

    message = "there is no Dask scheduler at nowhere"
    with pytest.raises(GraphoptError, match=message), open_workers("dask://nowhere"):
        pass


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = """
import os, signal
from graphopt.executors import open_workers
if __name__ == "__main__":
    with open_workers(None, 1) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == -9
    worker = int(done.stdout)

    for _ in range(500):
        if not is_running(worker):
            return
        time.sleep(0.02)
    pytest.fail("the worker is still there")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
