"""What samples show of a model that is to compute in 16 bits: ranges, and branches never taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.observe import Question
from graphopt.operators import is_onnx, nodes_within
from graphopt.packing import is_constant
from graphopt.rewriting import Names
from graphopt.statistics import Spread
from graphopt_passes.quantize.half_places import Floats
from graphopt_passes.quantize.halves import Half
from graphopt_passes.quantize.retyping import cast_of

EXPONENT_ERROR_MAXIMUM = 2**-5
"""What a Softmax makes a power of may be rounded by so much: about as much as the power, then."""

EXPONENTIALS = ("Exp", "LogSoftmax", "ReduceLogSumExp", "Softmax")

BEFORE_EXPONENTIALS = (
    "Add",
    "Div",
    "Mul",
    "Reshape",
    "Sub",
    "Transpose",
    "Where",
)
"""What attention does between a product and its Softmax."""


@dataclass(frozen=True)
class Shown:
    """What samples show.

    Attributes:
        ranges: of values of the main graph that do not fit into 16 bits, what is wrong with them.
        idle: nodes in branches of an If of the main graph that no sample takes.
    """

    ranges: Mapping[ir.Value, str] = field(default_factory=dict)
    idle: Mapping[ir.Node, None] = field(default_factory=dict)


def look(model: ir.Model, floats: Floats, context: Context) -> Shown:
    """Run the model on the samples.

    Args:
        model: not modified.
        floats: its float32 values.
        context: observes.

    Raises:
        ModelError: onnxruntime does not run the model where these values are looked at.
    """
    graph = model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    seen = [v for v in values if v in floats and not is_constant(v)]
    probed, conditions = _with_conditions(model)
    asked = {name: Question(name) for name in (*(v.name or "" for v in seen), *conditions.values())}
    answers = context.observe(probed, asked.values())
    spreads: dict[str, Spread] = {}
    for name, question in asked.items():
        spread = answers[question]
        assert isinstance(spread, Spread)
        spreads[name] = spread
    known = {value: spreads[value.name or ""] for value in seen}
    ranges = _rounded_exponents(known, floats.half)
    for value, spread in known.items():
        reason = floats.half.why_out_of_range(spread.low, spread.high)
        if reason is not None:
            ranges[value] = f"{value.name} {reason}"
    idle: dict[ir.Node, None] = {}
    for branching, name in conditions.items():
        spread = spreads[name]
        for branch, taken in (("then_branch", spread.high), ("else_branch", 1 - spread.low)):
            body = branching.attributes[branch].as_graph()
            unseen = body if not taken else ()
            idle.update(dict.fromkeys(inner for node in unseen for inner in nodes_within(node)))
    return Shown(ranges, idle)


def _rounded_exponents(spreads: Mapping[ir.Value, Spread], half: Half) -> dict[ir.Value, str]:
    """What a Softmax makes powers of, where a rounding would change them by some percent.

    The same holds of what that is the sum or a multiple of, as far as it is as large.
    """
    sizes = {value: max(abs(s.low), abs(s.high)) for value, s in spreads.items()}
    # Half a step is the largest error of a rounding.
    large = [v for v, size in sizes.items() if size * half.step / 2 > EXPONENT_ERROR_MAXIMUM]
    found: dict[ir.Value, str] = {}
    waiting = [v for v in large if any(is_onnx(u.node, *EXPONENTIALS) for u in v.uses())]
    while waiting:
        value = waiting.pop()
        found[value] = f"{value.name} reaches {sizes[value]:.3g}, whose power would be rounded"
        maker = value.producer()
        if maker is not None and is_onnx(maker, *BEFORE_EXPONENTIALS):
            waiting += [v for v in large if v in maker.inputs and v not in found]
    return found


def _with_conditions(model: ir.Model) -> tuple[ir.Model, dict[ir.Node, str]]:
    """A clone with the condition of each If as a number, and the names of those."""
    probed = model.clone()
    names = Names(probed)
    conditions = {}
    for node, copy in zip(model.graph, list(probed.graph), strict=True):
        if is_onnx(node, "If") and copy.inputs[0] is not None:
            cast = cast_of(copy.inputs[0], names.new("condition"), ir.DataType.FLOAT, names)
            probed.graph.insert_before(copy, cast)
            conditions[node] = cast.outputs[0].name or ""
    return probed, conditions
