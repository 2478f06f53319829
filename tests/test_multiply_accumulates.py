from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.multiply_accumulates import holds_numbers, node_macs, operands_of
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse

HEADER = (
    '<ir_version: 10, opset_import: ["" : 23, "ai.onnx.ml" : 3, "com.microsoft" : 1, "own" : 1]>'
)


def _macs(text: str) -> int | None:
    """Of the last node."""
    model = parse(f"{HEADER} agraph {text}")
    infer_shapes(model)
    return node_macs(model.graph[-1])


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        # 2 images, 6 channels of 8 x 8 outputs (padded), each of 4 channels and 3 x 3 places.
        (
            "(float[2, 4, 8, 8] x, float[6, 4, 3, 3] w, float[6] b) => (float[2, 6, 8, 8] y)"
            " { y = Conv<pads = [1, 1, 1, 1]>(x, w, b) }",
            2 * 6 * 8 * 8 * 4 * 9,
        ),
        # Strides 2 leave 3 x 3 outputs; each group has 2 of 4 channels.
        (
            "(float[1, 4, 8, 8] x, float[6, 2, 3, 3] w) => (float[1, 6, 3, 3] y)"
            " { y = Conv<strides = [2, 2], group = 2>(x, w) }",
            6 * 3 * 3 * 2 * 9,
        ),
        # Depthwise, dilated, in one dimension: 10 - 2 * 2 outputs.
        (
            "(float[1, 4, 10] x, float[4, 1, 3] w) => (float[1, 4, 6] y)"
            " { y = Conv<dilations = [2], group = 4>(x, w) }",
            4 * 6 * 3,
        ),
        (
            "(float[1, 4, 5, 5] x, float[4, 3, 2, 2] w) => (float[1, 6, 10, 10] y)"
            " { y = ConvTranspose<strides = [2, 2], group = 2>(x, w) }",
            4 * 25 * 3 * 4,
        ),
        (
            "(float[1, 2, 6, 6] x, float[4, 2, 3, 3] w, float[1, 18, 4, 4] o)"
            " => (float[1, 4, 4, 4] y) { y = DeformConv(x, w, o) }",
            4 * 16 * 2 * 9,
        ),
        (
            "(uint8[1, 2, 4, 4] x, uint8[3, 2, 1, 1] w) => (int32[1, 3, 4, 4] y)"
            " { y = ConvInteger(x, w) }",
            3 * 16 * 2,
        ),
        (
            "(uint8[1, 2, 4, 4] x, float s, uint8 z, uint8[3, 2, 1, 1] w)"
            " => (uint8[1, 3, 4, 4] y) { y = QLinearConv(x, s, z, w, s, z, s, z) }",
            3 * 16 * 2,
        ),
        (
            "(float[3, 5] a, float[7, 5] b, float[7] c) => (float[3, 7] y)"
            " { y = Gemm<transB = 1, alpha = 0.5>(a, b, c) }",
            3 * 5 * 7,
        ),
        (
            "(float[5, 3] a, float[5, 7] b) => (float[3, 7] y) { y = Gemm<transA = 1>(a, b) }",
            3 * 5 * 7,
        ),
        (
            "(float[2, 1, 3, 5] a, float[4, 5, 7] b) => (float[2, 4, 3, 7] y) { y = MatMul(a, b) }",
            2 * 4 * 3 * 5 * 7,
        ),
        ("(float[5] a, float[4, 5, 7] b) => (float[4, 7] y) { y = MatMul(a, b) }", 4 * 5 * 7),
        ("(float[4, 3, 5] a, float[5] b) => (float[4, 3] y) { y = MatMul(a, b) }", 4 * 3 * 5),
        ("(float[5] a, float[5] b) => (float y) { y = MatMul(a, b) }", 5),
        ("(float[0, 5] a, float[5, 2] b) => (float[0, 2] y) { y = MatMul(a, b) }", 0),
        (
            "(uint8[3, 5] a, uint8[5, 7] b) => (int32[3, 7] y) { y = MatMulInteger(a, b) }",
            3 * 5 * 7,
        ),
        (
            "(uint8[3, 5] a, float s, uint8 z, uint8[5, 7] b) => (uint8[3, 7] y)"
            " { y = QLinearMatMul(a, s, z, b, s, z, s, z) }",
            3 * 5 * 7,
        ),
        (
            "(float[2, 3, 5] a, float[2, 5, 7] b) => (float[2, 7, 3] y)"
            ' { y = Einsum<equation = "bij, bjk -> bki">(a, b) }',
            2 * 3 * 5 * 7,
        ),
        (
            "(float[2, 4, 3, 5] a, float[4, 5, 7] b) => (float[2, 4, 3, 7] y)"
            ' { y = Einsum<equation = "...ij,...jk->...ik">(a, b) }',
            2 * 4 * 3 * 5 * 7,
        ),
        ('(float[2, 3] a) => (float[3] y) { y = Einsum<equation = "ij->j">(a) }', 0),
        # 6 steps of 2 sequences, 2 directions of 4 gates of 3 numbers, from 5 inputs and 3 states.
        (
            "(float[6, 2, 5] x, float[2, 12, 5] w, float[2, 12, 3] r) => (float[6, 2, 2, 3] y)"
            ' { y = LSTM<hidden_size = 3, direction = "bidirectional">(x, w, r) }',
            6 * 2 * 2 * 12 * (5 + 3),
        ),
        (
            "(float[2, 6, 5] x, float[1, 9, 5] w, float[1, 9, 3] r) => (float[2, 6, 1, 3] y)"
            " { y = GRU<hidden_size = 3, layout = 1>(x, w, r) }",
            2 * 6 * 9 * (5 + 3),
        ),
        (
            "(float[6, 2, 5] x, float[1, 3, 5] w, float[1, 3, 3] r) => (float[6, 1, 2, 3] y)"
            " { y = RNN<hidden_size = 3>(x, w, r) }",
            6 * 2 * 3 * (5 + 3),
        ),
        # 4 heads of 2, shared by 2 of keys: 4 heads x 3 queries x 5 keys x (8 + 6).
        (
            "(float[1, 4, 3, 8] q, float[1, 2, 5, 8] k, float[1, 2, 5, 6] v)"
            " => (float[1, 4, 3, 6] y) { y = Attention(q, k, v) }",
            4 * 3 * 5 * (8 + 6),
        ),
        (
            "(float[1, 3, 32] q, float[1, 5, 16] k, float[1, 5, 12] v, float[1, 2, 7, 8] p,"
            " float[1, 2, 7, 6] s) => (float[1, 3, 24] y)"
            " { y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v, , p, s) }",
            4 * 3 * (5 + 7) * (8 + 6),
        ),
        (
            "(float[3, 4] x) => (int64[3] l, float[3, 2] y) { l, y = ai.onnx.ml.LinearClassifier"
            "<coefficients = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]>(x) }",
            3 * 8,
        ),
        (
            "(float[2, 3, 64] x, uint8[10, 2, 16] w, float[20] s) => (float[2, 3, 10] y)"
            " { y = com.microsoft.MatMulNBits<K = 64, N = 10, block_size = 32>(x, w, s) }",
            2 * 3 * 64 * 10,
        ),
        (
            "(float[5, 3] a, float[7, 5] b) => (float[3, 7] y)"
            " { y = com.microsoft.FusedMatMul<transA = 1, transB = 1>(a, b) }",
            3 * 5 * 7,
        ),
        (
            "(float[1, 3, 8] q, float[1, 5, 8] k, float[1, 5, 6] v) => (float[1, 3, 6] y)"
            " { y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v) }",
            3 * 5 * (8 + 6),
        ),
        (
            "(float[2, 3, 8] x, float[8, 24] w, float[24] b) => (float[2, 3, 8] y)"
            " { y = com.microsoft.Attention<num_heads = 2>(x, w, b) }",
            2 * 3 * 8 * 24 + 2 * 3 * 3 * (8 + 8),
        ),
        ("(float[2, 8] x) => (float[2, 8] y) { y = Relu(x) }", 0),
        ("(float[1, 8, 4, 4] x) => (float[1, 8, 1, 1] y) { y = GlobalAveragePool(x) }", 0),
        ("(float[2, 8] x) => (float[2, 8] y) { y = com.microsoft.Gelu(x) }", 0),
    ],
)  # fmt: skip
def test_counts_by_hand(text: str, macs: int) -> None:
    assert _macs(text) == macs


