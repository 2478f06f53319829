from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written_out import assert_fuses, operators, reasons

import graphopt
from graphopt.contract import Context
from graphopt.runtime import Session
from graphopt.testing import apply_pass, assert_rewrites, parse
from graphopt_passes.fuse.fuse_attention import FuseAttention

SCALES = {"c": np.float32(0.25), "d": np.float32([4.0]), "m": np.float32(-1.0)}
PLAIN = "t = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, t)"
SHARES = "p = Softmax <axis = -1> (s) y = MatMul(p, v)"


def attention(
    body: str,
    q: str = "2,3,5,8",
    k: str = "2,3,7,8",
    v: str = "2,3,7,4",
    mask: str = "",
    kind: str = "float",
    opset: int = 23,
    outputs: str = "",
) -> ir.Model:
    """The body makes y; q, k, v and mask are dimensions."""
    masked = f", {kind}[{mask}] mask" if mask else ""
    constants = {name: array for name, array in SCALES.items() if f"{name})" in body}
    heads = [f"float{list(array.shape) or '[]'} {name}" for name, array in constants.items()]
    return parse(
        f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        agraph ({", ".join([f"{kind}[{q}] q, {kind}[{k}] k, {kind}[{v}] v{masked}", *heads])})
        => ({kind}[A,B,C,D] y{outputs}) {{ {body} }}
        """,
        **constants,
    )


def scale_of(changed: ir.Model) -> float:
    (node,) = (node for node in changed.graph if node.op_type == "Attention")
    return node.attributes["scale"].as_float()


def test_becomes_one_node() -> None:
    assert_rewrites(
        FuseAttention(),
        """
        <ir_version: 10, opset_import: ["" : 23]>
        agraph (float[N,3,5,8] q, float[N,3,7,8] k, float[N,3,7,4] v) => (float[N,3,5,4] y)
        <float scale = {0.25}>
        {
            t = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul(q, t)
            c = Mul(s, scale)
            p = Softmax(c)
            y = MatMul(p, v)
        }
        """,
        """
        <ir_version: 10, opset_import: ["" : 23]>
        agraph (float[N,3,5,8] q, float[N,3,7,8] k, float[N,3,7,4] v) => (float[N,3,5,4] y)
        <float scale = {0.25}>
        { y = Attention <scale = 0.25> (q, k, v) }
        """,
    )


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        (f"{PLAIN} {SHARES}", 1.0),
        (f"{PLAIN} e = Div(s, d) p = Softmax <axis = 3> (e) y = MatMul(p, v)", 0.25),
        (
            "r = Mul(q, c) t = Transpose <perm = [0, 1, 3, 2]> (k) u = Mul(t, c) "
            f"s = MatMul(r, u) {SHARES}",
            0.0625,
        ),
    ],
)
def test_the_scale_may_stand_anywhere(body: str, scale: float) -> None:
    changed = attention(body)
    assert_fuses(FuseAttention(), changed, "Attention")
    assert scale_of(changed) == pytest.approx(scale)


@pytest.mark.parametrize("mask", ["5,7", "3,5,7", "1,5,7", "1,1,5,7", "2,1,5,7", "2,3,5,7"])
def test_a_mask_of_the_size_of_the_scores_goes_in(mask: str) -> None:
    changed = attention(f"{PLAIN} a = Add(mask, s) p = Softmax(a) y = MatMul(p, v)", mask=mask)
    assert_fuses(FuseAttention(), changed, "Attention")


def test_keys_in_another_order_are_transposed_once() -> None:
    body = f"t = Transpose <perm = [0, 2, 3, 1]> (k) s = MatMul(q, t) {SHARES}"
    changed = attention(body, k="2,7,3,8")
    assert_fuses(FuseAttention(), changed, "Transpose", "Attention")
    assert tuple(changed.graph[0].attributes["perm"].as_ints()) == (0, 2, 1, 3)


def test_a_batch_without_a_size_is_one_by_its_name() -> None:
    changed = attention(f"{PLAIN} {SHARES}", q="N,3,S,8", k="N,3,T,8", v="N,3,T,8")
    assert_fuses(FuseAttention(), changed, "Attention")


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        (f"{PLAIN} {SHARES}", {"opset": 21}, "opset 21 is older than 23"),
        (f"{PLAIN} {SHARES}", {"kind": "double"}, "numbers of type DOUBLE"),
        (f"{PLAIN} {SHARES}", {"k": "2,1,7,8"}, "one batch and as many heads"),
        (f"{PLAIN} {SHARES}", {"v": "1,3,7,4"}, "one batch and as many heads"),
        (f"{PLAIN} {SHARES}", {"v": "7,4"}, "v is not known to be of four dimensions"),
        (f"{PLAIN} e = Mul(s, m) p = Softmax(e) y = MatMul(p, v)", {}, "no scale of -1"),
        (f"{PLAIN} p = Softmax <axis = 2> (s) y = MatMul(p, v)", {}, "along the keys"),
        (f"{PLAIN} {SHARES}", {"outputs": ", float[A,B,C,E] p"}, "p, which Softmax makes within"),
    ],
)
def test_leaves_what_it_cannot_be_sure_of(body: str, options: dict[str, str], reason: str) -> None:
    (found,) = reasons(FuseAttention(), attention(body, **options))  # type: ignore[arg-type]
    assert reason in found


@pytest.mark.parametrize("mask", ["7", "1,7", "5,1", "2,1,1,7", "2,3,1,5,7"])
def test_leaves_a_mask_that_onnxruntime_does_not_take(mask: str) -> None:
    body = f"{PLAIN} a = Add(s, mask) p = Softmax(a) y = MatMul(p, v)"
    (found,) = reasons(FuseAttention(), attention(body, mask=mask))
    assert "mask" in found or "dimensions" in found


def test_leaves_a_mask_that_enlarges_the_batch() -> None:
    body = f"{PLAIN} a = Add(s, mask) p = Softmax(a) y = MatMul(p, v)"
    model = attention(body, q="1,3,5,8", k="1,3,7,8", v="1,3,7,4", mask="2,1,5,7")
    (found,) = reasons(FuseAttention(), model)
    assert "enlarge" in found


def test_a_row_without_keys_gives_zeros() -> None:
    changed = attention(f"{PLAIN} a = Add(s, mask) p = Softmax(a) y = MatMul(p, v)", mask="5,7")
    mask = np.zeros((5, 7), np.float32)
    mask[2] = -np.inf
    random = np.random.default_rng(0)
    sample = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 4)}.items()
    } | {"mask": mask}
    before = Session(changed).run(sample)["y"]
    apply_pass(FuseAttention(), changed)
    after = Session(changed).run(sample)["y"]
    assert np.isnan(before[:, :, 2]).all() and not after[:, :, 2].any()
    np.testing.assert_allclose(np.delete(after, 2, 2), np.delete(before, 2, 2), rtol=1e-5)


def test_is_left_to_the_cpu() -> None:
    model = attention(f"{PLAIN} {SHARES}")
    context = Context(model.clone, provider="cuda")
    assert "CPU only" in (FuseAttention().refuse(model, context) or "")


def test_basic_leaves_nothing_but_attention() -> None:
    body = (
        "r = Transpose <perm = [0, 2, 1, 3]> (q) w = Transpose <perm = [0, 2, 1, 3]> (k) "
        "t = Transpose <perm = [0, 1, 3, 2]> (w) s = MatMul(r, t) e = Div(s, d) "
        "p = Softmax(e) y = MatMul(p, v)"
    )
    run = graphopt.optimize(attention(body, q="2,5,3,8", k="2,7,3,8"), benchmark=False)
    assert sorted(operators(run.model)) == ["Attention", "Transpose", "Transpose"]
