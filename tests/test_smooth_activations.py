from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_layers import normal
from observed import error_of_codes, observer

from graphopt.contract import Change, Context, Sample
from graphopt.testing import apply_pass, assert_equivalent, parse
from graphopt_passes.quantize.smooth_activations import SmoothActivations

GAMMA = np.float32([1, 1, 40, 1, 1, 1, -20, 1])

NORMALIZATIONS = {
    "LayerNormalization": "n = LayerNormalization <axis = -1> (x, g, b)",
    "LayerNormalization without shift": "n = LayerNormalization <axis = 2> (x, g)",
    "RMSNormalization": "n = RMSNormalization <axis = -1> (x, g)",
    "nodes": "m = Tanh(x) s = Mul(g, m) n = Add(s, b)",
    "nodes without shift": "m = Tanh(x) n = Mul(m, g)",
}


def rows(count: int = 8) -> list[Sample]:
    return [{"x": normal(seed, 1, 12, 8)} for seed in range(count)]


def layers(
    body: str,
    more: str = "",
    outputs: str = "float[1,12,6] y, float[1,12,5] z",
    gamma: np.ndarray = GAMMA,
    opset: int = 23,
) -> ir.Model:
    """A normalization that makes `n` of x, g and b, and two products that read it."""
    text = f"""
    <ir_version: 11, opset_import: ["" : {opset}]>
    agraph (float[1,12,8] x, float[8] g, float[8] b, float[8,6] v, float[8,5] w, float[6,4] u)
        => ({outputs})
    {{ {body} y = MatMul(n, v) z = MatMul(n, w) {more} }}
    """
    weights = {"v": normal(1, 8, 6), "w": normal(2, 8, 5), "u": normal(5, 6, 4)}
    return parse(text, g=gamma, b=normal(3, 8), **weights)


def smoothed(model: ir.Model, samples: list[Sample] | None = None) -> Change:
    """What the pass did; the outputs stay, and a second time there is nothing to do."""
    samples = rows() if samples is None else samples
    before = model.clone()
    change = apply_pass(SmoothActivations(), model, observer=observer(model, samples))
    assert_equivalent(before, model, samples=samples)
    again = apply_pass(SmoothActivations(), model.clone(), observer=observer(model, samples))
    assert not again, again.counts
    return change


def reasons(model: ir.Model) -> list[str]:
    change = smoothed(model)
    assert not change, change.counts
    return [skip.reason for skip in change.skips]


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_large_channels_move_into_the_weights(name: str) -> None:
    model = layers(NORMALIZATIONS[name])
    before = error_of_codes(model, rows())

    change = smoothed(model)

    assert sum(change.counts.values()) == 1
    assert error_of_codes(model, rows()) < 0.6 * before


def test_all_that_read_a_normalization_share_its_factors() -> None:
    model = layers(NORMALIZATIONS["nodes without shift"])
    old = {node.name or node.outputs[0].name: node for node in model.graph}
    weights = {name: old[name].inputs[1].const_value.numpy() for name in "yz"}  # type: ignore[union-attr]

    change = smoothed(model)

    assert change.counts == {"Mul smoothed": 1}
    nodes = {node.outputs[0].name: node for node in model.graph}
    scale = next(v for v in nodes["n"].inputs if v is not None and v.is_initializer()).const_value
    assert scale is not None
    factors = GAMMA / scale.numpy()
    for name in "yz":
        made = nodes[name].inputs[1].const_value.numpy()  # type: ignore[union-attr]
        assert made == pytest.approx(weights[name] * factors[:, np.newaxis], rel=1e-6)
    assert (factors > 0).all() and factors[2] > 4 * factors[0]


def test_a_scale_that_others_read_stays_for_them() -> None:
    model = layers(
        NORMALIZATIONS["RMSNormalization"], "q = Add(x, g)", "float[1,12,6] y, float[1,12,8] q"
    )
    model.graph.outputs[0].shape = ir.Shape([1, 12, 6])
    assert smoothed(model)
    (read,) = [n.inputs[1] for n in model.graph if n.op_type == "Add"]
    assert read is not None and np.array_equal(read.const_value.numpy(), GAMMA)  # type: ignore[union-attr]


