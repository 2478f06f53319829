"""Layers on codes as other tools write them: what cluster-weights may do to their parameters."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import normal, samples_of

from graphopt.contract import Change, Context
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import canonical, parse
from graphopt_passes.quantize.cluster_weights import ClusterWeights
from graphopt_passes.quantize.narrow_weights import targets_of, write

INPUT = "q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)"


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.rint(40 * normal(seed, *shape)), -127, 127).astype(np.int8)


def scales(count: int, seed: int = 3) -> np.ndarray:
    return (0.005 + 0.01 * np.random.default_rng(seed).random(count)).astype(np.float32)


def coded(body: str, rows: int = 4, inputs: int = 64, **weights: np.ndarray) -> ir.Model:
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int8): "int8", np.dtype(np.int32): "int32"}
    declared = [
        f"{kinds[w.dtype]}[{','.join(map(str, w.shape))}] {name}" for name, w in weights.items()
    ]
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (float[{rows},{inputs}] x, float sx, int8 zx, {", ".join(declared)})
            => (float[N,M] y)
        {{ {INPUT} {body} }}
    """
    zero = {"sx": np.asarray(np.float32(0.03)), "zx": np.asarray(np.int8(0))}
    model = parse(text, **zero, **weights)
    infer_shapes(model)
    return model


def kept(model: ir.Model) -> ir.Model:
    """The model with its parameters narrow, and all codes as they were."""
    after = model.clone()
    targets = targets_of(after, 1, Change())
    write(after, targets, {}, Context(model.clone), range(len(targets)))
    infer_shapes(after)
    assert why_invalid(after) is None
    return after


def clustered(model: ir.Model, count: int) -> ir.Model:
    after = model.clone()
    rows, inputs = model.graph.inputs[0].shape or ()
    context = Context(
        model.clone,
        observer=observer(model, samples_of(rows, inputs, count=12)),  # type: ignore[arg-type]
    )
    ClusterWeights(clusters=count, min_elements=64).apply(after, context)
    infer_shapes(after)
    assert why_invalid(after) is None
    return after


def error(model: ir.Model, after: ir.Model) -> float:
    """As deployed, against the model as written: onnxruntime 1.32 makes integer products also where
    scales lie along the inputs, or a bias has units of its own, and computes them wrong."""
    rows, inputs = model.graph.inputs[0].shape or ()
    found = []
    for sample in samples_of(rows, inputs, count=4):  # type: ignore[arg-type]
        both = (Session(model, Reference.AS_WRITTEN), Session(after))
        pairs = zip(*(session.run(sample).values() for session in both), strict=True)
        found += [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs]
    return float(max(found))


GEMM = "v = DequantizeLinear<axis = 1>(w, s) c = DequantizeLinear<axis = 0>(b, t)"


@pytest.mark.parametrize("shape", [(64,), (1, 64), (4, 64), (4, 1)])
def test_biases_of_gemm_in_every_shape(shape: tuple[int, ...]) -> None:
    body = GEMM.replace("<axis = 0>(b, t)", "(b, t)") + " y = Gemm(d, v, c)"
    bias = (200 * normal(5, *shape)).astype(np.int32)
    scale = np.asarray(np.float32(0.01))
    model = coded(body, w=integers(64, 64), s=scales(64), b=bias, t=scale.reshape(()))

    if shape[0] == 4:
        # Their units are not those of the product, as they need not be for a float sum.
        assert not targets_of(model, 1, Change())
    else:
        assert error(model, kept(model)) < 5e-3
        assert error(model, clustered(model, 64)) < 0.1


