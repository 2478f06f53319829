"""For tests of passes: text graphs before and after.

A graph is written in ONNX's text syntax, `canonical` renames what has no meaning and prints it, so
that a failure is a diff of lines.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass, Sample
from graphopt.gate import coarsest, computed_in_half
from graphopt.operators import opset_of
from graphopt.random_samples import random_samples
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.validation import Comparison, why_over

__all__ = [
    "apply_pass",
    "assert_equivalent",
    "assert_rewrites",
    "assert_unchanged",
    "canonical",
    "parse",
]


def parse(text: str, **initializers: np.ndarray) -> ir.Model:
    """A model from ONNX's text syntax.

    Args:
        text: the model; the header may be left out: `<ir_version: 10, opset_import: ["" : 21]>`
            is put before a text that starts with the graph.
        initializers: arrays for main-graph inputs of these names, which become initializers.
    """
    if not text.lstrip().startswith("<"):
        text = '<ir_version: 10, opset_import: ["" : 21]>\n' + text
    model = ir.from_onnx_text(text)
    graph = model.graph
    for name, array in initializers.items():
        value = next(v for v in graph.inputs if v.name == name)
        graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(array.shape)
        graph.register_initializer(value)
    return model


def apply_pass(tested: Pass, model: ir.Model, **context: object) -> Change:
    """Apply the pass to the model in place, as the pipeline does, with shapes inferred."""
    infer_shapes(model)
    original = model.clone()
    full = Context(lambda: original, **context)  # type: ignore[arg-type]
    refusal = tested.refuse(model, full)
    assert refusal is None, f"{tested} refuses: {refusal}"
    change = tested.apply(model, full)
    problem = why_invalid(model)
    assert problem is None, f"{tested} left an invalid model: {problem}\n{canonical(model)}"
    return change


def assert_rewrites(tested: Pass, before: str | ir.Model, after: str | ir.Model) -> Change:
    """The pass turns `before` into `after`, up to names, and keeps the outputs by its effect.

    Texts of models; parse them first (see `parse`) to give initializers from arrays.
    """
    model = parse(before) if isinstance(before, str) else before
    expected = parse(after) if isinstance(after, str) else after
    original = model.clone()
    change = apply_pass(tested, model)
    assert change, f"{tested} reports no change; it skipped: {change.skips}"
    got, wanted = canonical(model), canonical(expected)
    assert got.splitlines() == wanted.splitlines(), f"got:\n{got}\nwanted:\n{wanted}"
    assert_equivalent(original, model, tested.effect)
    return change


def assert_unchanged(tested: Pass, before: str | ir.Model) -> Change:
    """The pass leaves the model as it is and reports no change."""
    model = parse(before) if isinstance(before, str) else before
    wanted = canonical(model)
    change = apply_pass(tested, model)
    got = canonical(model)
    assert got.splitlines() == wanted.splitlines(), f"got:\n{got}\nwanted:\n{wanted}"
    assert not change, f"{tested} reports {dict(change.counts)} but changed nothing"
    return change


def assert_equivalent(
    before: ir.Model,
    after: ir.Model,
    effect: Effect = Effect.ROUNDING,
    samples: list[Sample] | None = None,
) -> None:
    """Both models give the same outputs, as written, within the tolerance of the effect."""
    samples = samples if samples is not None else random_samples(before, 3)
    first = Session(before, Reference.AS_WRITTEN)
    second = Session(after, Reference.AS_WRITTEN)
    comparison = Comparison()
    for sample in samples:
        comparison.add(first.run(sample), second.run(sample))
    computed_in = coarsest(*map(_halves_of, (before, after)))
    reason = why_over(effect, comparison.outputs(), computed_in=computed_in)
    assert reason is None, f"{reason}\nbefore:\n{canonical(before)}\nafter:\n{canonical(after)}"


def _halves_of(model: ir.Model) -> dict[str, str]:
    """The outputs that the model computes in half precision, as the gate sees them."""
    inferred = model.clone()
    infer_shapes(inferred)
    return computed_in_half(inferred)


def canonical(model: ir.Model) -> str:
    """The model as text, with names that depend only on its structure.

    Inputs and outputs of the main graph keep their names. Initializers are printed by dtype, shape
    and a few of their values. Inferred shapes, doc strings and metadata are left out.
    """
    names: dict[ir.Value, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        names[value] = value.name or ""
    lines = [f"opset {opset_of(model)}"]
    lines += _graph_lines(model.graph, names, "")
    for function in model.functions.values():
        lines += [f"function {function.domain}.{function.name}"]
        lines += _graph_lines(function.graph, names, "  ")
    return "\n".join(lines) + "\n"


def _graph_lines(graph: ir.Graph, names: dict[ir.Value, str], indent: str) -> list[str]:
    head = ", ".join(_typed(v, names) for v in graph.inputs)
    tail = ", ".join(_typed(v, names) for v in graph.outputs)
    lines = [f"{indent}({head}) => ({tail})"]
    for node in graph:
        lines += _node_lines(node, names, indent + "  ")
    unread = [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_input()]
    return lines + [f"{indent}  unread {_constant(v)}" for v in unread if not v.is_graph_output()]


def _node_lines(node: ir.Node, names: dict[ir.Value, str], indent: str) -> list[str]:
    arguments = [_name(v, names) for v in node.inputs]
    outputs = [_name(v, names) if v.name else "-" for v in node.outputs]
    attributes, bodies = [], []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            bodies += [
                f"{indent}{name}:",
                *_graph_lines(attribute.as_graph(), names, indent + "  "),
            ]
        else:
            attributes.append(f"{name}={_attribute(attribute)}")
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    options = f" <{', '.join(attributes)}>" if attributes else ""
    return [f"{indent}{', '.join(outputs)} = {operator}{options}({', '.join(arguments)})", *bodies]


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor(attribute.as_tensor())
    return str(attribute.value)


def _name(value: ir.Value | None, names: dict[ir.Value, str]) -> str:
    if value is None:
        return "-"
    if value in names:
        return names[value]
    if value.is_initializer() and not value.is_graph_input():
        return _constant(value)
    names[value] = f"%{sum(n.startswith('%') for n in names.values())}"
    return names[value]


def _typed(value: ir.Value, names: dict[ir.Value, str]) -> str:
    return f"{_name(value, names)}: {value.type}{value.shape}"


def _constant(value: ir.Value) -> str:
    return _tensor(value.const_value) if value.const_value is not None else f"{value.name}"


def _tensor(tensor: ir.TensorProtocol) -> str:
    array = tensor.numpy()
    shown = ", ".join(str(x) for x in array.reshape(-1)[:4].tolist())
    more = ", ..." if array.size > 4 else ""
    return f"{tensor.dtype.short_name()}{list(array.shape)}{{{shown}{more}}}"