def test_a_layer_takes_the_factors_of_what_it_is_multiplied_with() -> None:
    """As the second branch of a gated feed-forward layer (SwiGLU)."""
    model = parse(
        """
        agraph (float[1,12,8] x, float[1] a, float[1] c, float[1] d) => (float[1,12,4] y)
        { p = MatMul(x, a) s = Sigmoid(p) q = MatMul(x, c) r = Mul(s, q) y = MatMul(r, d) }
        """,
        a=normal(1, 8, 6),
        c=(normal(2, 8, 6) * np.float32([1, 30, 1, 1, 10, 1])),
        d=normal(3, 6, 4),
    )
    before = error_of_codes(model, rows())

    change = smoothed(model)

    assert change.counts == {"MatMul smoothed": 1}
    assert error_of_codes(model, rows()) < 0.8 * before


# ------------------------------------------------------------------ what stays


def test_refuses_without_samples() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    reason = SmoothActivations().refuse(model, Context(lambda: model))
    assert reason == "there are no samples to choose factors by"


def test_leaves_even_channels() -> None:
    ones = np.ones(8, np.float32)
    model = layers(NORMALIZATIONS["RMSNormalization"], gamma=ones)
    for name in "vw":
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.sign(value.const_value.numpy()), name=name)  # type: ignore[union-attr]
    (reason,) = reasons(model)
    assert "% of the error would go" in reason


def test_leaves_what_another_node_reads_too() -> None:
    model = layers(
        NORMALIZATIONS["RMSNormalization"], "q = Tanh(n)", "float[1,12,6] y, float[1,12,8] q"
    )
    assert reasons(model) == ["Tanh reads it"]


def test_leaves_an_output() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"], outputs="float[1,12,6] y, float[1,12,8] n")
    assert reasons(model) == ["n is an output of the graph"]


def test_leaves_a_normalization_over_several_axes() -> None:
    model = parse(
        """
        agraph (float[1,12,8] x, float[1] g, float[1] v) => (float[1,12,6] y)
        { n = LayerNormalization <axis = 1> (x, g) y = MatMul(n, v) }
        """,
        g=normal(1, 12, 8),
        v=normal(2, 8, 6),
    )
    assert reasons(model) == []


def test_leaves_shared_weights() -> None:
    model = layers(
        NORMALIZATIONS["RMSNormalization"], "q = MatMul(x, v)", "float[1,12,6] y, float[1,12,6] q"
    )
    assert reasons(model) == ["y reads it, and the weight is shared"]


def test_leaves_a_multiplication_by_one_number() -> None:
    model = layers("k = Constant <value_float = 3.0> () n = Mul(x, k)")
    assert reasons(model) == []


def test_leaves_what_a_caller_can_override() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    model.graph.inputs.append(model.graph.initializers["g"])
    samples = [{**sample, "g": GAMMA} for sample in rows()]
    assert not smoothed(model, samples)


def test_leaves_values_with_masks() -> None:
    """Where minus infinity stands for nothing, there is no range by channel."""
    model = layers("m = Add(x, b) n = Mul(m, g)")
    masked = [{"x": np.where(np.arange(8) == 3, np.float32(-1e9), s["x"])} for s in rows()]
    change = apply_pass(SmoothActivations(), model, observer=observer(model, masked))
    reason = "what goes through it is masked, or not of known shape"
    assert [skip.reason for skip in change.skips] == [reason]


def test_leaves_what_too_few_rows_reach() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    change = apply_pass(SmoothActivations(), model, observer=observer(model, rows(1)))
    reason = "the samples hold 12 rows of what it makes; it takes 16"
    assert [skip.reason for skip in change.skips] == [reason]
