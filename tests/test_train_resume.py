"""A run that was killed goes on as if nothing had been, and from nothing else."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from training_runs import (  # noqa: E402
    command,
    in_processes,
    record_of,
    start,
    table,
    tell,
    torchrun,
    write_toml,
)

from graphopt.errors import ConfigError  # noqa: E402
from graphopt.training import config_of, train  # noqa: E402

# Dropout draws random numbers, Adam has state, float16 has a scale, and the last of the checkpoints
# lies within an epoch, after one whose model is the best so far.
SECTIONS: dict[str, Any] = {
    "model": {"factory": "training_runs:Dropping"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-2, "options": {}},
    "training": {"precision": "float16", "gradient_clip_norm": 1.0},
    "checkpoint": {"folder": "checkpoints", "every_steps": 2},
    "log": {"path": "run.jsonl"},
}


def _table(**sections: Any) -> dict[str, Any]:
    merged = {**SECTIONS}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return table(**merged)


def _losses(folder: Path) -> dict[int, float]:
    """By step; of two lines on one step the later one counts."""
    lines = record_of(folder / "run.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def _events(folder: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in record_of(folder / "run.jsonl") if line["event"] == event]


def _wait_for_checkpoint(process: Popen[str], folder: Path) -> None:
    latest = folder / "checkpoints" / "latest"
    while not latest.is_file() or latest.read_text() < "step-00000010":
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def _resumed(arguments: Sequence[str]) -> None:
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def _unbroken(folder: Path, name: str, processes: int) -> dict[int, float]:
    folder.mkdir()
    run = _table(strategy={"name": name})
    if processes == 1:
        tell(run, folder)
    else:
        in_processes(processes, {name: run}, folder)
    return _losses(folder)


def _assert_goes_on(folder: Path, whole: dict[int, float]) -> None:
    found = _losses(folder)
    (resumed,) = _events(folder, "resume")
    assert 10 <= resumed["step"] < 21, "it was killed in the middle"
    assert found == whole, "bit by bit"


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = _unbroken(tmp_path / "whole", "single", 1)
    path = write_toml(tmp_path / "run.toml", _table(data={"factory": "training_runs:slow_points"}))
    process = start(command(str(path)))
    _wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.communicate()

    _resumed(command(str(path), "--resume"))

    _assert_goes_on(tmp_path, whole)
    ends = [_events(folder, "epoch")[-1] for folder in (tmp_path, tmp_path / "whole")]
    assert ends[0]["score"] == ends[1]["score"]
    left = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-00000020", "step-00000021"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp", "pipeline"],
)
def test_a_run_goes_on_after_one_of_its_processes_was_killed(name: str, tmp_path: Path) -> None:
    strategy = {"name": name}
    if name == "pipeline":
        strategy |= {"stages": ["layers.3"], "microbatches": 5}  # type: ignore[dict-item]
    whole = tmp_path / "whole"
    whole.mkdir()
    in_processes(2, {name: _table(strategy=strategy)}, whole)
    run = _table(strategy=strategy, data={"factory": "training_runs:slow_points"})
    path = write_toml(tmp_path / "run.toml", run)
    process = start(torchrun(2, str(path)))
    _wait_for_checkpoint(process, tmp_path)
    os.kill(_children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "SIGKILL" in errors

    _resumed(torchrun(2, str(path), "--resume"))

    _assert_goes_on(tmp_path, _losses(whole))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


@pytest.mark.parametrize(
    "sections",
    [
        # Parameters that never get a gradient have no state in the optimizer.
        {"model": {"factory": "training_runs:Idle"}},
        {"data": {"factory": "training_runs:noisy_points", "workers": 1}},
        {"optimizer": {"name": "adagrad"}},
    ],
)
def test_a_run_goes_on_from_the_middle_of_an_epoch(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    run = config_of(_table(**sections, checkpoint={"keep": 20}), tmp_path)
    whole = train(run)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010")

    resumed = train(run, resume=True)

    assert resumed.losses == whole.losses[10:]
    assert resumed.scores == whole.scores[1:]


# ------------------------------------------------------------------ what is gone on from


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with a run of six steps."""
    tell(_table(training={"epochs": 1}), tmp_path)
    return tmp_path


def _resume(folder: Path, **sections: Any) -> Any:
    return train(config_of(_table(**{"training": {"epochs": 1}, **sections}), folder), resume=True)


def test_a_finished_run_that_resumes_has_nothing_left_to_do(finished: Path) -> None:
    module = _resume(finished).module
    again = _resume(finished)

    assert again.losses == () and again.steps == 7
    assert all(map(torch.equal, module.parameters(), again.module.parameters()))
    assert again.best == (pytest.approx(_events(finished, "epoch")[0]["score"]), 1)


def test_without_a_checkpoint_a_run_that_resumes_starts(tmp_path: Path) -> None:
    assert len(_resume(tmp_path).losses) == 7


def test_a_run_does_not_write_over_the_checkpoints_of_another(finished: Path) -> None:
    with pytest.raises(ConfigError, match="there is a checkpoint already"):
        tell(_table(), finished)


def test_a_run_with_other_numbers_does_not_go_on(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"with another data.batch_size, optimizer.learning_rate"):
        _resume(finished, data={"batch_size": 16}, optimizer={"learning_rate": 1.0})


def test_what_changes_no_number_may_change(finished: Path) -> None:
    again = _resume(finished, checkpoint={"keep": 1}, log={"every_steps": 3})

    assert again.losses == ()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json"])
@pytest.mark.parametrize("damage", ["shortened", "changed", "removed"])
def test_a_damaged_checkpoint_is_told_of(name: str, damage: str, finished: Path) -> None:
    file = finished / "checkpoints" / "step-00000007" / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "removed":
        file.unlink()
    else:
        flipped = bytes([content[middle] ^ 255])
        rest = content[middle + 1 :] if damage == "changed" else b""
        file.write_bytes(content[:middle] + flipped + rest)

    with pytest.raises(ConfigError, match="checkpoint"):
        _resume(finished)


def test_a_pointer_to_nowhere_is_told_of(finished: Path) -> None:
    (finished / "checkpoints" / "latest").write_text("step-00000099")

    with pytest.raises(ConfigError, match="names a checkpoint that is not there"):
        _resume(finished)


def test_checkpoints_of_other_software_are_told_of(finished: Path) -> None:
    run = finished / "checkpoints" / "step-00000007" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "schema_version": 99}))

    with pytest.raises(ConfigError, match="another version"):
        _resume(finished)


def test_what_a_killed_save_has_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-00000099.part"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")

    tell(_table(training={"epochs": 1}), tmp_path)

    assert not left.exists()
