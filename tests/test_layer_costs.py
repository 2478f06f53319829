from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import SpecError
from graphopt.layer_costs import (
    LayerCost,
    free_sizes,
    layers_of_model,
    sizes_of_sample,
    zero_share_of,
)
from graphopt.skeleton import from_proto
from graphopt.testing import parse

HALF_ZERO = np.float32([[0, 1, 2], [-0.0, 0, 3]])


def test_a_layer_tells_its_name_macs_parameters_and_zeros() -> None:
    model = parse(
        """
        agraph (float[4, 2] x, float[2, 3] w, float[3] b, float[3] g) => (float[4, 3] y)
        {
            [fc] h = Gemm(x, w, b)
            s = Mul(h, g)
            y = Relu(s)
        }
        """,
        w=HALF_ZERO,
        b=np.zeros(3, np.float32),
        g=np.zeros(3, np.float32),
    )

    assert layers_of_model(model) == (
        # The zeros of the bias are none of the weight.
        LayerCost("fc", "Gemm", 4 * 2 * 3, 9, 6, 0.5, None),
        LayerCost("s", "Mul", 0, 3, 0, None, None),
    )


def test_the_zeros_of_all_layers_count_by_their_weights() -> None:
    def layer(weights: int, zero_share: float | None) -> LayerCost:
        return LayerCost("l", "MatMul", 1, weights, weights, zero_share, None)

    assert zero_share_of([layer(6, 0.5), layer(2, 1.0), layer(100, None)]) == 5 / 8
    assert zero_share_of([layer(5, None)]) is None
    assert zero_share_of([]) is None


def test_single_numbers_bounds_scales_and_indices_are_no_parameters() -> None:
    model = parse(
        """
        agraph (float[2, 3] x) => (float[2, 6] y)
        <float half = {0.5}, float[2] s = {1.0, 2.0}, int64[2] i = {0, 1}, float[2] v = {0.0, 1.0}>
        {
            a = Mul(x, half)
            r = Resize(a, , s)
            y = Gather(r, i)
        }
        """
    )

    assert layers_of_model(model) == ()


def test_the_weight_of_a_table_and_of_a_batch_normalization_are_parameters() -> None:
    model = parse(
        """
        agraph (int64[2] i, float[2, 3] t, float[3] p) => (float[2, 3] y)
        { h = Gather(t, i) y = BatchNormalization(h, p, p, p, p) }
        """,
        t=HALF_ZERO,
        p=np.ones(3, np.float32),
    )

    assert [(n.op_type, n.macs, n.parameters, n.weights) for n in layers_of_model(model)] == [
        ("Gather", 0, 6, 0),
        ("BatchNormalization", 0, 12, 0),
    ]


def test_weights_that_callers_may_replace_count_too() -> None:
    model = parse(
        "agraph (float[4, 2] x, float[2, 3] w) => (float[4, 3] y) { y = MatMul(x, w) }", w=HALF_ZERO
    )
    model.graph.inputs.append(model.graph.initializers["w"])

    assert layers_of_model(model) == (LayerCost("y", "MatMul", 24, 6, 6, 0.5, None),)
    assert len(model.graph.inputs) == 2


def test_nothing_is_changed() -> None:
    model = parse(
        "agraph (float[N, 2] x, float[2, 3] w) => (float[M, 3] y) { y = MatMul(x, w) }", w=HALF_ZERO
    )
    before = ir.to_proto(model).SerializeToString()

    layers_of_model(model, {"N": 3})

    assert ir.to_proto(model).SerializeToString() == before


# ------------------------------------------------------------------ sizes

FREE = """
agraph (float[N, 2] x, float[N, ?] z, float[2, 3] w) => (float[A, 3] y, float[B, C] u)
{ y = MatMul(x, w) t = Transpose(z) u = MatMul(z, t) }
"""


def _free() -> ir.Model:
    model = parse(FREE.replace("?", "Z"), w=HALF_ZERO)
    model.graph.inputs[1].shape = ir.Shape(["N", None])
    return model


