"""Whatever the strategy, training gives the curve and the export of a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_runs import (  # noqa: E402
    PLAN,
    SAMPLES,
    Points,
    in_processes,
    table,
    tell,
)

from graphopt.runtime import Reference, Session  # noqa: E402

LIMIT = 1e-5
"""Of the difference of losses, and of exported outputs."""

PIPELINE = {"name": "pipeline", "stages": ["layers.1"], "microbatches": 5}

TWO: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": {"name": "ddp"}},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "tensor": {"strategy": {"name": "tensor", "plan": PLAN}},
    "gpipe": {"strategy": PIPELINE},
    "1f1b": {"strategy": {**PIPELINE, "schedule": "1f1b"}},
}

FOUR: dict[str, dict[str, Any]] = {
    "ddp x tensor": {"strategy": {"name": "ddp x tensor", "sizes": [2, 2], "plan": PLAN}},
    "fsdp x tensor": {"strategy": {"name": "fsdp x tensor", "sizes": [2, 2], "plan": PLAN}},
    "ddp x pipeline": {
        "strategy": {**PIPELINE, "name": "ddp x pipeline", "sizes": [2, 2]},
    },
}

DATA = ("ddp", "fsdp")
ACCUMULATED = {"training": {"accumulation": 4}}
CLIPPED = {"training": {"gradient_clip_norm": 0.05}}
BATCHES_OF_10 = {"data": {"batch_size": 10}}


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for part in parts:
        for name, values in part.items():
            sections[name] = {**sections.get(name, {}), **values}
    return sections


def _joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return table(**_merged(*parts))


def _exporting(name: str, **sections: Any) -> dict[str, Any]:
    return _joined(sections, {"export": {"path": f"{name.replace(' ', '_')}.onnx"}})


def _distance(curve: list[float], other: list[float]) -> float:
    assert len(curve) == len(other) > 20
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def _outputs(path: Path) -> np.ndarray:
    features = Points(SAMPLES, seed=3).features.numpy()
    (outputs,) = Session(path, Reference.AS_WRITTEN).run({"features": features}).values()
    return outputs


def _assert_same(told: dict[str, Any], alone: dict[str, Any], folder: Path, names: Any) -> None:
    expected = _outputs(folder / "single.onnx")
    for name in names:
        assert _distance(told[name]["losses"], alone["losses"]) < LIMIT, name
        assert told[name]["scores"] == pytest.approx(alone["scores"], abs=1e-12), name
        found = _outputs(folder / f"{name.replace(' ', '_')}.onnx")
        assert np.abs(found - expected).max() < LIMIT, name


def test_two_processes_give_the_curve_and_the_export_of_one(tmp_path: Path) -> None:
    alone, clipped = tell(_exporting("single"), tmp_path), tell(_joined(CLIPPED), tmp_path)
    runs = {name: _exporting(name, **sections) for name, sections in TWO.items()}
    # One launch for all: most of the time goes into starting processes.
    accumulated = {f"{name}, accumulated": _joined(TWO[name], ACCUMULATED) for name in DATA}
    idle = {"model": {"factory": "training_runs:Idle"}}
    idling = {f"{name}, idle": _joined(TWO[name], idle) for name in DATA}
    idling["gpipe, idle"] = _joined({"strategy": {**PIPELINE, "stages": ["layers.2"]}}, idle)
    noisy = {"data": {"factory": "training_runs:noisy_points"}}
    clipping = {f"{name}, clipped": _joined(TWO[name], CLIPPED) for name in TWO}

    told = in_processes(
        2,
        {**runs, **accumulated, **clipping, **idling, "noisy": _joined(TWO["ddp"], noisy)},
        tmp_path,
    )

    _assert_same(told, alone, tmp_path, runs)
    for name in accumulated:
        assert _distance(told[name]["losses"], alone["losses"]) < LIMIT, name
    for name in clipping:
        assert _distance(told[name]["losses"], clipped["losses"]) < LIMIT, name
    for name in idling:
        assert _distance(told[name]["losses"], tell(_joined(idle), tmp_path)["losses"]) < LIMIT
    assert _distance(told["noisy"]["losses"], tell(_joined(noisy), tmp_path)["losses"]) < LIMIT
    assert _distance(alone["losses"], clipped["losses"]) > 1000 * LIMIT


@pytest.mark.slow
def test_two_processes_train_in_half_precision(tmp_path: Path) -> None:
    half = {name: {"training": {"precision": name}} for name in ("bfloat16", "float16")}
    runs = {
        f"{name}, {precision}": _joined(TWO[name], sections)
        for name in ("ddp", "fsdp", "gpipe")
        for precision, sections in half.items()
    }

    told = in_processes(2, runs, tmp_path)

    expected = tell(_joined(half["bfloat16"]), tmp_path)["losses"]
    for name, result in told.items():
        if name.endswith("bfloat16"):
            assert _distance(result["losses"], expected) < 0.05, name
        # In float16 the first steps may be skipped, until the scale of the loss is small enough.
        assert np.mean(result["losses"][-7:]) < 0.8 * np.mean(result["losses"][:7]), name


@pytest.mark.slow
def test_four_processes_as_ddp_x_tensor_give_the_curve_and_the_export_of_one(
    tmp_path: Path,
) -> None:
    alone = tell(_exporting("single"), tmp_path)
    runs = {name: _exporting(name, **FOUR[name]) for name in ("ddp x tensor",)}

    told = in_processes(4, runs, tmp_path)

    _assert_same(told, alone, tmp_path, runs)


@pytest.mark.slow
def test_other_meshes_of_four_processes_give_the_curve_and_the_export_of_one(
    tmp_path: Path,
) -> None:
    alone = tell(_exporting("single", **BATCHES_OF_10), tmp_path)
    names = ("fsdp x tensor", "ddp x pipeline")
    runs = {name: _exporting(name, **_merged(FOUR[name], BATCHES_OF_10)) for name in names}

    told = in_processes(4, runs, tmp_path)

    _assert_same(told, alone, tmp_path, runs)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_curve_shows_gradients_that_are_summed_instead_of_averaged(
    factor: float, tmp_path: Path
) -> None:
    """The others prove nothing unless a wrong average, which scales each step, moves the curve."""
    right = tell(table(), tmp_path)

    wrong = tell(table(optimizer={"learning_rate": 0.05 * factor}), tmp_path)

    assert _distance(right["losses"], wrong["losses"]) > 1000 * LIMIT
