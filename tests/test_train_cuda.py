"""Training on a GPU. Without one, all of this is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from training_runs import record_of, start, table, tell, torchrun, write_toml  # noqa: E402

from graphopt.training import config_of, train  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

LIMIT = 1e-4
"""Of the difference of losses: other kernels add up in another order."""


def _distance(curve: Any, other: Any) -> float:
    assert len(curve) == len(other) > 20
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def _losses(path: Path) -> list[float]:
    return [line["loss"] for line in record_of(path) if line["event"] == "step"]


def test_a_gpu_gives_the_curve_of_the_cpu(tmp_path: Path) -> None:
    told = [
        tell(table(training={"device": device}, export={"path": f"{device}.onnx"}), tmp_path)
        for device in ("cpu", "cuda")
    ]

    assert _distance(told[0]["losses"], told[1]["losses"]) < LIMIT


def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = table(
        training={"precision": "float16", "device": "cuda"}, checkpoint={"folder": "checkpoints"}
    )
    first = tell(run, tmp_path)

    again = train(config_of(run, tmp_path), resume=True)

    assert again.losses == ()
    assert again.best == first["best"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_process_with_nccl_gives_the_curve_of_a_single_one(
    name: str, precision: str, tmp_path: Path
) -> None:
    training = {"precision": precision, "device": "cuda"}
    content = table(training=training, strategy={"name": name}, log={"path": "run.jsonl"})
    process = start(torchrun(1, str(write_toml(tmp_path / "run.toml", content))))

    _, errors = process.communicate()

    assert process.returncode == 0, errors
    alone = tell(table(training=training), tmp_path)
    limit = LIMIT if precision == "float32" else 0.05
    assert _distance(_losses(tmp_path / "run.jsonl"), alone["losses"]) < limit
