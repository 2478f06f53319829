"""What counts as packed, and what does not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.packing import CODES_MINIMUM, NODES_MAXIMUM, is_packed, nodes_behind
from graphopt.testing import assert_unchanged, parse
from graphopt_passes.simplify.fold_constants import FoldConstants


def packed(body: str, kind: str = "int8[8,16]", **initializers: np.ndarray) -> bool:
    """Whether `v` is, in a graph of codes `q`, scales `s` and an input `x`."""
    text = f"""
    agraph (float[8,16] x, {kind} q, float[8,1] s) => (float[A,B] y)
    <int64[2] shape = {{8, 16}}, float one = {{1.0}}>
    {{ {body}  y = Mul(x, v) }}
    """
    given = {"q": np.ones((8, 16), np.int8), "s": np.ones((8, 1), np.float32), **initializers}
    model = parse(text, **given)
    return is_packed(next(o for n in model.graph for o in n.outputs if o.name == "v"))


@pytest.mark.parametrize(
    "body",
    [
        "v = DequantizeLinear(q, one)",
        "v = Cast<to = 1>(q)",
        "c = Cast<to = 1>(q) v = Mul(c, s)",
        "c = Cast<to = 1>(q) v = Mul(s, c)",
        "c = Cast<to = 10>(q) v = Cast<to = 1>(q)",
        "c = Cast<to = 1>(q) m = Mul(c, s) v = Cast<to = 1>(m)",
        "t = Transpose(q) c = Cast<to = 1>(t) v = Mul(c, s)",
        "r = Reshape(q, shape) v = Cast<to = 1>(r)",
        "k = Constant<value_int = 1>() c = Cast<to = 1>(q) v = Mul(c, s)",
        "v = Cast<to = 6>(q)",
        "c = Cast<to = 1>(q) v = Add(c, s)",
        "i = Cast<to = 6>(q) v = Gather(s, i)",
        "i = Cast<to = 6>(q) g = Gather(s, i) r = Reshape(g, shape) v = Mul(r, s)",
        "t = Transpose(q) v = Cast<to = 6>(t)",
    ],
)
def test_narrow_constants_that_nodes_widen_are_packed(body: str) -> None:
    assert packed(body)


@pytest.mark.parametrize(
    "body",
    [
        "v = Cast<to = 9>(q)",
        "v = Transpose(q)",
        "c = Cast<to = 1>(q) v = Mul(c, x)",
        "c = Cast<to = 1>(q) m = Mul(c, x) v = Cast<to = 1>(m)",
        "i = Cast<to = 3>(x) v = Cast<to = 1>(i)",
        "v = Mul(s, one)",
        "v = Relu(x)",
    ],
)
def test_others_are_not(body: str) -> None:
    assert not packed(body)


@pytest.mark.parametrize(
    "codes",
    [np.ones((8, 16), np.int32), np.ones((7, 9), np.int8), np.ones((8, 16), np.bool_)],
    ids=["wide", "few", "no numbers"],
)
def test_constants_that_are_no_codes(codes: np.ndarray) -> None:
    assert codes.dtype != np.int8 or codes.size < CODES_MINIMUM
    kind = {"int32": "int32", "int8": "int8", "bool": "bool"}[codes.dtype.name]
    text = "v = Cast<to = 1>(q)"
    assert not packed(text, f"{kind}[{codes.shape[0]},{codes.shape[1]}]", q=codes)


def test_codes_that_a_caller_can_override_are_not() -> None:
    model = parse(
        "agraph (int8[8,16] q) => (float[8,16] y) { v = Cast<to = 1>(q) y = Relu(v) }",
        q=np.ones((8, 16), np.int8),
    )
    model.graph.inputs.append(model.graph.initializers["q"])

    assert not is_packed(model.graph[0].outputs[0])


def test_none_is_not() -> None:
    assert not is_packed(None)
    assert not is_packed(ir.Value(name="x"))


def test_codes_are_not_folded_where_it_would_save_bytes() -> None:
    change = assert_unchanged(
        FoldConstants(),
        parse(
            """
            agraph (float[N,8] x, int8[8,16] q, float[1,16] s) => (float[N,1] y)
            <int64[1] first = {0}, int64[1] last = {1}>
            { c = Cast<to = 1>(q) m = Mul(c, s) t = Slice(m, first, last, last) y = MatMul(x, t) }
            """,
            q=np.arange(128, dtype=np.int8).reshape(8, 16),
            s=np.ones((1, 16), np.float32),
        ),
    )

    assert [s.reason for s in change.skips] == ["it widens packed weights, which must stay packed"]


ROWS = """
agraph (float[8,16] x, float[4,16] t, uint8[8] q, float[8,1] s) => (float[A,B] y)
{ i = Cast<to = 6>(q) v = Gather(t, i) w = Mul(v, s) y = Mul(x, w) }
"""


def steps_that_are_packed(text: str = ROWS, **initializers: np.ndarray) -> list[str]:
    given = {
        "t": np.ones((4, 16), np.float32),
        "q": np.arange(8, dtype=np.uint8) % 4,
        "s": np.ones((8, 1), np.float32),
        **initializers,
    }
    model = parse(text, **given)
    outputs = (output for node in model.graph for output in node.outputs)
    return [output.name or "" for output in outputs if is_packed(output)]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_rows_that_a_narrow_index_repeats_are_packed(kind: str) -> None:
    index = (np.arange(8) % 4).astype(kind)

    assert steps_that_are_packed(ROWS.replace("uint8", kind), q=index) == ["i", "v", "w"]


def test_rows_along_another_axis_and_of_halves_are_packed() -> None:
    across = ROWS.replace("Gather(t", "Gather<axis = -1>(t").replace("[4,16] t", "[16,4] t")
    table = np.ones((16, 4), np.float32)
    assert steps_that_are_packed(across.replace("[8,1]", "[1,8]"), t=table, s=table[:1, :1]) == [
        "i",
        "v",
        "w",
    ]
    halves = ROWS.replace("float[4,16]", "float16[4,16]").replace("v =", "h = Cast<to = 1>(t) v =")
    halves = halves.replace("Gather(t", "Gather(h")
    assert steps_that_are_packed(halves, t=np.ones((4, 16), np.float16)) == ["i", "h", "v", "w"]


@pytest.mark.parametrize(
    ("text", "given"),
    [
        (ROWS.replace("uint8", "int32"), {"q": np.zeros(8, np.int32)}),
        (ROWS.replace("[4,16]", "[8,16]"), {"t": np.ones((8, 16), np.float32)}),
        (ROWS.replace("[4,16]", "[4,15]"), {"t": np.ones((4, 15), np.float32)}),
        (ROWS.replace("float[4,16]", "int32[4,16]"), {"t": np.ones((4, 16), np.int32)}),
        (ROWS.replace("Gather(t", "Gather<axis = 2>(t"), {}),
        (ROWS.replace("Gather(t", "Gather(x"), {}),
    ],
    ids=["wide index", "no fewer rows", "few numbers", "integers", "no such axis", "an input"],
)
def test_other_lookups_are_not_packed(text: str, given: dict[str, np.ndarray]) -> None:
    assert steps_that_are_packed(text, **given) == []


def test_repeated_rows_are_not_folded() -> None:
    given = {"t": np.ones((4, 16), np.float32), "q": np.zeros(8, np.uint8)}
    model = parse(ROWS, **given, s=np.ones((8, 1), np.float32))
    change = assert_unchanged(FoldConstants(), model)

    assert [s.reason for s in change.skips] == ["it widens packed weights, which must stay packed"]


@pytest.mark.parametrize(("more", "followed"), [(0, True), (1, False)])
def test_long_chains_are_followed_no_further(more: int, followed: bool) -> None:
    """So that whoever asks about every node of a long graph takes no longer for each."""
    value = ir.Value(name="c", const_value=ir.tensor(np.ones(CODES_MINIMUM, np.int8)))
    graph = ir.Graph([], [], nodes=[], initializers=[value])
    for _ in range(NODES_MAXIMUM + more):
        graph.append(ir.node("Add", [value, value]))
        value = graph[-1].outputs[0]

    assert (nodes_behind(value) is not None) is followed
    assert is_packed(value) is followed