@pytest.mark.parametrize(
    "text",
    [
        "(float[N, 4] a, float[4, 5] b) => (float[N, 5] y) { y = MatMul(a, b) }",
        "(float[1, 4, H, 8] x, float[6, 4, 3, 3] w) => (float[1, 6, A, 6] y) { y = Conv(x, w) }",
        "(float[A, B, 5] x, float[1, 3, 5] w, float[1, 3, 3] r) => (float[A, 1, B, 3] y)"
        " { y = RNN<hidden_size = 3>(x, w, r) }",
        # Rows of a product depend on what is not zero.
        "(float[4, 4] x, float[4, 2] b) => (float[A, 2] y)"
        " { i = NonZero(x) t = Transpose(i) r = Slice(x, i, i) y = MatMul(r, b) }",
        "(float[2, 3, 8] q, float[2, 3, 8] k, float[2, 3, 8] v) => (float[2, 3, 8] y)"
        " { y = Attention(q, k, v) }",
        "(float[2, 8] x) => (float[2, 8] y) { y = own.Mix(x) }",
        "(float[1, 3, 8] q, float[1, 3, 8] k) => (float[1, 3, 8] y)"
        " { y = com.microsoft.GroupQueryAttention(q, k, k) }",
        '(float[2, 3] a, float[3] b) => (float y) { y = Einsum<equation = "ijk,k->">(a, b) }',
    ],
)
def test_what_cannot_be_told_is_none(text: str) -> None:
    assert _macs(text) is None


