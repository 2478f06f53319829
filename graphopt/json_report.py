"""Results as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.api import Validation
from graphopt.benchmark import BenchmarkReport
from graphopt.bisection import Bisection
from graphopt.contract import Effect, Pass, Skip
from graphopt.demo import DemoFiles, Demonstration
from graphopt.explain import Explanation
from graphopt.inspection import Inspection
from graphopt.ledger import Run, Step
from graphopt.probing import Probe
from graphopt.recipes import Recipe
from graphopt.reproducer import Reproducer
from graphopt.scenarios import Scenario
from graphopt.sensitivity import Sensitivity
from graphopt.sharing import Sharing
from graphopt.spec import describe_type, options_of
from graphopt.treatments import Treatment
from graphopt.tune import Tuning
from graphopt.validation import OutputError

if TYPE_CHECKING:
    from graphopt.training.heal import Healed

SCHEMA_VERSION = 1

_PACKAGES = ("graphopt", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_to_json(run: Run) -> dict[str, Any]:
    """A run as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": run.plan.recipe,
        "passes": str(run.plan),
        "input_sha256": run.input_sha256,
        "validated": run.validated,
        "provider": run.provider,
        "original": asdict(run.original),
        "optimized": asdict(run.optimized),
        "steps": [_step_to_json(s) for s in run.steps],
        "numerics": numerics_to_json(run.numerics),
        **_measured_to_json(run.benchmark),
        "notes": list(run.notes),
        "failures": list(run.failures),
        "versions": versions(),
    }


def _step_to_json(step: Step) -> dict[str, Any]:
    return {
        "pass": step.spec,
        "effect": step.effect.name,
        "round": step.round,
        "kept": step.kept,
        "verdict": step.verdict,
        "reason": step.reason,
        "max_error": step.max_error,
        "changes": dict(step.changes),
        "notes": list(step.notes),
        "skipped": _skips_to_json(step.skips),
        "nodes_before": step.nodes_before,
        "nodes_after": step.nodes_after,
        "bytes_before": step.bytes_before,
        "bytes_after": step.bytes_after,
        "seconds": round(step.seconds, 4),
        "latency_ratio": plain(step.latency_ratio),
    }


def _skips_to_json(skips: Iterable[Skip]) -> list[dict[str, Any]]:
    by_reason: dict[str, list[str]] = {}
    for skip in skips:
        by_reason.setdefault(skip.reason, []).append(skip.node)
    return [{"reason": reason, "nodes": nodes} for reason, nodes in by_reason.items()]


