"""equalize-layers: factors move between layers; the outputs stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Effect
from graphopt.observe import Observer
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.quantize.equalize_layers import EqualizeLayers

RANDOM = np.random.default_rng(0)
PLACES = "float[1,8,6,6]"


def weight(*shape: int) -> np.ndarray:
    """Outputs of very different sizes."""
    sizes = 4.0 ** RANDOM.uniform(-3, 3, (shape[0], *(1,) * (len(shape) - 1)))
    return (RANDOM.standard_normal(shape) * sizes).astype(np.float32)


def between(node: str, middle: str = PLACES) -> ir.Model:
    """Two Conv nodes with something between them."""
    return parse(
        f"g ({PLACES} x, float[8,8,3,3] a, float[8] b, float[4,8,1,1] c) => (float[1,4,6,6] y)"
        f" {{ p = Conv<pads = [1,1,1,1]>(x, a, b) {node} y = Conv(q, c) }}",
        a=weight(8, 8, 3, 3),
        b=weight(8),
        c=weight(4, 8, 1, 1),
    )


def observed(model: ir.Model) -> dict[str, object]:
    x = [{"x": RANDOM.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(4)]
    inputs = signature(model)
    return {"observer": Observer(Feed(read_samples(x, inputs), inputs))}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "node",
    ["q = Relu(p)", "q = LeakyRelu<alpha = 0.1>(p)", "q = Identity(p)"],
)
def test_outputs_stay_and_a_second_time_finds_nothing(node: str, sampled: bool) -> None:
    model = between(node)
    before = model.clone()
    context = observed(before) if sampled else {}

    change = apply_pass(EqualizeLayers(), model, **context)

    assert change
    assert_equivalent(before, model, Effect.ROUNDING)
    assert not apply_pass(EqualizeLayers(), model, **context)


def test_rows_and_columns_become_equally_large() -> None:
    model = between("q = Relu(p)")
    apply_pass(EqualizeLayers(), model)

    nodes = [n for n in model.graph if n.op_type == "Conv"]
    first, second = (n.inputs[1].const_value.numpy() for n in nodes)  # type: ignore[union-attr]
    rows, columns = np.abs(first).max((1, 2, 3)), np.abs(second).max((0, 2, 3))

    assert np.abs(np.log2(rows / columns)).max() < 0.2


def test_a_depthwise_layer_between_two_is_equalized_too() -> None:
    model = parse(
        f"g ({PLACES} x, float[8,8,1,1] a, float[8,1,3,3] d, float[4,8,1,1] c) =>"
        " (float[1,4,4,4] y) { p = Conv(x, a) q = Relu(p) r = Conv<group = 8>(q, d)"
        " s = Relu(r) y = Conv(s, c) }",
        a=weight(8, 8, 1, 1),
        d=weight(8, 1, 3, 3),
        c=weight(4, 8, 1, 1),
    )
    before = model.clone()

    assert apply_pass(EqualizeLayers(), model)
    assert_equivalent(before, model, Effect.ROUNDING)


def test_a_channel_of_zeros_stays() -> None:
    model = between("q = Relu(p)")
    dead = np.array(model.graph.initializers["a"].const_value.numpy())  # type: ignore[union-attr]
    dead[3] = 0
    model.graph.initializers["a"].const_value = ir.tensor(dead, name="a")
    before = model.clone()

    assert apply_pass(EqualizeLayers(), model)
    assert_equivalent(before, model, Effect.ROUNDING)


@pytest.mark.parametrize("node", ["q = Sigmoid(p)", "q = Tanh(p)", "q = HardSwish(p)"])
def test_what_is_not_homogeneous_stays(node: str) -> None:
    assert_unchanged(EqualizeLayers(), between(node))


def test_a_value_that_is_also_an_output_stays() -> None:
    model = parse(
        f"g ({PLACES} x, float[8,8,1,1] a, float[4,8,1,1] c) =>"
        f" (float[1,4,6,6] y, {PLACES} q) {{ p = Conv(x, a) q = Relu(p) y = Conv(q, c) }}",
        a=weight(8, 8, 1, 1),
        c=weight(4, 8, 1, 1),
    )

    assert_unchanged(EqualizeLayers(), model)
