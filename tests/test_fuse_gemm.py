from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written_out import assert_fuses, operators, reasons

from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, parse
from graphopt_passes.fuse.fuse_gemm import FuseGemm


def matrices(
    body: str,
    c: tuple[int, ...] = (4,),
    kind: str = "float",
    opset: int = 21,
    shapes: tuple[str, str] = ("3,8", "8,4"),
    outputs: str = "",
) -> ir.Model:
    """The body makes y from matrices a and b, which are inputs, and a constant c."""
    text = f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    agraph ({kind}[{shapes[0]}] a, {kind}[{shapes[1]}] b, {kind}{list(c)} c)
        => ({kind}[M,N] y{outputs})
    {{ {body} }}
    """
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16, "int32": np.int32}
    values = np.random.default_rng(3).integers(-4, 5, c)
    return parse(text, c=values.astype(dtype[kind]))


def gemm(changed: ir.Model) -> dict[str, object]:
    node = next(node for node in changed.graph if node.op_type == "Gemm")
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_becomes_one_node() -> None:
    head = "agraph (float[N,2] x, float[2,2] w) => (float[N,2] y) <float[2] c = {1, 2}>"
    assert_rewrites(
        FuseGemm(),
        head + "{ m = MatMul(x, w) y = Add(m, c) }",
        head + "{ y = Gemm(x, w, c) }",
    )


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
@pytest.mark.parametrize("c", [(), (1,), (4,), (1, 4), (3, 1), (3, 4)])
def test_fuses_whatever_keeps_the_shape(c: tuple[int, ...], kind: str) -> None:
    changed = matrices("m = MatMul(a, b) y = Add(c, m)", c, kind)
    assert_fuses(FuseGemm(), changed, "Gemm")
    assert gemm(changed) == {}


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(
    ("before", "product", "shapes", "wanted"),
    [
        ("t = Transpose <perm = [1, 0]> (a)", "t, b", ("8,3", "8,4"), {"transA": 1}),
        ("t = Transpose(b)", "a, t", ("3,8", "4,8"), {"transB": 1}),
        (
            "t = Transpose(a) u = Transpose(b)",
            "t, u",
            ("8,3", "4,8"),
            {"transA": 1, "transB": 1},
        ),
    ],
)
def test_fuses_transposes(
    before: str, product: str, shapes: tuple[str, str], wanted: dict[str, int], add: bool
) -> None:
    body = f"{before} m = MatMul({product}) y = Add(m, c)"
    body = body if add else f"{before} y = MatMul({product})"
    changed = matrices(body, shapes=shapes)
    assert_fuses(FuseGemm(), changed, "Gemm")
    assert gemm(changed) == wanted


def test_fuses_transposes_into_a_gemm_that_is_there() -> None:
    body = "t = Transpose(a) u = Transpose(b)"
    body += " y = Gemm <transA = 1, alpha = 0.5, beta = 2.0> (t, u, c)"
    changed = matrices(body, shapes=("3,8", "4,8"))
    assert_fuses(FuseGemm(), changed, "Gemm")
    assert gemm(changed) == {"transA": 0, "transB": 1, "alpha": 0.5, "beta": 2.0}


def test_fuses_without_rows_and_without_columns_between() -> None:
    changed = matrices("m = MatMul(a, b) y = Add(m, c)", shapes=("M,K", "K,4"))
    before = changed.clone()
    assert apply_pass(FuseGemm(), changed)
    samples = [
        {"a": np.zeros((m, k), np.float32), "b": np.zeros((k, 4), np.float32)}
        for m, k in ((0, 3), (3, 0), (1, 1))
    ]
    assert_equivalent(before, changed, samples=samples)


def test_keeps_a_transpose_that_is_read_elsewhere() -> None:
    body = "t = Transpose(b) m = MatMul(a, t) y = Add(m, c) z = Relu(t)"
    changed = matrices(body, shapes=("3,8", "4,8"), outputs=", float[8,4] z")
    assert_fuses(FuseGemm(), changed, "Transpose", "Gemm", "Relu")


def test_leaves_the_transpose_of_a_constant_to_folding() -> None:
    body = "t = Transpose(c) y = MatMul(a, t)"
    assert reasons(FuseGemm(), matrices(body, (4, 8))) == []


def test_leaves_products_of_more_dimensions() -> None:
    body = "r = Unsqueeze(a, axis) m = MatMul(r, b) n = Add(m, c) y = Squeeze(n, axis)"
    text = f"""
    agraph (float[3,8] a, float[8,4] b, float[4] c) => (float[3,4] y) <int64[1] axis = {{0}}>
    {{ {body} }}
    """
    assert reasons(FuseGemm(), parse(text, c=np.ones(4, np.float32))) == []


def test_leaves_what_is_not_known_to_be_a_matrix() -> None:
    text = """
    agraph (float[3,8] a, int64[N] s, float[8,4] b, float[4] c) => (float[M,4] y)
    { r = Reshape(a, s) m = MatMul(r, b) y = Add(m, c) }
    """
    reason = "the operands of MatMul are not known to be matrices"
    assert reasons(FuseGemm(), parse(text, c=np.ones(4, np.float32))) == [reason]


@pytest.mark.parametrize(
    ("c", "shapes", "reason"),
    [
        ((1, 3, 4), ("3,8", "8,4"),
         "what is added is not known to have two dimensions or less"),
        ((4,), ("3,8", "8,N"),
         "what is added has shape [4], which may enlarge the product"),
        ((3, 1), ("M,8", "8,4"),
         "what is added has shape [3,1], which may enlarge the product"),
    ],
)  # fmt: skip
def test_leaves_what_may_enlarge_the_product(
    c: tuple[int, ...], shapes: tuple[str, str], reason: str
) -> None:
    unchanged = matrices("m = MatMul(a, b) y = Add(m, c)", c, shapes=shapes)
    assert reasons(FuseGemm(), unchanged) == [reason]


def test_leaves_integers() -> None:
    unchanged = matrices("m = MatMul(a, b) y = Add(m, c)", kind="int32")
    assert reasons(FuseGemm(), unchanged) == ["it multiplies numbers of type INT32"]


def test_leaves_packed_weights() -> None:
    text = """
    agraph (float[3,8] a, int8[8,4] w, float s, float[4] c) => (float[3,4] y)
    { b = DequantizeLinear(w, s) m = MatMul(a, b) y = Add(m, c) }
    """
    arrays = {"w": np.ones((8, 4), np.int8), "s": np.array(0.5, np.float32)}
    unchanged = parse(text, c=np.ones(4, np.float32), **arrays)
    assert reasons(FuseGemm(), unchanged) == ["its operands are quantized"]


def test_leaves_a_product_that_is_read_elsewhere() -> None:
    body = "m = MatMul(a, b) y = Add(m, c) z = Relu(m)"
    unchanged = matrices(body, outputs=", float[3,4] z")
    assert reasons(FuseGemm(), unchanged) == ["other nodes read m, which MatMul makes within"]


def test_leaves_a_product_alone() -> None:
    unchanged = matrices("y = MatMul(a, b)")
    assert reasons(FuseGemm(), unchanged) == []
    assert operators(unchanged) == ["MatMul"]


def test_leaves_opsets_in_which_gemm_needs_a_c() -> None:
    old = matrices("m = MatMul(a, b) y = Add(m, c)", opset=10)
    assert reasons(FuseGemm(), old) == ["opset 10 is older than 11; raise it first"]


def test_leaves_a_product_that_is_added_to_itself() -> None:
    assert reasons(FuseGemm(), matrices("m = MatMul(a, b) y = Add(m, m)")) == []
