"""What is said of the shapes that operators of onnxruntime make is what it makes."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.microsoft_shapes import RULES
from graphopt.runtime import Reference, Session
from graphopt.shape_facts import ShapeFacts
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'

NODES = {
    "BiasGelu": "float[2,3,8] x, float[8] b: y = com.microsoft.BiasGelu(x, b)",
    "DynamicQuantizeMatMul": "float[2,3,8] x, uint8[8,5] w, float s, uint8 z:"
    " y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z)",
    "FastGelu": "float[2,3,8] x, float[8] b: y = com.microsoft.FastGelu(x, b)",
    "Gelu": "float[2,3,8] x: y = com.microsoft.Gelu(x)",
    "GroupQueryAttention": "float[2,3,32] x, float[2,3,16] k, int32[2] l, int32 t:"
    " y, p, v = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(x, k, k, , , l, t)",
    "MatMulIntegerToFloat": "uint8[2,3,8] x, uint8[8,5] w, float s:"
    " y = com.microsoft.MatMulIntegerToFloat(x, w, s, s)",
    "MatMulNBits": "float[2,3,32] x, uint8[5,1,16] w, float[5] s:"
    " y = com.microsoft.MatMulNBits<K=32, N=5, bits=4, block_size=32>(x, w, s)",
    "MultiHeadAttention": "float[2,3,8] x, float[2,5,8] k, float[2,5,12] v:"
    " y = com.microsoft.MultiHeadAttention<num_heads=2>(x, k, v)",
    "QuickGelu": "float[2,3,8] x: y = com.microsoft.QuickGelu(x)",
    "RotaryEmbedding": "float[2,3,8] x, int64[1] p, float[7,4] c:"
    " y = com.microsoft.RotaryEmbedding(x, p, c, c)",
    "SimplifiedLayerNormalization": "float[2,3,8] x, float[8] g:"
    " y = SimplifiedLayerNormalization(x, g)",
    "SkipLayerNormalization": "float[2,3,8] x, float[8] g:"
    " y, , , r = com.microsoft.SkipLayerNormalization(x, x, g)",
    "SkipSimplifiedLayerNormalization": "float[2,3,8] x, float[8] g:"
    " y, , , r = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)",
}


def test_every_rule_is_tried() -> None:
    assert {name for _, name in RULES} == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_shapes_are_those_that_onnxruntime_makes(name: str) -> None:
    inputs, _, body = NODES[name].partition(": ")
    outputs = "float[A, B, C] y" + (", float[D, E, F] r" if ", , , r" in body else "")
    model = parse(f"{HEADER} agraph ({inputs}) => ({outputs}) {{ {body} }}")
    infer_shapes(model)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        feeds[value.name] = np.ones(value.shape.numpy(), value.dtype.numpy())
    if name == "GroupQueryAttention":
        feeds |= {"l": np.int32([2, 2]), "t": np.array(3, np.int32)}
    if name == "RotaryEmbedding":
        feeds["p"] = np.int64([0])

    made = Session(model, Reference.AS_WRITTEN).run(feeds)

    facts = ShapeFacts(model, RULES)
    for output in model.graph.outputs:
        assert facts.shape(output) == made[output.name or ""].shape


def test_what_is_packed_or_has_no_rank_is_not_told() -> None:
    packed = parse(
        f"{HEADER} agraph (float[2, 3, 64] x, float z) => (float[A] y, float[B] n)"
        "{ y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(x)"
        " h = com.microsoft.MultiHeadAttention<num_heads = 4>(x)"
        " n = com.microsoft.MatMulIntegerToFloat(z)"
        " m = com.microsoft.MatMulNBits<N = 1.5>(x, x) }"
    )
    infer_shapes(packed)
    facts = ShapeFacts(packed, RULES)

    made = [value for node in packed.graph for value in node.outputs]
    assert [facts.shape(value) for value in made] == [None] * 4
