"""Checkpoints of a run (`torch.distributed.checkpoint`), whole or not there.

A checkpoint `step-N` is written under another name, in pieces by all processes, and renamed by the
first of them when it is complete; then the file `latest` is replaced by one that names it. It holds
the learner, the optimizer, the loss scale, the best epoch so far and the random states of all
processes; the rest follows from the number of steps. `run.json` in it has what a run that resumes
must agree with, and the size and CRC-32 of every file.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_pieces
from torch.distributed.checkpoint.state_dict_saver import save as save_pieces

from graphopt.errors import ConfigError, TrainingFailed
from graphopt.training.config import Table
from graphopt.training.precision import LossScale
from graphopt.training.processes import World, is_loss
from graphopt.training.strategy import Strategy

SCHEMA_VERSION: Final = 1
LATEST: Final = "latest"
RUN: Final = "run.json"
BY_NAME: Final = StateDictOptions(flatten_optimizer_state_dict=True)
"""State of the optimizer by parameter name: stages of a pipeline have different ones."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        best: the best value of the metric so far, after which epoch it was; None before the first.
        best_state: the module as it was then, as this process holds it; None if it is not kept.
    """

    step: int = 0
    best: tuple[float, int] | None = None
    best_state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in one folder.

    Attributes:
        folder: made by `check`, or when the first one is written.
        keep: so many, the newest, stay.
        curve: what a run must agree with to go on from one (`Config.curve`).
    """

    folder: Path
    keep: int
    curve: Table = field(repr=False)

    def latest(self) -> Path | None:
        """The newest one; None if there is none.

        Raises:
            ConfigError: the folder names one that is not there.
        """
        pointer = self.folder / LATEST
        if not pointer.is_file():
            return None
        found = self.folder / pointer.read_text(encoding="utf-8").strip()
        if found.parent != self.folder or not found.is_dir():
            raise ConfigError(
                f"{pointer} names a checkpoint that is not there; let it name one that is, or "
                "remove it to start again"
            )
        return found

    def check(self, world: World) -> None:
        """Raise ConfigError where not all processes can write to the folder, and see the same.

        All of them call this.
        """
        probe = self.folder / ".probe"
        try:
            if world.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
            reason = ""
        except OSError as error:
            reason = error.strerror or str(error)
        world.barrier()
        seen = int(bool(reason) or probe.is_file())
        together = world.sum([seen])[0] == world.size
        if world.first and not reason:
            probe.unlink()
        if reason:
            raise ConfigError(f"cannot write to checkpoint.folder {self.folder}: {reason}")
        if not together:
            raise ConfigError(
                f"checkpoint.folder {self.folder} is not the same for all processes; give one on a "
                "file system that all machines share"
            )

    def save(
        self,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        scale: LossScale,
        progress: Progress,
    ) -> None:
        """Write a checkpoint; all processes call this."""
        name = f"step-{progress.step:08d}"
        written = self.folder / f".{name}.part"
        if strategy.world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Those of a process that was killed, too.
            for left in self.folder.glob(".step-*.part"):
                shutil.rmtree(left)
        strategy.world.barrier()
        state = _state(strategy, optimizer, scale, progress.best_state)
        try:
            with _alone(strategy.world.size):
                save_pieces(state, checkpoint_id=written)
        except CheckpointException as error:
            raise TrainingFailed(
                f"the checkpoint {self.folder / name} cannot be written: {_cause(error)}"
            ) from error
        strategy.world.barrier()
        if strategy.world.first:
            self._complete(written, name, strategy.world.size, progress)
        strategy.world.barrier()

    def _complete(self, written: Path, name: str, processes: int, progress: Progress) -> None:
        run = {
            "schema_version": SCHEMA_VERSION,
            "step": progress.step,
            "best": progress.best,
            "has_best_state": progress.best_state is not None,
            "processes": processes,
            "curve": self.curve,
            "files": {file.name: _fingerprint(file) for file in sorted(written.iterdir())},
        }
        _write_synced(written / RUN, json.dumps(run))
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
        pointer = self.folder / f".{LATEST}.part"
        _write_synced(pointer, name)
        pointer.replace(self.folder / LATEST)
        older = sorted(self.folder.glob("step-*"))[: -self.keep]
        for folder in older:
            shutil.rmtree(folder)

    def load(
        self,
        path: Path,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        scale: LossScale,
    ) -> Progress:
        """Take the state of a checkpoint; all processes call this.

        Raises:
            ConfigError: it is damaged, or of another run.
        """
        run = self._checked(path, strategy.world.size)
        best_state = strategy.module_state() if run["has_best_state"] else None
        state = _state(strategy, optimizer, scale, best_state)
        of_optimizer = state["optimizer"]
        try:
            kept = FileSystemReader(path).read_metadata().state_dict_metadata
            # Parameters that have had no gradient yet have no state there.
            state["optimizer"] = {k: v for k, v in of_optimizer.items() if f"optimizer.{k}" in kept}
            with _alone(strategy.world.size):
                load_pieces(state, checkpoint_id=path)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            if is_loss(error):
                raise
            raise ConfigError(f"the checkpoint {path} cannot be read: {_cause(error)}") from error
        set_model_state_dict(strategy.learner, state["learner"])
        found = state["optimizer"]
        whole = {**of_optimizer, **found}
        set_optimizer_state_dict(strategy.learner, optimizer, whole, options=BY_NAME)
        _forget(strategy, optimizer, found)
        scale.restore(state["loss_scale"])
        _set_random_state(state[f"random.{strategy.world.rank}"])
        best = run["best"]
        return Progress(run["step"], None if best is None else tuple(best), state.get("best"))

    def _checked(self, path: Path, processes: int) -> Table:
        hint = "remove it and let the file `latest` name another, or start again elsewhere"
        try:
            run: Table = json.loads((path / RUN).read_text(encoding="utf-8"))
            files: Table = run["files"]
            version = run["schema_version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path} is no checkpoint of graphopt, or is damaged; {hint}"
            ) from None
        if version != SCHEMA_VERSION:
            raise ConfigError(f"{path} is of another version of graphopt; start again elsewhere")
        for name, expected in files.items():
            file = path / name
            if not file.is_file() or _fingerprint(file) != expected:
                raise ConfigError(f"the checkpoint {path} is damaged, in {name}; {hint}")
        if run["processes"] != processes:
            raise ConfigError(
                f"the checkpoint {path} is of {run['processes']} processes, and there are "
                f"{processes}; start as many"
            )
        # As JSON has them, without tuples.
        differing = list(_differences(run["curve"], json.loads(json.dumps(self.curve))))
        if differing:
            raise ConfigError(
                f"the checkpoint {path} is of a run with another {', '.join(differing)}; go on "
                "with the same configuration, or give another checkpoint.folder"
            )
        return run


