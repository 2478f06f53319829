"""Layers as matrices: what onnxruntime computes of rows, a matrix and a bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from on_codes import normal

from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.statistics import Gram
from graphopt.testing import parse
from graphopt_passes.quantize.affine import Affine, affine_of
from graphopt_passes.quantize.layers import Layer, layer_of, products
from graphopt_passes.quantize.units import PRODUCTS
from graphopt_passes.quantize.weights import integer_layer

FORMS = [
    ("Conv (x, w, b)", (2, 4, 5, 6), (6, 4, 3, 3)),
    ("Conv (x, w)", (2, 4, 5, 6), (6, 4, 1, 1)),
    ("Conv <pads = [1, 0, 2, 1], strides = [2, 1]> (x, w, b)", (2, 4, 6, 5), (6, 4, 3, 2)),
    ("Conv <dilations = [2, 3]> (x, w, b)", (1, 4, 9, 9), (6, 4, 2, 2)),
    ("Conv <group = 2> (x, w, b)", (2, 4, 5, 5), (6, 2, 3, 3)),
    ("Conv <group = 6> (x, w, b)", (2, 6, 5, 5), (6, 1, 3, 3)),
    ("Conv <group = 3> (x, w, b)", (2, 3, 5, 5), (6, 1, 3, 3)),
    ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w, b)', (1, 4, 6, 7), (6, 4, 3, 3)),
    ('Conv <auto_pad = "SAME_LOWER", strides = [3, 2]> (x, w, b)', (1, 4, 6, 7), (6, 4, 2, 4)),
    ('Conv <auto_pad = "VALID"> (x, w, b)', (1, 4, 6, 7), (6, 4, 3, 3)),
    ("Conv <pads = [1, 1]> (x, w, b)", (2, 4, 7), (6, 4, 3)),
    ("Conv (x, w, b)", (1, 2, 4, 4, 4), (6, 2, 2, 3, 2)),
    ("Gemm (x, w, b)", (5, 4), (4, 6)),
    ("Gemm <transB = 1> (x, w, b)", (5, 4), (6, 4)),
    ("Gemm (x, w)", (5, 4), (4, 6)),
    ("MatMul (x, w)", (5, 4), (4, 6)),
    ("MatMul (x, w)", (2, 3, 5, 4), (4, 6)),
    ("MatMul (x, w)", (4,), (4, 6)),
]
"""A node, the shape of its input, and that of its weight; all have six outputs."""


def model_of(node: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> ir.Model:
    """One layer, with inferred shapes."""
    dimensions, sizes = (", ".join(map(str, s)) for s in (shape, weight))
    unknown = ", ".join("ABCDE"[: len(shape)])
    model = parse(
        f"""
        agraph (float[{dimensions}] x, float[{sizes}] w, float[6] b) => (float[{unknown}] y)
        {{ y = {node} }}
        """,
        w=normal(1, *weight),
        b=normal(2, 6),
    )
    infer_shapes(model)
    return model


def layer_in(model: ir.Model) -> Layer:
    return layer_of(next(node for node in model.graph if node.op_type in PRODUCTS))


def rows_of(layer: Layer, array: np.ndarray) -> np.ndarray:
    """All rows that the layer multiplies with its weight: [group, rows, inputs]."""
    patches = layer.patches()
    if patches is None:
        return array.reshape(1, -1, array.shape[-1])
    windows = patches.cut(array)
    rows = np.moveaxis(windows, 2, 1 + len(patches.kernel) + 1)
    return rows.reshape(layer.group, -1, layer.dimensions[2])


def by_output(layer: Layer, y: np.ndarray) -> np.ndarray:
    """Outputs of a layer as [outputs, places], in the order of rows."""
    channels = y if layer.patches() is None else np.moveaxis(y, 1, -1)
    return channels.reshape(-1, 6).T


@pytest.mark.parametrize(("node", "shape", "weight"), FORMS)
def test_rows_times_matrix_plus_bias_is_what_onnxruntime_computes(
    node: str, shape: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    model = model_of(node, shape, weight)
    layer, x = layer_in(model), normal(3, *shape)
    group, outputs, inputs = layer.dimensions
    assert layer.matrix().shape == (group, outputs, inputs)
    assert group * outputs == 6

    rows = rows_of(layer, x)
    made = products(rows, layer.matrix())
    bias = layer.bias()

    wanted = by_output(layer, Session(model).run({"x": x})["y"])
    got = made.transpose(0, 2, 1).reshape(6, -1) + (0.0 if bias is None else bias[:, np.newaxis])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("node", "shape", "weight"), FORMS)
def test_a_matrix_goes_back_into_the_layout_of_the_weight(
    node: str, shape: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    layer = layer_in(model_of(node, shape, weight))

    np.testing.assert_array_equal(layer.stored(layer.matrix()), normal(1, *weight))
    assert layer.stored(np.int8(layer.matrix())).dtype == np.int8
    assert layer.can_have_bias == (not node.startswith("MatMul"))


@pytest.mark.parametrize(("node", "shape", "weight"), FORMS)
def test_integers_of_a_layer_compute_about_what_it_does(
    node: str, shape: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    model = model_of(node, shape, weight)
    layer, gram = layer_in(model), Gram(layer_in(model).patches())
    array = normal(3, *shape)
    source = affine_of(float(array.min()), float(array.max()))
    rows = layer.ask("rows").start()
    rows.add(array)
    gram.add(array)

    integers = integer_layer(layer, source, rows, gram)  # type: ignore[arg-type]

    assert integers.codes.dtype == np.int8 and integers.codes.shape == weight
    assert integers.bias.dtype == np.int32 and integers.bias.shape == (6,)
    assert integers.scales.dtype == integers.bias_scales.dtype == np.float32
    np.testing.assert_array_equal(integers.bias_scales, source.scale * integers.scales)
    exact = output_of(layer, rows_of(layer, array), layer.matrix(), layer.bias())
    scales = integers.scales.astype(np.float64).reshape(layer.dimensions[:2])[..., np.newaxis]
    coded = Layer(layer.node, layer.group).stored(layer.matrix())
    assert coded.shape == integers.codes.shape
    matrix = matrix_of(layer, integers.codes) * scales
    rounded = source.rounded(rows_of(layer, array))
    bias = integers.bias * integers.bias_scales.astype(np.float64)
    got = output_of(layer, rounded, matrix, bias)
    assert np.linalg.norm(got - exact) < 0.02 * np.linalg.norm(exact)
    if layer.can_have_bias:
        # Bias correction: within half a unit of the bias, which is as fine as it can be said.
        np.testing.assert_allclose(
            got.mean(1), exact.mean(1), rtol=0, atol=0.51 * integers.bias_scales.max()
        )


def matrix_of(layer: Layer, codes: np.ndarray) -> np.ndarray:
    """Codes in the layout of the weight, as the layer's matrix."""
    rows = np.moveaxis(codes.astype(np.float64), layer.axis, 0)
    return rows.reshape(layer.matrix().shape)


def output_of(
    layer: Layer, rows: np.ndarray, matrix: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Of shape [outputs, rows]."""
    made = products(rows.astype(np.float64), matrix).transpose(0, 2, 1).reshape(6, -1)
    return made + (0.0 if bias is None else bias[:, np.newaxis])


def test_a_bias_beyond_int32_widens_the_scale_of_its_weights() -> None:
    model = parse(
        "agraph (float[5, 4] x, float[4, 6] w, float[6] b) => (float[5, 6] y) {y = Gemm(x, w, b)}",
        w=normal(1, 4, 6),
        b=np.float32([1e12, -1e12, 1.0, 0.0, 1e6, 3e38]),
    )
    layer, array = layer_in(model), normal(3, 5, 4)
    rows, gram = layer.ask("rows").start(), Gram()
    rows.add(array)
    gram.add(array)

    integers = integer_layer(layer, Affine(np.float32(0.01), 128), rows, gram)  # type: ignore[arg-type]

    bias = integers.bias * integers.bias_scales.astype(np.float64)
    # What rounding changes in the mean is added.
    np.testing.assert_allclose(bias, layer.bias(), rtol=1e-6, atol=1.0)
    assert np.abs(integers.bias.astype(np.int64)).max() < 2**30 * 1.001