@pytest.mark.parametrize(
    ("sizes", "counted", "macs"),
    [
        ({}, {"N": 1, "z[1]": 1}, [6, 1]),
        ({"N": 4}, {"N": 4, "z[1]": 1}, [4 * 6, 4 * 4]),
        ({"N": 4, "z[1]": 5}, {"N": 4, "z[1]": 5}, [4 * 6, 4 * 5 * 4]),
        # Two dimensions of one name are two dimensions.
        ({"N": 4, "z[0]": 3}, {"N": 4, "z[0]": 3, "z[1]": 1}, [4 * 6, 3 * 3]),
        ({"N": 0}, {"N": 0, "z[1]": 1}, [0, 0]),
    ],
)
def test_open_dimensions_count_as_they_are_told_or_1(
    sizes: dict[str, int], counted: dict[str, int], macs: list[int]
) -> None:
    assert free_sizes(_free(), sizes) == counted
    layers = {layer.name: layer.macs for layer in layers_of_model(_free(), sizes)}
    assert [layers.get("y", 0), layers.get("u", 0)] == macs


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"M": 2}, "no dimension is called 'M'"),
        ({"x[1]": 2}, r"no dimension is called 'x\[1\]'"),
        ({"N": -1}, "dimension N has size -1"),
        ({"N": 1.5}, "dimension N has size 1.5"),
    ],
)
def test_sizes_of_no_open_dimension_are_refused(sizes: dict[str, int], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        free_sizes(_free(), sizes)


def test_a_sample_has_the_sizes() -> None:
    def sample(rows: int) -> dict[str, np.ndarray]:
        return {"x": np.ones((4, 2), np.float32), "z": np.ones((rows, 5), np.float32)}

    assert sizes_of_sample(_free(), sample(4)) == {"N": 4, "z[1]": 5}
    assert sizes_of_sample(_free(), sample(3)) == {"N": 4, "z[0]": 3, "z[1]": 5}
    assert sizes_of_sample(_free(), {}) == {}


def test_inspect_takes_sizes_and_samples(tmp_path: Path) -> None:
    sample = {"x": np.ones((4, 2), np.float32), "z": np.ones((4, 5), np.float32)}
    np.savez(tmp_path / "0.npz", **sample)  # type: ignore[arg-type]

    assumed, _ = graphopt.inspect(_free())
    given, _ = graphopt.inspect(_free(), sizes={"N": 2})
    sampled, _ = graphopt.inspect(_free(), samples=tmp_path)
    both, _ = graphopt.inspect(_free(), sizes={"N": 2}, samples=tmp_path)

    assert (assumed.macs, assumed.assumed) == (6 + 1, ("N", "z[1]"))
    assert (given.macs, given.assumed) == (2 * 6 + 2 * 2, ("z[1]",))
    assert (sampled.macs, sampled.assumed) == (4 * 6 + 4 * 5 * 4, ())
    assert both.sizes == {"N": 2, "z[1]": 5}


def test_shape_arithmetic_is_followed() -> None:
    """onnx's inference loses a size that a Slice takes from a shape."""
    model = parse(
        """
        agraph (float[N, 8, 6] x, float[512, 6] m) => (float[A, B, C] y)
        <int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}>
        {
            s = Shape(x)
            n = Slice(s, one, two)
            r = Slice(m, zero, n, zero)
            t = Transpose<perm = [1, 0]>(r)
            y = MatMul(x, t)
        }
        """,
        m=np.ones((512, 6), np.float32),
    )

    (_, product) = layers_of_model(model, {"N": 3})

    assert product.macs == 3 * 8 * 6 * 8


# ------------------------------------------------------------------ bodies and functions


def test_bodies_count_once_and_say_so() -> None:
    model = parse(
        """
        agraph (float[4, 2] x, bool c, int64 n, float[2, 2] w) => (float[4, 2] y, float[4, 2] z)
        {
            [branch] y = If(c) <
                then_branch = then () => (float[4, 2] a) { a = MatMul(x, w) },
                else_branch = other () => (float[4, 2] b) { b = Relu(x) }
            >
            [loop] z = Loop(n, , x) <
                body = body (int64 i, bool d, float[4, 2] s) => (bool e, float[4, 2] t)
                { e = Identity(d) t = MatMul(s, w) }
            >
        }
        """,
        w=np.eye(2, dtype=np.float32),
    )

    assert layers_of_model(model) == (
        LayerCost("a", "MatMul", 16, 4, 4, 0.5, "branch"),
        LayerCost("t", "MatMul", None, 4, 4, 0.5, "loop"),
    )


def test_calls_of_functions_are_their_nodes() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        agraph (float[N, 2] x, float[2, 2] w) => (float[N, 2] y)
        { h = own.Layer(x, w) y = own.Layer(h, w) }
        <domain: "own", opset_import: ["" : 21]>
        Layer (p, q) => (o) { o = MatMul(p, q) }
        """,
        w=np.eye(2, dtype=np.float32),
    )

    layers = layers_of_model(model, {"N": 3})

    assert [(n.op_type, n.macs, n.parameters, n.zero_share) for n in layers] == [
        ("MatMul", 12, 4, 0.5)
    ] * 2


def test_what_is_not_known_is_said() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1, "com.microsoft" : 1]>
        agraph (float[2, 2] x, float[2, 2] w) => (float[2, 2] y)
        { h = own.Mix(x, w) y = MatMul(h, w) }
        """,
        w=np.eye(2, dtype=np.float32),
    )

    assert layers_of_model(model) == (
        LayerCost("h", "own.Mix", None, 4, 0, None, None),
        LayerCost("y", "MatMul", None, 4, 4, 0.5, None),
    )


