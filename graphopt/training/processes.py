"""The processes of a run: how they meet, add up numbers, and learn that one of them is lost.

`torchrun` states in the environment which process this is (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). Without it there is one process and no process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from graphopt.errors import ConfigError, GraphoptError, TrainingFailed

CAUSE_KEY: Final = "graphopt/cause"
"""Where the first process that fails leaves a word for the others."""
CAUSE_WAIT_S: Final = 2.0
"""How long they look for it: who was killed has left none."""
NO_WORD: Final = "it left no word: it was killed, crashed, or is stuck"


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where it computes.
        timeout_s: how long it waits for the others.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float

    @property
    def first(self) -> bool:
        """This is the process that writes files, logs and progress."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float], group: ProcessGroup | None = None) -> list[float]:
        """The sums of numbers over the processes of a group; of all if None."""
        if self.size == 1:
            return list(numbers)
        # As float64: the same on each process, and exact enough for a loss of any batch.
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=group)
        sums: list[float] = tensor.tolist()
        return sums

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum([0.0])

    def mesh(self, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
        """The processes as a grid, the last axis of neighbours.

        Args:
            sizes: of the axes; their product is `size`.
            names: of the axes.
        """
        grid = torch.arange(self.size).reshape(*sizes)
        groups = [self._group_along(grid, axis) for axis in range(grid.ndim)]
        # Groups that a mesh makes by itself would wait for half an hour.
        return DeviceMesh.from_group(
            groups if len(groups) > 1 else groups[0],
            self.device.type,
            mesh=grid,
            mesh_dim_names=tuple(names),
        )

    def _group_along(self, grid: torch.Tensor, axis: int) -> ProcessGroup:
        lines = grid.movedim(axis, -1).reshape(-1, grid.shape[axis]).tolist()
        timeout = timedelta(seconds=self.timeout_s)
        groups = [dist.new_group(line, timeout=timeout) for line in lines]
        own: ProcessGroup = next(
            group for line, group in zip(lines, groups, strict=True) if self.rank in line
        )
        return own


@contextmanager
def told_to_torchrun() -> Iterator[None]:
    """Leave what is raised within where torchrun looks for what to print."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
        raise


@contextmanager
def joined(timeout_s: float, wanted: str) -> Iterator[World]:
    """Meet the other processes of the run, or be the only one.

    A process group that the caller has made is used as it is.

    Args:
        timeout_s: how long to wait for another process, at the start and in each collective.
        wanted: the kind of device: auto, cpu or cuda.

    Raises:
        ConfigError: there is no such device.
        TrainingFailed: a process did not come, or was lost later on.
    """
    device = _device(wanted)
    if not dist.is_initialized() and "RANK" not in os.environ:
        yield World(0, 1, device, timeout_s)
        return
    store = None if dist.is_initialized() else _arrive(timeout_s, device)
    world = World(dist.get_rank(), dist.get_world_size(), device, timeout_s)
    try:
        yield world
    except Exception as error:
        if is_loss(error):
            raise TrainingFailed(
                f"process {world.rank} of {world.size} stopped, because another one was lost or "
                f"did not answer within {timeout_s:g} s; {_cause(store)} ({_line(error)})"
            ) from error
        if store is not None:
            # The process that keeps the words may be gone; the error is raised all the same.
            with suppress(RuntimeError):
                store.compare_set(CAUSE_KEY, "", f"process {world.rank}: {_line(error)}")
        raise
    finally:
        if store is not None:
            dist.destroy_process_group()


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(
            "training.device is cuda, and torch finds no CUDA device; give cpu or auto"
        )
    if wanted == "cpu" or not there:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"there are {torch.cuda.device_count()} CUDA devices on this machine, and more "
            "processes; start as many processes as there are devices"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _arrive(timeout_s: float, device: torch.device) -> Store:
    timeout = timedelta(seconds=timeout_s)
    # Objects and checkpoints go over the CPU also where tensors do not.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    size = os.environ.get("WORLD_SIZE", "?")
    try:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        store = PrefixStore("graphopt", store)
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except ValueError as error:
        raise ConfigError(
            f"the processes of a run are told of each other by the environment: {error}; start "
            "them with torchrun"
        ) from None
    except RuntimeError as error:
        raise TrainingFailed(
            f"not all of {size} processes came within {timeout_s:g} s ({_line(error)})"
        ) from error
    return store


def is_loss(error: BaseException) -> bool:
    """Whether a collective failed, as against anything else that a process can fail of."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)


def _cause(store: Store | None) -> str:
    if store is None:
        return "see there for the cause"
    end = time.monotonic() + CAUSE_WAIT_S
    try:
        while not store.check([CAUSE_KEY]) and time.monotonic() < end:
            time.sleep(CAUSE_WAIT_S / 20)
        if store.check([CAUSE_KEY]):
            return f"the cause is with {store.get(CAUSE_KEY).decode()}"
    except RuntimeError:
        # The process that kept the words is the lost one.
        return NO_WORD
    return NO_WORD


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) < 400 else f"{text[:400]}..."
    return shown if isinstance(error, GraphoptError) else f"{type(error).__name__}: {shown}"
