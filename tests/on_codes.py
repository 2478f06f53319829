"""Models and samples for the tests of what works on 8-bit codes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from optimized import kernels

from graphopt.contract import Change, Context
from graphopt.observe import Observer
from graphopt.recording import Feed
from graphopt.rewriting import constant_tensor
from graphopt.runtime import Reference, Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import apply_pass, canonical, parse
from graphopt_passes.quantize.choice import Choice
from graphopt_passes.quantize.quantize_static import QuantizeStatic
from graphopt_passes.quantize.units import Unit, units_of

Sample = Mapping[str, np.ndarray]

FINE = 0.03
"""Relative L2 error that two or three layers of random numbers stay well below."""

ENDS = Counter({"QuantizeLinear": 1, "DequantizeLinear": 1})
"""Of a region with one entry and one exit."""

CONV = "Conv <pads = [1, 1, 1, 1]>"
SANDWICH = """
<ir_version: 10, opset_import: ["" : {opset}]>
agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v, float[8] b)
    => (float[{y}] y)
<
    int64[1] at0 = {{0}}, int64[1] at1 = {{1}}, int64[1] at2 = {{2}}, int64[1] to5 = {{5}},
    int64[1] to9 = {{9}}, int64[1] by2 = {{2}}, int64[1] by_2 = {{-2}}, int64[1] to_9 = {{-9}},
    int64[2] both = {{2, 3}}, int64[2] from0 = {{0, 0}}, int64[2] to55 = {{5, 5}},
    int64[2] halves = {{3, 5}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}},
    int64[8] turned = {{7, 6, 5, 4, 3, 2, 1, 0}}, int64[5] five = {{1, 2, 4, 6, 6}},
    int64[4] four = {{1, 8, 6, 6}}, int64[4] flat = {{1, 8, 4, 9}}, int64[4] twice = {{1, 1, 2, 1}},
    float[4] larger = {{1.0, 1.0, 2.0, 2.0}}, float zero = {{0.0}}, float one = {{1.0}},
    float less = {{-1.0}}, float lowest = {{-1e38}}, float[8, 1, 1] k = {{1, 2, 3, 4, 5, 6, 7, 8}}
>
{{ c = Conv <pads = [1, 1, 1, 1]> (x, w, b) {between} y = Conv <pads = [1, 1, 1, 1]> (e, v) }}
"""


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.float32(scale * np.random.default_rng(seed).standard_normal(shape))


def sandwich(between: str, opset: int = 21) -> ir.Model:
    text = SANDWICH.format(opset=opset, between=between.replace("CONV", CONV), y="N, C, H, W")
    weights = {"w": normal(1, 8, 8, 3, 3, scale=0.1), "v": normal(3, 8, 8, 3, 3, scale=0.1)}
    return parse(text, b=normal(2, 8), **weights)


def samples_of(*shape: int, count: int = 3) -> list[Sample]:
    """For a model whose input is x."""
    return [{"x": normal(100 + number, *shape)} for number in range(count)]


def context_of(model: ir.Model, samples: Sequence[Sample]) -> Context:
    inputs, original = signature(model), model.clone()
    return Context(lambda: original, observer=Observer(Feed(read_samples(samples, inputs), inputs)))


def all_units(model: ir.Model) -> tuple[list[Unit], list[str]]:
    """What can work on codes, and why products do not."""
    infer_shapes(model)
    change = Change()
    units = list(units_of(model.graph, change.skip).values())
    return units, [skip.reason for skip in change.skips]


def code_all(model: ir.Model, samples: Sequence[Sample]) -> list[str]:
    """Let all that can work on codes do so, whether it pays or not; the operators of these."""
    units, _ = all_units(model)
    Choice(model, context_of(model, samples), units).write(model, units)
    problem = why_invalid(model)
    assert problem is None, f"{problem}\n{canonical(model)}"
    return [unit.node.op_type for unit in units]


def quantize(
    model: ir.Model, samples: Sequence[Sample], tested: QuantizeStatic | None = None
) -> Change:
    """The pass is applied with samples."""
    inputs = signature(model)
    observer = Observer(Feed(read_samples(samples, inputs), inputs))
    return apply_pass(tested or QuantizeStatic(), model, observer=observer)


def reasons(change: Change) -> set[str]:
    return {skip.reason for skip in change.skips}


def work(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that run as deployed, but for those that change the layout in memory."""
    found = kernels(model, folder)
    return Counter({k: n for k, n in found.items() if k not in ("Transpose", "ReorderInput")})


def difference(before: ir.Model, after: ir.Model, sample: Sample) -> float:
    """The relative L2 norm of the worst output, as deployed; the same shapes and names."""
    first, second = Session(before).run(sample), Session(after).run(sample)
    assert {n: a.shape for n, a in first.items()} == {n: a.shape for n, a in second.items()}
    errors = []
    for name, array in first.items():
        wanted = np.float64(array)
        norm = max(float(np.linalg.norm(wanted)), sys.float_info.min)
        errors.append(float(np.linalg.norm(wanted - second[name])) / norm)
    return max(errors)


def steps_from_written(model: ir.Model, sample: Sample) -> float:
    """How far outputs as deployed are from those as written, in steps of their own scale."""
    written = Session(model, Reference.AS_WRITTEN).run(sample)
    deployed = Session(model, Reference.AS_DEPLOYED).run(sample)
    return max(
        float(np.abs(written[o.name] - deployed[o.name]).max() / scale_of(o))
        for o in model.graph.outputs
        if o.name is not None
    )


def scale_of(value: ir.Value) -> float:
    """The scale of the codes that an activation comes from; of other values, 1."""
    node = value.producer()
    scale = constant_tensor(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    is_coded = node is not None and node.op_type == "DequantizeLinear"
    return float(scale.numpy()) if is_coded and scale is not None and not scale.shape else 1.0
