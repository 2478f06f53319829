"""Models that round activations: at ties lossless passes may change a code, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import Change, Context, Effect, Pass
from graphopt.rewriting import remove_node, replace_value
from graphopt.roundings import CodeMap, maps_in, roundings_of, why_other_maps, without_rounding
from graphopt.runtime import Reference, Session
from graphopt.testing import canonical, parse

SCALE, FIRST, SECOND = np.float32(0.1), np.float32(0.7), np.float32(1.3)

ROUNDED = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[1, 64] x, float[64, 8] w) => (float[1, 8] y)
<float s = {0.1}, uint8 z = {100}, float a = {0.7}, float b = {1.3}>
{
    m = Mul(x, a) n = Mul(m, b)
    q = QuantizeLinear(n, s, z) d = DequantizeLinear(q, s, z)
    y = MatMul(d, w)
}
"""


def rounded() -> ir.Model:
    return parse(ROUNDED, w=np.random.default_rng(0).normal(0, 1, (64, 8)).astype(np.float32))


def at_ties(count: int = 8) -> list[dict[str, np.ndarray]]:
    """Samples of which many numbers lie where the order of two products decides."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(count):
        ties = (generator.integers(-90, 90, 4096) + np.float32(0.5)) * SCALE
        x = np.float32(ties / (FIRST * SECOND))
        one, other = ((x * FIRST) * SECOND) / SCALE, (x * (FIRST * SECOND)) / SCALE
        others = generator.uniform(-9, 9, 32).astype(np.float32)
        found.append({"x": np.append(x[np.rint(one) != np.rint(other)][:32], others)[np.newaxis]})
    return found


@dataclass(frozen=True)
class Rewrite(Pass):
    """Rewrite the model in some way that claims to be rounding."""

    name: ClassVar[str] = "rewrite"
    effect: ClassVar[Effect] = Effect.ROUNDING
    what: ClassVar[Callable[[ir.Model], None]]

    def apply(self, model: ir.Model, context: Context) -> Change:
        type(self).what(model)
        change = Change()
        change.count("model rewritten")
        return change


def verdict(one: Any) -> tuple[str, str]:
    run = graphopt.optimize(rounded(), passes=[one], samples=at_ties(), benchmark=False)
    return run.steps[0].verdict, run.steps[0].reason or ""


def test_without_rounding_a_model_clips() -> None:
    model = rounded()
    smooth = without_rounding(model)

    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    assert [node.op_type for node in smooth.graph] == ["Mul", "Mul", "Clip", "MatMul"]
    x = {"x": np.linspace(-30, 30, 64, dtype=np.float32)[np.newaxis]}
    numbers = np.clip(x["x"] * FIRST * SECOND, np.float32(-100 * SCALE), np.float32(155 * SCALE))
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    (found,) = Session(smooth, Reference.AS_WRITTEN).run(x).values()
    np.testing.assert_allclose(found, numbers @ weight.numpy(), rtol=1e-4, atol=1e-3)


def test_maps_are_told_by_their_bits() -> None:
    model, other = rounded(), rounded()
    (rounding,) = roundings_of(other)
    scale = rounding.quantize.inputs[1]
    assert scale is not None
    assert maps_in(model) == {CodeMap(float(SCALE), 100, ir.DataType.UINT8): 1}
    assert why_other_maps(model, model.clone()) is None

    scale.const_value = ir.tensor(np.nextafter(SCALE, np.float32(1)), name="s")

    assert "scale 0.1" in (why_other_maps(model, other) or "")


@pytest.mark.parametrize(
    "nodes",
    [
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, t, z) y = Identity(d)",
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, o) y = Identity(d)",
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = Cast<to = 1>(q) "
        "y = Add(d, e)",
        "q = QuantizeLinear(x, r, z) d = DequantizeLinear(q, r, z) y = Identity(d)",
    ],
)
def test_what_is_no_rounding(nodes: str) -> None:
    model = parse(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        agraph (float[4] x, float r) => (float[4] y)
        <float s = {{0.1}}, float t = {{0.2}}, uint8 z = {{3}}, uint8 o = {{4}}> {{ {nodes} }}
    """)

    assert not list(roundings_of(model))


def test_a_pass_that_changes_codes_at_ties_alone_is_kept() -> None:
    samples = at_ties()
    run = graphopt.optimize(
        rounded(), passes="merge-arithmetic", samples=samples, benchmark=False, strict=True
    )

    assert run.steps[0].verdict == "kept"
    before, after = (
        np.concatenate([next(iter(Session(m, Reference.AS_WRITTEN).run(s).values()))])
        for m in (rounded(), run.model)
        for s in samples[:1]
    )
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert change > 1e-3, "so that without a look at ties it would be rolled back"
    assert "Mul" in canonical(run.model)


def _other_scale(model: ir.Model) -> None:
    (rounding,) = roundings_of(model)
    scale = rounding.quantize.inputs[1]
    assert scale is not None
    scale.const_value = ir.tensor(np.nextafter(SCALE, np.float32(1)), name="s")
    _other_order(model)


def _no_rounding(model: ir.Model) -> None:
    (rounding,) = roundings_of(model)
    replace_value(rounding.output, rounding.source)
    remove_node(rounding.dequantize)
    remove_node(rounding.quantize)


def _other_numbers(model: ir.Model) -> None:
    value = model.graph.initializers["a"]
    value.const_value = ir.tensor(FIRST * np.float32(1.001), name="a")


def _other_order(model: ir.Model) -> None:
    model.graph.initializers["a"].const_value = ir.tensor(FIRST * SECOND, name="a")
    model.graph.initializers["b"].const_value = ir.tensor(np.float32(1), name="b")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (_other_scale, "values are rounded with scale 0.1"),
        (_no_rounding, "has relative L2 error"),
        (_other_numbers, "and that without rounding of activations"),
    ],
)
def test_what_ties_do_not_explain_is_rolled_back(
    what: Callable[[ir.Model], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rewrite, "what", staticmethod(what), raising=False)

    found, told = verdict(Rewrite())

    assert found == "rolled back" and reason in told
    monkeypatch.setattr(Rewrite, "what", staticmethod(_other_order))
    assert verdict(Rewrite())[0] == "kept"
