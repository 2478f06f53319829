"""Processes that heal beside this one: data parallel on one machine."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path

import onnx_ir as ir
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from graphopt import loading, saving
from graphopt.errors import GraphoptError
from graphopt.sample_files import read_npz, write_npz
from graphopt.samples import Samples
from graphopt.signature import signature
from graphopt.training.healing import Budget, Healing, Material
from graphopt.training.ranks import Ranks

TIMEOUT_S = 300
"""A process that says nothing for so long is taken for dead."""

WAIT_S = 0.05
"""Between two looks at whether the others are there."""


@dataclass(frozen=True)
class Work:
    """What a process beside this one is told.

    Attributes:
        folder: of the models, the samples and the file by which processes find each other.
        ranks: how many processes there are.
        state: see `Material`.
        seed: see `Material`.
        budget: of the healing.
        device: "cpu" or "cuda".
        threads: of torch in each process.
    """

    folder: Path
    ranks: int
    state: tuple[tuple[str, str], ...]
    seed: int
    budget: Budget
    device: str
    threads: int

    def ready(self, rank: int) -> Path:
        """The file that says that a process is about to join."""
        return self.folder / f"ready{rank}"


@contextmanager
def beside(
    processes: int, optimized: ir.Model, material: Material, budget: Budget, device: str
) -> Iterator[Ranks]:
    """Start the other processes, and be the first of them.

    Args:
        processes: with this one; 1 starts none.
        optimized: the model that is healed.
        material: what it learns from.
        budget: of the healing.
        device: "cpu" or "cuda", where each process takes the device of its number.

    Raises:
        GraphoptError: one of them died.
    """
    if processes == 1:
        yield Ranks()
        return
    threads = max(1, torch.get_num_threads() // processes)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        work = Work(Path(name), processes, material.state, material.seed, budget, device, threads)
        _write(work, optimized, material)
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_heal, args=(rank, work), daemon=True)
            for rank in range(1, processes)
        ]
        for process in others:
            process.start()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            _await(others, work)
            _join(0, work)
            yield Ranks(0, processes)
        except RuntimeError as error:
            for process in others:
                process.join(timeout=5)
            if all(process.exitcode is None for process in others):
                raise
            raise GraphoptError(_last_words(others)) from error
        finally:
            torch.set_num_threads(before)
            if dist.is_initialized():
                dist.destroy_process_group()
            for process in others:
                process.kill()
                process.join()


def _last_words(others: Sequence[SpawnProcess]) -> str:
    """What became of the other processes: of those that ended, the cause."""
    told = []
    for number, process in enumerate(others, start=2):
        if process.exitcode is not None and process.exitcode < 0:
            killer = signal.Signals(-process.exitcode).name
            told.append(f"process {number} of {len(others) + 1} was killed by {killer}")
        elif process.exitcode is not None:
            told.append(f"process {number} of {len(others) + 1} ended, with what is told above")
    hint = "; if memory ran out, fewer processes need less" if "SIGKILL" in "".join(told) else ""
    return "healing ended: " + "; ".join(told) + hint


def _write(work: Work, optimized: ir.Model, material: Material) -> None:
    for name, model in (("original", material.original), ("optimized", optimized)):
        saving.save(model, work.folder / f"{name}.onnx")
    for name, samples in (("training", material.training), ("held_out", material.held_out)):
        folder = work.folder / name
        folder.mkdir()
        for index, sample in enumerate(samples):
            write_npz(folder / f"{index}.npz", dict(sample))
        (folder / "sequences.json").write_text(json.dumps(samples.sequences))


def _read(folder: Path) -> Samples:
    sequences = tuple(map(tuple, json.loads((folder / "sequences.json").read_text())))
    count = sum(map(len, sequences))
    loaders = tuple(partial(read_npz, folder / f"{index}.npz") for index in range(count))
    return Samples(loaders, tuple(map(str, range(count))), sequences)


def _await(others: Sequence[SpawnProcess], work: Work) -> None:
    """Wait until all are about to join: one that dies before would be waited for in vain."""
    waiting = [work.ready(rank) for rank in range(1, work.ranks)]
    end = time.monotonic() + TIMEOUT_S
    while not all(path.exists() for path in waiting):
        if any(process.exitcode is not None for process in others):
            raise RuntimeError("before it was ready")
        if time.monotonic() > end:
            raise RuntimeError(f"no process came within {TIMEOUT_S} seconds")
        time.sleep(WAIT_S)


def _join(rank: int, work: Work) -> None:
    work.ready(rank).touch()
    # What the processes agree on is no matter of the GPU.
    backend = "cpu:gloo,cuda:nccl" if work.device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=(work.folder / "group").as_uri(),
        rank=rank,
        world_size=work.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )


def _heal(rank: int, work: Work) -> None:
    """What another process does: the same, with its share of every batch."""
    torch.set_num_threads(work.threads)
    original = loading.load(work.folder / "original.onnx")
    material = Material(
        original,
        _read(work.folder / "training"),
        _read(work.folder / "held_out"),
        signature(original),
        work.state,
        work.seed,
    )
    optimized = loading.load(work.folder / "optimized.onnx")
    _join(rank, work)
    device = torch.device(f"cuda:{rank}" if work.device == "cuda" else "cpu")
    Healing(optimized, material, device, Ranks(rank, work.ranks)).run(work.budget)
    dist.destroy_process_group()
