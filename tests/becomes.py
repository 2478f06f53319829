"""Graphs before and after a pass, without the constants that nothing reads any more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Effect, Pass, Sample
from graphopt.operators import all_graphs
from graphopt.random_samples import random_samples
from graphopt.testing import apply_pass, assert_equivalent, canonical, parse

WILD = (-0.0, 0.0, 1.0, np.nan, -1e38, 1e-40, np.inf, 0.5, -np.inf, 1e30, -1.0, 7.0, 1e-45)


def assert_becomes(tested: Pass, before: str | ir.Model, after: str) -> Change:
    """The pass turns `before` into `after`; what is exact, also for numbers that break algebra."""
    model = parse(before) if isinstance(before, str) else before
    original = model.clone()
    change = apply_pass(tested, model)
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del graph.initializers[name]
    got, wanted = canonical(model), canonical(parse(after))
    assert got.splitlines() == wanted.splitlines(), f"got:\n{got}\nwanted:\n{wanted}"
    assert change, f"{tested} reports no change"
    samples = random_samples(original, 3)
    if tested.effect is Effect.EXACT:
        samples += [wild(sample, start) for sample in samples[:1] for start in range(3)]
    assert_equivalent(original, model, tested.effect, samples)
    return change


def wild(sample: Sample, start: int = 0) -> Sample:
    """The sample with NaN, infinities, both zeros and more in all floating-point inputs."""
    return {
        name: _wild(array, start) if array.dtype.kind == "f" else array
        for name, array in sample.items()
    }


def _wild(array: np.ndarray, start: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        numbers = np.resize(np.roll(WILD, start), array.shape)
        return np.asarray(numbers, array.dtype)
