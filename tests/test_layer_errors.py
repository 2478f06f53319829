from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.layer_errors import SAMPLES_MAXIMUM, VALUES_MAXIMUM, layer_errors
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse

ort = pytest.importorskip("onnxruntime")

RANDOM = np.random.default_rng(0)
FIRST, SECOND = (RANDOM.normal(size=(16, 16)).astype(np.float32) for _ in range(2))
ROWS = [RANDOM.normal(size=(4, 16)).astype(np.float32) for _ in range(12)]

CHAIN = """
    agraph (float[N, 16] x, float[16, 16] v, float[16, 16] w) => (float[N, 16] y) {
        a = MatMul(x, v)
        b = Relu(a)
        y = MatMul(b, w)
    }"""


def _feed(model: ir.Model, rows: list[np.ndarray] = ROWS, **more: object) -> Feed:
    samples: list[Sample] = [{"x": row} for row in rows]
    return Feed(read_samples(samples, signature(model)), signature(model), **more)  # type: ignore[arg-type]


def _rel_l2(first: np.ndarray, second: np.ndarray) -> float:
    wide = first.astype(np.float64)
    return float(np.linalg.norm(second - wide) / np.linalg.norm(wide))


def test_errors_are_those_of_numpy_over_the_first_samples() -> None:
    changed = FIRST + 0.01 * RANDOM.normal(size=FIRST.shape).astype(np.float32)
    before = parse(CHAIN, v=FIRST, w=SECOND)
    after = parse(CHAIN, v=changed, w=SECOND)

    found = layer_errors(before, after, _feed(before))

    x = np.concatenate(ROWS[:SAMPLES_MAXIMUM])
    hidden = np.maximum(x @ FIRST, 0), np.maximum(x @ changed, 0)
    expected = {
        "a": _rel_l2(x @ FIRST, x @ changed),
        "b": _rel_l2(*hidden),
        "y": _rel_l2(hidden[0] @ SECOND, hidden[1] @ SECOND),
    }
    assert [(e.error.name, e.operator, e.counterpart) for e in found] == [
        ("a", "MatMul", "a"),
        ("b", "Relu", "b"),
        ("y", "MatMul", "y"),
    ]
    assert {e.error.name: e.error.rel_l2 for e in found} == pytest.approx(expected, rel=1e-4)
    assert all(e.error.count == 4 * 16 * SAMPLES_MAXIMUM for e in found)


def test_the_same_model_has_no_error() -> None:
    model = parse(CHAIN, v=FIRST, w=SECOND)

    assert [e.error.identical for e in layer_errors(model, model, _feed(model))] == [True] * 3


def test_a_name_that_stands_for_something_else_now_is_no_counterpart() -> None:
    # What fuse-batchnorm leaves: the Conv (here MatMul) keeps the name of what it gave before.
    scale = RANDOM.uniform(-3, 3, 16).astype(np.float32)
    before = parse(
        """
        agraph (float[N, 16] x, float[16, 16] v, float[16] s) => (float[N, 16] y) {
            a = MatMul(x, v)
            normal = Mul(a, s)
            y = Relu(normal)
        }""",
        v=FIRST,
        s=scale,
    )
    after = parse(
        "agraph (float[N, 16] x, float[16, 16] v) => (float[N, 16] y)"
        " { a = MatMul(x, v) y = Relu(a) }",
        v=FIRST * scale,
    )

    found = {e.error.name: e for e in layer_errors(before, after, _feed(before))}

    assert found["a"].counterpart == "normal"
    assert found["a"].error.rel_l2 < 1e-5
    assert found["y"].error.rel_l2 < 1e-5


def test_channels_that_were_removed_have_no_counterpart() -> None:
    before = parse(CHAIN, v=FIRST, w=SECOND)
    after = parse(CHAIN, v=FIRST[:, :8], w=SECOND[:8])

    assert [e.error.name for e in layer_errors(before, after, _feed(before))] in ([], ["y"])


def test_what_constants_make_and_what_is_no_number_is_left_out() -> None:
    model = parse(
        """
        agraph (float[N, 16] x, int8[16, 16] codes, float scale) => (float[N, 16] y) {
            w = DequantizeLinear(codes, scale)
            y = MatMul(x, w)
            is_large = Greater(y, scale)
            place = ArgMax(y)
        }""",
        codes=np.arange(-128, 128, dtype=np.int8).reshape(16, 16),
        scale=np.float32(0.01),
    )

    assert [e.error.name for e in layer_errors(model, model, _feed(model))] == ["y"]


def test_half_precision_is_compared_as_what_it_was() -> None:
    before = parse(CHAIN, v=FIRST, w=SECOND)
    after = parse(
        """
        agraph (float[N, 16] x, float16[16, 16] v, float16[16, 16] w) => (float[N, 16] y) {
            narrow = Cast<to = 10>(x)
            a = MatMul(narrow, v)
            b = Relu(a)
            wide = MatMul(b, w)
            y = Cast<to = 1>(wide)
        }""",
        v=FIRST.astype(np.float16),
        w=SECOND.astype(np.float16),
    )

    found = {e.error.name: e.error for e in layer_errors(before, after, _feed(before))}

    assert {"a", "b", "y"} <= found.keys()
    assert all(error.mismatch is None and 0 < error.rel_l2 < 0.01 for error in found.values())


def test_state_is_carried_in_each_of_the_models() -> None:
    text = """
        agraph (float[N, 16] x, float[N, 16] h, float[16, 16] v) => (float[N, 16] g) {
            s = MatMul(x, v)
            t = Add(s, h)
            g = Tanh(t)
        }"""
    before, after = parse(text, v=FIRST), parse(text, v=FIRST * np.float32(1.01))
    rows = [{"x": row, "h": np.zeros((4, 16), np.float32)} for row in ROWS[:1]]
    rows += [{"x": row} for row in ROWS[1:6]]
    state = (("g", "h"),)
    feed = Feed(read_samples(rows, signature(before), state), signature(before), state)

    def roll(v: np.ndarray) -> np.ndarray:
        given, state = [], np.zeros((4, 16))
        for row in rows:
            state = np.tanh(row["x"].astype(np.float64) @ v + state)
            given.append(state)
        return np.stack(given)

    found = {e.error.name: e.error.rel_l2 for e in layer_errors(before, after, feed)}

    expected = _rel_l2(roll(FIRST), roll(FIRST * np.float32(1.01)))
    assert found["g"] == pytest.approx(expected, rel=1e-3)


def test_a_long_model_is_looked_at_evenly() -> None:
    count = VALUES_MAXIMUM + 200
    lines = [f"v{n + 1} = Neg(v{n})" for n in range(count)]
    signs = " ".join(lines)
    model = parse(f"agraph (float[N, 16] v0) => (float[N, 16] v{count}) {{ {signs} }}")
    feed = Feed(read_samples([{"v0": ROWS[0]}], signature(model)), signature(model))

    found = layer_errors(model, model, feed)

    assert 100 <= len(found) <= VALUES_MAXIMUM
    assert found[0].error.name == "v1"


def test_samples_that_do_not_fit_are_the_users_to_know() -> None:
    model = parse(CHAIN.replace("float[N, 16] x", "float[N, M] x"), v=FIRST, w=SECOND)

    with pytest.raises(SampleError):
        layer_errors(model, model, _feed(model, [np.ones((4, 3), np.float32)]))
