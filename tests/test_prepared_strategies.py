"""Teachers and prepared weights under every strategy: the curve of a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from training_runs import PLAN, Points, in_processes, table, tell  # noqa: E402

import graphopt  # noqa: E402
from graphopt.runtime import Reference, Session  # noqa: E402

LIMIT = 1e-5
"""Of the difference of losses, and of exported outputs."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "tensor": {"name": "tensor", "plan": PLAN},
    "pipeline": {"name": "pipeline", "stages": ["layers.1"], "microbatches": 5},
}

LOGITS = {"teacher": "training_runs:Transformer", "temperature": 2.0, "label_weight": 0.3}
LESSONS: dict[str, dict[str, Any]] = {
    "logits": LOGITS,
    "features": {**LOGITS, "features": {"layers.0": "layers.0", "layers.1.up": "layers.1.down"}},
}

SPARSITY = {"name": "sparsity", "sparsity": 0.6, "every_steps": 4}
FORMS: dict[str, list[dict[str, Any]]] = {
    "sparsity": [SPARSITY],
    "sparsity-of-all": [{**SPARSITY, "scope": "global"}],
    "quantized": [
        {"name": "masks", "pattern": "2:4", "layers": ["layers.*.up", "layers.*.down"]},
        {"name": "quantized", "bits": 4},
    ],
    "codebook": [{"name": "codebook", "bits": 2, "method": "straight-through"}],
    # The harder it becomes, the more it makes of what rounding changes.
    "dkm": [{"name": "codebook", "bits": 2, "last_temperature": 0.2}],
    "binary": [{"name": "binary"}],
}

OF_ALL = "sparsity-of-all"
EVERY: dict[str, tuple[str, ...]] = {
    "ddp": (*LESSONS, *FORMS),
    "fsdp": (*LESSONS, *FORMS),
    "tensor": tuple(LESSONS),
    "pipeline": ("logits", *(form for form in FORMS if form != OF_ALL)),
}
FEW: dict[str, tuple[str, ...]] = {
    "ddp": ("features", OF_ALL),
    "fsdp": ("features", OF_ALL),
    "tensor": ("features",),
    "pipeline": ("dkm",),
}


def _run(strategy: str, name: str) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "export": {"path": f"{strategy} {name}.onnx"},
        "strategy": STRATEGIES[strategy],
    }
    if name in LESSONS:
        return table(**sections, distill=LESSONS[name])
    return table(**sections, prepare=[{"min_elements": 16, **form} for form in FORMS[name]])


def _outputs(path: Path) -> np.ndarray:
    features = Points(40, seed=3).features.numpy()
    (outputs,) = Session(path, Reference.AS_WRITTEN).run({"features": features}).values()
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [FEW, EVERY])
def test_two_processes_give_the_curve_and_the_export_of_one(
    chosen: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    names = dict.fromkeys(name for of_strategy in chosen.values() for name in of_strategy)
    alone = {name: tell(_run("single", name), tmp_path) for name in names}
    runs = {f"{s} {name}": _run(s, name) for s, names in chosen.items() for name in names}

    told = in_processes(2, runs, tmp_path)

    for run, result in told.items():
        name = run.split()[1]
        change = np.subtract(result["losses"], alone[name]["losses"])
        assert len(change) > 20 and np.abs(change).max() < LIMIT, run
        outputs = _outputs(tmp_path / f"{run}.onnx") - _outputs(tmp_path / f"single {name}.onnx")
        assert np.abs(outputs).max() < LIMIT, run


def test_two_processes_find_the_ranges_of_one(tmp_path: Path) -> None:
    """Of activations; each process sees a part of every batch, whose extremes are others.

    Sums are in another order, so that at ties codes are others, and curves move by what these are
    worth: by more than rounding, and far less than training does.
    """
    prepare = [{"name": "quantized", "activations": 8, "min_elements": 16, "scales": "largest"}]
    runs = {
        name: table(
            strategy=STRATEGIES[name], prepare=prepare, export={"path": f"activations {name}.onnx"}
        )
        for name in ("single", "ddp")
    }
    alone = tell(runs.pop("single"), tmp_path)

    told = in_processes(2, runs, tmp_path)

    expected = _scales(tmp_path / "activations single.onnx")
    assert len(expected) > 5
    for name, result in told.items():
        change = np.subtract(result["losses"], alone["losses"])
        assert len(change) > 20 and np.abs(change).max() < 1e-3, name
        found = _scales(tmp_path / f"activations {name}.onnx")
        assert found.keys() == expected.keys()
        for place, scale in expected.items():
            np.testing.assert_allclose(found[place], scale, rtol=2e-3, err_msg=f"{name} {place}")


def _scales(path: Path) -> dict[str, np.ndarray]:
    initializers = graphopt.load(path).graph.initializers
    return {
        name: value.const_value.numpy()
        for name, value in initializers.items()
        if name.endswith("input_rounding.scale") and value.const_value is not None
    }


def test_accumulation_gives_the_curve_of_whole_batches(tmp_path: Path) -> None:
    for name in ("dkm", OF_ALL, "features"):
        whole = _run("single", name)
        parts = table(
            **{k: v for k, v in whole.items() if k in ("distill", "prepare")},
            training={"accumulation": 4},
        )

        change = np.subtract(tell(parts, tmp_path)["losses"], tell(whole, tmp_path)["losses"])

        assert np.abs(change).max() < LIMIT, name
