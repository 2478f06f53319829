"""For tests of fusions: small graphs of one value x that write out what one operator computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Pass
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse

KINDS = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
}


def model(
    body: str,
    numbers: str = "",
    shape: str = "2,3,8",
    kind: str = "float",
    opset: int = 21,
    inputs: str = "",
    outputs: str = "",
    **arrays: np.ndarray,
) -> ir.Model:
    """The body is of nodes that make y from x; numbers are `name=value`, of no dimension.

    Args:
        body: nodes.
        numbers: constants of the type of x.
        shape: of x and y.
        kind: the element type of x, y and the numbers.
        opset: of the model.
        inputs: further ones.
        outputs: further ones.
        arrays: further constants.
    """
    pairs = [pair.split("=") for pair in numbers.split()]
    arrays |= {name: np.array(float(value), KINDS[kind]) for name, value in pairs}
    heads = [f"{kind}[{shape}] x", *([inputs] if inputs else [])]
    heads += [f"{_kind(array)}{list(array.shape)} {name}" for name, array in arrays.items()]
    tails = [f"{kind}[{shape}] y", *([outputs] if outputs else [])]
    text = f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    agraph ({", ".join(heads)}) => ({", ".join(tails)}) {{ {body} }}
    """
    return parse(text, **arrays)


def _kind(array: np.ndarray) -> str:
    return next(kind for kind, dtype in KINDS.items() if array.dtype == dtype)


def operators(changed: ir.Model) -> list[str]:
    return [node.op_type for node in changed.graph]


def attributes(changed: ir.Model) -> dict[str, object]:
    """Those of the only node."""
    (node,) = changed.graph
    return {name: attribute.value for name, attribute in node.attributes.items()}


def assert_fuses(tested: Pass, changed: ir.Model, *wanted: str) -> Change:
    """The pass leaves nodes of the wanted operators, in order, which compute the same."""
    before = changed.clone()
    change = apply_pass(tested, changed)
    assert operators(changed) == list(wanted), f"skipped: {change.skips}"
    assert change
    assert_equivalent(before, changed, tested.effect)
    assert not apply_pass(tested, changed), "a second time"
    return change


def reasons(tested: Pass, unchanged: ir.Model) -> list[str]:
    """Why the pass leaves all of the model alone."""
    return [skip.reason for skip in assert_unchanged(tested, unchanged).skips]