def test_shapes_are_followed_through_operators_of_onnxruntime() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (int64[1, T] i, float[40, 32] t, float[32] g, uint8[64, 1, 16] c, float[64] s,
                uint8[32, 2, 16] d, float[64] u, float[64, 40] h) => (float[1, T, 40] y)
        {
            e = Gather(t, i)
            n = com.microsoft.SimplifiedLayerNormalization(e, g)
            a = com.microsoft.MatMulNBits<K = 32, N = 64, block_size = 32>(n, c, s)
            o = com.microsoft.MultiHeadAttention<num_heads = 2>(a, a, a)
            b = com.microsoft.MatMulNBits<K = 64, N = 32, block_size = 32>(o, d, u)
            m, , , r = com.microsoft.SkipSimplifiedLayerNormalization(b, e, g)
            q = com.microsoft.QuickGelu(r)
            w = com.microsoft.MatMulNBits<K = 32, N = 64, block_size = 32>(q, c, s)
            y = MatMul(w, h)
        }
        """,
        t=np.ones((40, 32), np.float32),
        g=np.ones(32, np.float32),
        c=np.ones((64, 1, 16), np.uint8),
        s=np.ones(64, np.float32),
        d=np.ones((32, 2, 16), np.uint8),
        u=np.ones(64, np.float32),
        h=np.ones((64, 40), np.float32),
    )

    layers = layers_of_model(model, {"T": 5})

    assert {layer.name: layer.macs for layer in layers if layer.macs != 0} == {
        "a": 5 * 32 * 64,
        "o": 5 * 5 * (64 + 64),
        "b": 5 * 64 * 32,
        "w": 5 * 32 * 64,
        "y": 5 * 64 * 40,
    }


# ------------------------------------------------------------------ known figures


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("bvlc_alexnet", 0.65),
        ("densenet121", 2.83),
        ("resnet50", 4.09),
        ("squeezenet", 0.35),
        ("vgg19", 19.63),
    ],
)
def test_networks_take_what_is_published_of_them(name: str, billions: float) -> None:
    data = Path(onnx.__file__).parent / "backend/test/data/light"
    layers = layers_of_model(from_proto(onnx.load(data / f"light_{name}.onnx")))

    macs = [layer.macs for layer in layers]
    assert None not in macs
    assert round(sum(count or 0 for count in macs) / 1e9, 2) == billions


# ------------------------------------------------------------------ hostile


@pytest.mark.parametrize(
    "text",
    [
        # A kernel larger than the image.
        "agraph (float[1, 1, 2, 2] x, float[1, 1, 9, 9] w) => (float[A, B, C, D] y)"
        " { y = Conv(x, w) }",
        # Sizes that do not fit each other.
        "agraph (float[2, 3] x, float[5, 7] w) => (float[A, B] y) { y = MatMul(x, w) }",
        "agraph (float[2, 3] x, float[5] w) => (float[A, B] y)"
        ' { y = Einsum<equation = "i,j,k">(x, w) }',
        # A rank that no weight has.
        "agraph (float[1, 1, 2] x, float w) => (float[A, B, C] y) { y = Conv(x, w) }",
        "agraph (float x) => (float y) { y = MatMul(x, x) }",
        "agraph (seq(float[N]) x, string[2] s) => (string[2] y) { y = Identity(s) }",
    ],
)
def test_damaged_models_are_counted_as_far_as_they_go(text: str) -> None:
    for layer in layers_of_model(parse(text)):
        assert layer.macs is None or layer.macs >= 0


def test_many_nodes_and_long_chains_of_constants_take_no_time() -> None:
    chain = " ".join(f"k{n + 1} = Add(k{n}, k{n})" for n in range(300))
    steps = " ".join(f"x{n + 1} = Add(x{n}, k0)" for n in range(300))
    model = parse(
        f"agraph (float[2] x0, float[2] k0) => (float[2] y) {{ {chain} {steps}"
        " y = Add(x300, k300) }",
        k0=np.ones(2, np.float32),
    )

    layers = layers_of_model(model)

    assert [layer.name for layer in layers if layer.name.startswith("x")][-1] == "x300"
    assert all(layer.macs == 0 for layer in layers)
