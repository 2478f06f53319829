"""A run that loses a process ends, in time and with the cause."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from training_runs import (  # noqa: E402
    PLAN,
    command,
    start,
    table,
    torchrun,
    write_toml,
)

TIMEOUT_S = 8
LIMIT_S = 60
"""For what takes the timeout and the start of processes on a busy machine; a hang takes more."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "tensor": {"plan": PLAN},
    "pipeline": {"stages": ["layers.1"], "microbatches": 5},
}


def _config(folder: Path, how: str, strategy: str = "ddp", rank: int = 1) -> str:
    content = table(
        data={"factory": "training_runs:failing", "options": {"how": how, "rank": rank}},
        strategy={"name": strategy, "timeout_s": TIMEOUT_S, **STRATEGIES[strategy]},
    )
    return str(write_toml(folder / "run.toml", content))


def _two(config: str, ranks: tuple[int, ...] = (0, 1)) -> dict[int, Popen[str]]:
    """Processes that are told of each other without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        rank: start(
            command(config),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in ranks
    }


def _ended(process: Popen[str]) -> str:
    """What a process has said in the end, which comes in time."""
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, errors
    lines = errors.strip().splitlines()
    assert lines[-1].startswith("graphopt: error: ")
    return lines[-1]


def test_the_cause_of_a_process_that_fails_is_told_by_the_others(tmp_path: Path) -> None:
    processes = _two(_config(tmp_path, "raise"))

    told = _ended(processes[0])

    assert "process 0 of 2 stopped, because another one was lost" in told
    _, _, cause = told.partition("the cause is with process 1: sample ")
    assert "raised ValueError: the file of this sample is broken" in cause
    _, errors = processes[1].communicate(timeout=LIMIT_S)
    assert "ValueError: the file of this sample is broken" in errors
    assert processes[1].returncode == 1


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run(rank: int, tmp_path: Path) -> None:
    processes = _two(_config(tmp_path, "kill", rank=rank))

    told = _ended(processes[1 - rank])

    assert f"process {1 - rank} of 2 stopped, because another one was lost" in told
    assert "it was killed, crashed, or is stuck" in told
    assert processes[rank].wait(LIMIT_S) == -9


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["exit", "kill", "sleep"])
def test_whatever_the_strategy_a_lost_process_ends_the_run(
    how: str, strategy: str, tmp_path: Path
) -> None:
    processes = _two(_config(tmp_path, how, strategy))
    started = time.monotonic()

    told = _ended(processes[0])

    processes[1].kill()
    processes[1].communicate()
    assert "another one was lost or did not answer within 8 s" in told
    assert time.monotonic() - started < LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_forever(rank: int, tmp_path: Path) -> None:
    (process,) = _two(_config(tmp_path, "raise"), ranks=(1 - rank,)).values()

    assert f"not all of 2 processes came within {TIMEOUT_S} s" in _ended(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("raise", "ValueError: the file of this sample is broken"),
        ("kill", "Signal 9 (SIGKILL)"),
        ("exit", "exitcode  : 3"),
        ("sleep", "did not answer within 8 s"),
    ],
)
def test_torchrun_ends_with_the_cause(how: str, cause: str, tmp_path: Path) -> None:
    process = start(torchrun(2, _config(tmp_path, how)))

    _, errors = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 1
    _, found, summary = errors.partition("Root Cause (first observed failure)")
    assert found
    assert cause in summary


@pytest.mark.slow
def test_a_strategy_of_more_processes_than_there_are_is_told_by_each(tmp_path: Path) -> None:
    content = table(strategy={"name": "ddp", "sizes": [3]})
    processes = _two(str(write_toml(tmp_path / "run.toml", content)))

    for process in processes.values():
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 2
        assert "takes 3 processes, and there are 2; start them with torchrun" in errors
