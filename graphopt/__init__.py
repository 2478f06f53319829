"""graphopt: optimize exported ONNX models, with proof.

One call takes a model and samples and gives back a smaller, faster model, with what every pass did
to the numerics, the bytes and the latency::

    run = graphopt.optimize("model.onnx", samples="samples/")
    run.save("model.optimized.onnx")

or finds the best model within a drop of the accuracy by itself::

    found = graphopt.tune("model.onnx", samples="samples/", max_drop=1.0)
    found.save("model.tuned.onnx")
"""

from __future__ import annotations

from graphopt.api import Validation, benchmark, bisect, explain, inspect, optimize, validate
from graphopt.bisection import Bisection
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.errors import (
    CheckFailed,
    GraphoptError,
    ModelError,
    RuntimeUnavailable,
    SampleError,
    SpecError,
)
from graphopt.explain import Explanation
from graphopt.ledger import Run, Step
from graphopt.loading import load
from graphopt.saving import save
from graphopt.sensitivity import Sensitivity, sensitivity
from graphopt.tune import Tuning, tune

__all__ = [
    "Bisection",
    "Change",
    "CheckFailed",
    "Context",
    "Effect",
    "Explanation",
    "GraphoptError",
    "ModelError",
    "Pass",
    "Run",
    "RuntimeUnavailable",
    "SampleError",
    "Sensitivity",
    "SpecError",
    "Step",
    "Tuning",
    "Validation",
    "benchmark",
    "bisect",
    "explain",
    "inspect",
    "load",
    "optimize",
    "save",
    "sensitivity",
    "tune",
    "validate",
]