_ONES = [
    ('Conv<strides = [2, 1], group = 2>', [(2, 4, 9, 7), (6, 2, 3, 2)]),
    ('Conv<dilations = [3]>', [(1, 5, 19), (2, 5, 4)]),
    ('ConvTranspose<strides = [3, 2], group = 3>', [(2, 6, 4, 5), (6, 2, 2, 3)]),
    ('MatMul', [(3, 1, 4, 5), (2, 5, 6)]),
    ('MatMul', [(5,), (2, 5, 6)]),
    ('Gemm<transA = 1, transB = 1>', [(5, 4), (6, 5)]),
    ('Einsum<equation = "bhid,bhjd->bhij">', [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ('Einsum<equation = "...d,de->...e">', [(2, 3, 4, 5), (5, 6)]),
    ('Einsum<equation = "ij,jk">', [(2, 3), (3, 4)]),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "shapes"), _ONES)
def test_counts_are_what_ones_add_up_to(operator: str, shapes: list[tuple[int, ...]]) -> None:
    """Of ones times ones, each multiply-accumulate adds 1 to one output."""
    inputs = ", ".join(f"float{list(shape)} i{n}" for n, shape in enumerate(shapes))
    text = f"agraph ({inputs}) => (float y) {{ y = {operator}(i0, i1) }}"
    model = parse(text)
    model.graph.outputs[0].shape = None
    infer_shapes(model)
    feeds = {f"i{n}": np.ones(shape, np.float32) for n, shape in enumerate(shapes)}

    made = Session(model, Reference.AS_WRITTEN).run(feeds)

    assert node_macs(model.graph[0]) == made["y"].sum()


def test_operands_are_what_is_multiplied_and_numbers_what_belongs_to_the_model() -> None:
    def node(op_type: str, domain: str = "") -> ir.Node:
        return ir.Node(domain, op_type, [], num_outputs=1)

    assert operands_of(node("Conv")) == (0, 1)
    assert operands_of(node("LSTM")) == (1, 2)
    assert operands_of(node("QLinearConv")) == (0, 3)
    assert operands_of(node("Relu")) == operands_of(node("Conv", "own")) == ()
    assert [i for i in range(9) if holds_numbers(node("QLinearConv"), i)] == [0, 3, 8]
    assert [i for i in range(3) if holds_numbers(node("Gemm"), i)] == [0, 1, 2]
    assert [i for i in range(4) if holds_numbers(node("Resize"), i)] == [0]


@pytest.mark.parametrize(
    "text",
    [
        "MatMulNBits<N = 1.5>(x, w)",
        'FusedMatMul<transA = "yes">(x, w)',
        "Attention<qkv_hidden_sizes = 3>(x, w)",
        "Attention<qkv_hidden_sizes = [3, 3]>(x, w)",
    ],
)
def test_attributes_of_another_type_are_not_believed(text: str) -> None:
    graph = f"(float[2, 3, 8] x, float[8, 9] w) => (float[A] y) {{ y = com.microsoft.{text} }}"

    assert _macs(graph) is None


@pytest.mark.parametrize("operator", ["Conv", "MatMul", "Gemm", "LSTM", "Einsum", "Attention"])
def test_nodes_without_inputs_or_shapes_are_not_known(operator: str) -> None:
    assert node_macs(ir.Node("", operator, [], num_outputs=1)) is None
    assert node_macs(ir.Node("", operator, [None, ir.Value(name="x")], num_outputs=1)) is None
