"""Looks that go on from the last one: the answers are those of looks from the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from test_observe import observer, rows

from graphopt import frontier
from graphopt.observe import Question
from graphopt.testing import parse

CHAIN = """
agraph (float[N, 4] x) => (float[N, 4] y)
<float[4, 4] w = {1,2,3,4, 0,1,2,3, 0,0,1,2, 0,0,0,1},
 float[4, 4] v = {2,0,0,0, 0,2,0,0, 0,0,2,0, 1,0,0,2}>
{ a = MatMul(x, w)  b = Tanh(a)  c = MatMul(b, v)  d = Add(c, a)  y = Sigmoid(d) }
"""


def gram(model: ir.Model, value: str, look: Any) -> np.ndarray:
    question = Question(value, "gram")
    return np.asarray(look(model, [question], remembers=False)[question].total)


def doubled(model: ir.Model, name: str) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)


def test_a_look_behind_the_last_one_gives_what_a_look_from_the_inputs_gives() -> None:
    model = parse(CHAIN)
    samples = rows(5, 3, 8)
    resuming = observer(model, samples)
    for value, changed in (("b", "v"), ("c", "w"), ("d", "v"), ("b", "w"), ("y", "v")):
        fresh = gram(model, value, observer(model, samples))
        np.testing.assert_allclose(gram(model, value, resuming), fresh, rtol=1e-6)
        doubled(model, changed)


def test_what_is_known_is_not_computed_again() -> None:
    model = parse(CHAIN)
    resuming = observer(model, rows(5, 3))
    gram(model, "b", resuming)
    probed = model.clone()
    cut = resuming._frontier.cut(probed, keeps=False)
    assert cut is not None and set(cut.known) == {"a", "b"}


def test_two_values_that_are_the_same_are_read_once() -> None:
    model = parse(
        """agraph (float[N, 4] x) => (float[N, 4] y)
        { a = Neg(x)  b = Neg(x)  c = Mul(a, b)  d = Tanh(a)  y = Add(d, b) }"""
    )
    samples = rows(5, 3)
    resuming = observer(model, samples)
    gram(model, "c", resuming)
    cut = resuming._frontier.cut(model.clone(), keeps=False)
    assert cut is not None and len(cut.known) == 1
    np.testing.assert_allclose(
        gram(model, "y", resuming), gram(model, "y", observer(model, samples)), rtol=1e-6
    )


def test_what_has_another_rank_for_each_sample_is_not_kept() -> None:
    model = parse(
        """agraph (float[N, 4] x, int64[K] s) => (float[N, 4] y) <int64[2] m = {-1, 4}>
        { e = Reshape(x, s)  f = Neg(e)  g = Abs(f)  y = Reshape(g, m) }"""
    )
    shapes = [np.int64([-1, 4]), np.int64([1, -1, 4])]
    samples = [{**one, "s": shape} for one, shape in zip(rows(2, 5), shapes, strict=True)]
    resuming = observer(model, samples)
    for value in ("e", "f", "y"):
        np.testing.assert_allclose(
            gram(model, value, resuming), gram(model, value, observer(model, samples)), rtol=1e-6
        )


def test_what_takes_too_much_is_not_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(frontier, "FRONTIER_BYTES", 1)
    model = parse(CHAIN)
    samples = rows(5, 3)
    resuming = observer(model, samples)
    gram(model, "b", resuming)
    cut = resuming._frontier.cut(model.clone(), keeps=False)
    assert cut is not None and not cut.known
    np.testing.assert_array_equal(
        gram(model, "d", resuming), gram(model, "d", observer(model, samples))
    )
