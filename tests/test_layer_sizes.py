from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.layer_sizes import LayerSize, bytes_by_name, dtype_totals, layer_sizes
from graphopt.sparse_tensors import mark_sparse, sparse_proto
from graphopt.testing import parse


def _found(model: ir.Model) -> dict[str, dict[str, int]]:
    return {layer.name: dict(layer.dtype_bytes) for layer in layer_sizes(model)}


def test_constants_are_of_the_node_that_reads_them() -> None:
    model = parse(
        """
        agraph (float[N, 4] x, float[4, 3] w, float[3] b) => (float[N, 3] y) {
            h = MatMul(x, w)
            two = Constant<value_float = 2.0>()
            s = Mul(h, two)
            y = Add(s, b)
        }""",
        w=np.ones((4, 3), np.float32),
        b=np.ones(3, np.float32),
    )

    assert _found(model) == {"h": {"float": 48}, "s": {"float": 4}, "y": {"float": 12}}


def test_what_several_nodes_read_counts_once_for_the_first() -> None:
    model = parse(
        "agraph (float[N, 4] x, float[4, 4] w) => (float[N, 4] y)"
        " { h = MatMul(x, w) y = MatMul(h, w) }",
        w=np.ones((4, 4), np.float32),
    )

    assert _found(model) == {"h": {"float": 64}}


def test_codes_and_scales_are_of_the_node_that_reads_the_weight() -> None:
    model = parse(
        """
        agraph (float[N, 4] x, int8[4, 3] codes, float scale) => (float[N, 3] y) {
            w = DequantizeLinear(codes, scale)
            y = MatMul(x, w)
        }""",
        codes=np.ones((4, 3), np.int8),
        scale=np.float32(0.5),
    )

    assert _found(model) == {"y": {"int8": 12, "float": 4}}


def test_four_bits_are_half_a_byte() -> None:
    model = parse(
        """
        agraph (float[N, 4] x, float scale) => (float[N, 3] y) {
            w = DequantizeLinear(codes, scale)
            y = MatMul(x, w)
        }""".replace("float scale", "int4[4, 3] codes, float scale"),
        scale=np.float32(0.5),
    )
    codes = next(v for v in model.graph.inputs if v.name == "codes")
    model.graph.inputs.remove(codes)
    codes.const_value = ir.Tensor(
        np.ones((4, 3), ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="codes"
    )
    model.graph.register_initializer(codes)

    assert _found(model) == {"y": {"int4": 6, "float": 4}}


def test_a_weight_that_is_passed_on_by_a_size_of_the_input_is_of_its_reader() -> None:
    model = parse(
        """
        agraph (float[4, 4] x, float[4, 4] w) => (float[4, 4] y) {
            size = Shape(x)
            wide = Expand(w, size)
            y = MatMul(x, wide)
        }""",
        w=np.ones((4, 4), np.float32),
    )

    assert _found(model) == {"y": {"float": 64}}


def test_overridable_inputs_and_bodies_count() -> None:
    model = parse(
        """
        agraph (bool c, float[4] x, float[4] w) => (float[4] y) {
            y = If(c) <
                then_branch = t () => (float[4] a) { a = Add(x, w) },
                else_branch = e () => (float[4] b) { b = Identity(x) }
            >
        }""",
        w=np.ones(4, np.float32),
    )
    weight = model.graph.initializers["w"]
    model.graph.inputs.append(weight)

    assert _found(model) == {"a": {"float": 16}}


def test_zeros_that_are_not_stored_do_not_count() -> None:
    weight = np.zeros((64, 64), np.float32)
    weight[0, :8] = 1
    model = parse(
        "agraph (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }",
        w=weight,
    )
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    mark_sparse(tensor)

    assert _found(model) == {"y": {"float": sparse_proto(tensor, "").ByteSize()}}
    assert sum(_found(model)["y"].values()) < weight.nbytes / 50


def test_sums_by_element_type_and_by_name() -> None:
    layers = (
        LayerSize("a", "Conv", {"int8": 10, "float": 4}),
        LayerSize("b", "Conv", {"float": 30}),
        LayerSize("a", "Conv", {"int8": 1}),
    )

    assert list(dtype_totals(layers).items()) == [("float", 34), ("int8", 11)]
    assert bytes_by_name(layers) == {"a": {"int8": 11, "float": 4}, "b": {"float": 30}}