def numerics_to_json(
    numerics: Mapping[str, Sequence[OutputError]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Errors by output, then by reference."""
    outputs: dict[str, dict[str, dict[str, Any]]] = {}
    for reference, errors in numerics.items():
        for error in errors:
            outputs.setdefault(error.name, {})[reference.replace(" ", "_")] = plain(asdict(error))
    return outputs


def benchmark_to_json(report: BenchmarkReport) -> dict[str, Any]:
    """A benchmark as plain data: the figures of each model by its label, and the conditions."""
    return {"schema_version": SCHEMA_VERSION, **_measured_to_json(report), "versions": versions()}


def _measured_to_json(report: BenchmarkReport | None) -> dict[str, Any]:
    if report is None:
        return {"benchmark": None, "conditions": None}
    content: dict[str, Any] = plain(asdict(report))
    rows = {row.pop("model"): row for row in content.pop("rows")}
    return {"benchmark": rows, "conditions": content}


def validation_to_json(found: Validation) -> dict[str, Any]:
    """A comparison of two models as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "numerics": numerics_to_json(found.numerics),
        "failure": found.failure,
        "notes": list(found.notes),
        "versions": versions(),
    }


def bisection_to_json(found: Bisection) -> dict[str, Any]:
    """What was found out about a model that came out wrong, as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "found": found.found,
        "reason": found.reason,
        "pass": found.guilty,
        "tolerance": found.tolerance,
        "passes": [{**asdict(trial), "effect": trial.effect.name} for trial in found.trials],
        "numerics": numerics_to_json(found.numerics),
        "origin": None if found.origin is None else plain(asdict(found.origin)),
        "values": [plain(asdict(deviation)) for deviation in found.deviations],
        "reproducer": None if found.reproducer is None else _reproducer_to_json(found.reproducer),
        "notes": list(found.notes),
        "versions": versions(),
    }


def _reproducer_to_json(made: Reproducer) -> dict[str, Any]:
    return {
        "nodes": made.nodes,
        "error": plain(made.error),
        "max_error": made.max_error,
        "passes": made.passes,
        "budget": made.budget,
        "has_after": made.after is not None,
    }


def healed_to_json(found: Healed) -> dict[str, Any]:
    """What healing did, as plain data; numerics as `before` and `healed` beside each other."""
    return {
        "schema_version": SCHEMA_VERSION,
        "weights": dict(found.weights),
        "elements": found.elements,
        "features": found.features,
        "samples": {"learnt": found.samples[0], "judged": found.samples[1]},
        "run": found.way,
        "curve": [asdict(point) for point in found.curve],
        "steps": found.steps,
        "numerics": numerics_to_json({"before": found.before, "healed": found.after}),
        "stored_bytes": found.stored_bytes,
        "notes": list(found.notes),
        "versions": versions(),
    }


def sharing_to_json(found: Sharing) -> dict[str, Any]:
    """What models stored together take, as plain data."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(found)}
    content["models"] = [
        {k: str(v) if isinstance(v, Path) else v for k, v in model.items()}
        for model in content["models"]
    ]
    return {**content, "data": found.data and str(found.data), "versions": versions()}


def inspection_to_json(found: Inspection, tried: Run) -> dict[str, Any]:
    """What is in a model, and what `basic` would do, as plain data.

    Of each layer also its share of all multiply-accumulates, `macs_share`.
    """
    layers = [
        {**asdict(layer), "macs_share": share_of(layer.macs, found.macs)} for layer in found.layers
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        **plain(asdict(found)),
        "layers": layers,
        "basic": {
            "optimized": asdict(tried.optimized),
            "steps": [_step_to_json(s) for s in tried.steps if s.kept],
        },
        "versions": versions(),
    }


def explanation_to_json(found: Explanation) -> dict[str, Any]:
    """In which kernels a model runs, and why, as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        **plain(asdict(found)),
        "lost_us": found.lost_us,
        "versions": versions(),
    }


def tuning_to_json(found: Tuning) -> dict[str, Any]:
    """A run as plain data, as `run_to_json` has it, and the search that led to it."""
    fitted, judged, verified = found.parts
    certificate = {**asdict(found.certificate), "certified": found.certificate.certified}
    run = run_to_json(found.run)
    return {
        **run,
        "notes": [*run["notes"], *found.notes],
        "scenario": found.scenario,
        "objective": found.objective,
        "metric": found.metric,
        "unit": found.unit,
        "certify": found.certify,
        "certificate": plain(certificate),
        "points": [plain(asdict(point)) for point in found.points],
        "probes": _probes_to_json(found.probes),
        "samples": {"fitted": fitted, "searched": judged, "verified": verified},
        "evaluations": found.evaluations,
        "minutes": round(found.minutes, 3),
    }


def sensitivity_to_json(found: Sensitivity) -> dict[str, Any]:
    """What options do to layers, as plain data; layers are listed the most sensitive first."""
    fitted, judged = found.samples
    return {
        "schema_version": SCHEMA_VERSION,
        "treatments": dict(found.treatments),
        "layers": found.layers,
        "probes": _probes_to_json(found.probes),
        "stored_bytes": found.stored_bytes,
        "samples": {"fitted": fitted, "judged": judged},
        "notes": list(found.notes),
        "versions": versions(),
    }


def _probes_to_json(probes: Iterable[Probe]) -> list[dict[str, Any]]:
    return [{**plain(asdict(one)), "measured": one.measured} for one in probes]


def passes_to_json(
    classes: Sequence[type[Pass]],
    recipes: Mapping[str, Recipe],
    treatments: Mapping[str, Treatment],
    scenarios: Mapping[str, Scenario],
) -> dict[str, Any]:
    """Passes with their options, recipes, treatments of layers and scenarios, as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "passes": {c.name: _pass_to_json(c) for c in classes},
        "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
        "treatments": {name: _treatment_to_json(one) for name, one in treatments.items()},
        "scenarios": {name: asdict(one) for name, one in scenarios.items()},
    }


def _treatment_to_json(one: Treatment) -> dict[str, Any]:
    return {
        "summary": one.summary,
        "options": list(one.options),
        "probed": list(one.probed),
        "provider": one.provider,
    }


def _pass_to_json(cls: type[Pass]) -> dict[str, Any]:
    return {
        "effect": cls.effect.name,
        "summary": summary(cls),
        "needs_samples": cls.needs_samples,
        "max_error": cls.max_error if cls.effect is Effect.LOSSY else None,
        "options": {
            o.name: {
                "type": describe_type(o.type),
                "bounds": str(o.bounds) if o.bounds is not None else None,
                "default": plain(o.default),
            }
            for o in options_of(cls).values()
        },
    }


def demo_files_to_json(written: DemoFiles) -> dict[str, Any]:
    """Where the files of the demonstration are, as plain data."""
    files = {"model": str(written.model), "samples": str(written.samples)}
    return {"schema_version": SCHEMA_VERSION, **files, "count": written.count}


def demo_to_json(shown: Demonstration) -> dict[str, Any]:
    """The demonstration as plain data."""
    accuracy = {"original": shown.accuracy_before, "optimized": shown.accuracy_after}
    return {**run_to_json(shown.run), "accuracy": accuracy, "path": str(shown.path)}


def share_of(part: int | None, whole: int) -> float | None:
    """A part of a whole; None where the part is not known, or the whole is nothing."""
    return part / whole if part is not None and whole else None


def plain(content: Any) -> Any:
    """The same with what JSON cannot hold (infinity, NaN) as text."""
    if isinstance(content, Mapping):
        return {str(k): plain(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [plain(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def to_text(content: Mapping[str, Any]) -> str:
    """JSON text, indented."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def summary(cls: type[Pass]) -> str:
    """The first line of a pass's description."""
    return (cls.__doc__ or "").strip().splitlines()[0]