def test_a_bias_that_two_layers_share() -> None:
    body = f"""
        {GEMM} u = DequantizeLinear<axis = 1>(r, z)
        g = Gemm(d, v, c) h = Gemm(d, u, c) y = Sub(g, h)
    """
    model = coded(
        body,
        w=integers(64, 64),
        s=scales(64),
        r=integers(64, 64, seed=1),
        z=1e-4 * scales(64, seed=4),
        b=(200 * normal(5, 64)).astype(np.int32),
        t=np.full(64, 0.01, np.float32),
    )

    assert error(model, kept(model)) < 5e-3
    assert error(model, clustered(model, 64)) < 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_along_either_axis(axis: int) -> None:
    """A scale for each input is no scale for each output, of which there are as many."""
    body = f"v = DequantizeLinear<axis = {axis}>(w, s) y = MatMul(d, v)"
    model = coded(body, w=integers(64, 64), s=10 * scales(64))

    if axis == 0:
        assert canonical(kept(model)) == canonical(model)
    else:
        assert error(model, kept(model)) < 5e-3
    assert error(model, clustered(model, 64)) < 0.1


def test_a_stack_of_matrices_stays() -> None:
    body = "v = DequantizeLinear<axis = 2>(w, s) m = MatMul(d, v) y = ReduceMax<keepdims = 0>(m)"
    model = coded(body, w=integers(2, 64, 64), s=scales(64))
    change = Change()

    assert not targets_of(model, 1, change)
    assert "stack of matrices" in " ".join(skip.reason for skip in change.skips)


def test_an_output_of_zeros_keeps_its_bias() -> None:
    few = scales(64)
    few[::2] = 0
    model = coded(
        f"{GEMM} y = Gemm(d, v, c)",
        w=integers(64, 64),
        s=few,
        b=(200 * normal(5, 64)).astype(np.int32),
        t=np.full(64, 0.01, np.float32),
    )

    assert canonical(kept(model)) == canonical(model)


def test_layers_in_float16_stay() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (float16[4,64] x, float16 sx, int8 zx, int8[64,64] w, float16[64] s)
            => (float16[N,M] y)
        { q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
          v = DequantizeLinear<axis = 1>(w, s) y = MatMul(d, v) }
    """
    model = parse(
        text,
        sx=np.asarray(np.float16(0.03)),
        zx=np.asarray(np.int8(0)),
        w=integers(64, 64),
        s=scales(64).astype(np.float16),
    )
    infer_shapes(model)
    change = Change()

    assert not targets_of(model, 1, change)
    assert "another type" in " ".join(skip.reason for skip in change.skips)


def test_bodies_may_have_weights_of_one_name() -> None:
    """What is tried for one is not done to the other."""
    model = _branches(normal(0, 40, 40), normal(1, 40, 40))
    infer_shapes(model)
    given = [{"x": normal(seed, 4, 40), "c": np.array([seed % 2 == 0])} for seed in range(10)]
    after = model.clone()
    context = Context(model.clone, observer=observer(model, given))
    change = ClusterWeights(error=0.05, min_elements=64).apply(after, context)

    assert change.counts.total() == 2
    for sample in given:
        (a,), (b,) = Session(model).run(sample).values(), Session(after).run(sample).values()
        assert np.linalg.norm(a - b) < 0.12 * np.linalg.norm(a)


def _branches(first: np.ndarray, second: np.ndarray) -> ir.Model:
    model = parse("""
        agraph (bool[1] c, float[4,40] x) => (float[4,40] y) {
            y = If (c) <
                then_branch = t () => (float[4,40] p) { w = Identity(x) p = Neg(w) },
                else_branch = e () => (float[4,40] p2) { w = Identity(x) p2 = Neg(w) }
            >
        }
    """)
    x = model.graph.inputs[1]
    for attribute, weight in zip(model.graph[0].attributes.values(), (first, second), strict=True):
        body = attribute.as_graph()
        output = body.outputs[0]
        body.remove(list(body))
        value = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([40, 40])
        body.initializers.add(value)
        product = ir.node("MatMul", [x, value], outputs=[ir.Value(name=output.name)])
        product.outputs[0].type, product.outputs[0].shape = output.type, output.shape
        body.append(product)
        body.outputs[0] = product.outputs[0]
    return model
