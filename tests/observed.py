"""Contexts with samples, for tests of passes that look at values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context, Sample
from graphopt.observe import Observer
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes
from graphopt_passes.quantize.choice import Choice
from graphopt_passes.quantize.units import units_of


def observer(model: ir.Model, samples: list[Sample]) -> Observer:
    inputs = signature(model)
    return Observer(Feed(read_samples(samples, inputs), inputs))


def error_of_codes(model: ir.Model, samples: list[Sample]) -> float:
    """The relative L2 error of all outputs with all that can be on codes; it is not modified."""
    infer_shapes(model)
    quantized = model.clone()
    units = list(units_of(model.graph, lambda *_: None).values())
    context = Context(lambda: model, observer=observer(model, samples))
    Choice(model, context, units).write(quantized, units)
    before, after = Session(model), Session(quantized)
    wrong = total = 0.0
    for sample in samples:
        first, second = before.run(sample), after.run(sample)
        for name, array in first.items():
            wrong += float(np.square(array - second[name]).sum())
            total += float(np.square(array).sum())
    return (wrong / total) ** 0.5