def _state(
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    best_state: dict[str, Any] | None,
) -> dict[str, Any]:
    state = {
        "learner": get_model_state_dict(strategy.learner),
        "optimizer": get_optimizer_state_dict(strategy.learner, optimizer, options=BY_NAME),
        "loss_scale": scale.state(),
        f"random.{strategy.world.rank}": _random_state(),
    }
    return state if best_state is None else {**state, "best": best_state}


def _forget(strategy: Strategy, optimizer: torch.optim.Optimizer, found: Table) -> None:
    """Leave without state in an optimizer what has none in a checkpoint."""
    named = strategy.learner.named_parameters(remove_duplicate=False)
    have = {id(p) for name, p in named if any(key.startswith(f"state.{name}.") for key in found)}
    for parameter in [p for p in optimizer.state if id(p) not in have]:
        del optimizer.state[parameter]


def _cause(error: BaseException) -> str:
    """What the first process that failed stumbled over; the engine tells all with tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}"


@contextmanager
def _alone(processes: int) -> Iterator[None]:
    """Within, torch does not warn of what is meant: one process that writes without a group."""
    with warnings.catch_warnings():
        if processes == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _differences(old: Table, new: Table, within: str = "") -> list[str]:
    """The keys whose values differ, as `section.key`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{within}{key}.")
        elif one != other:
            found.append(f"{within}{key}")
    return found


def _fingerprint(file: Path) -> list[int]:
    """Bytes and CRC-32."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return [file.stat().st_size, checksum]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
