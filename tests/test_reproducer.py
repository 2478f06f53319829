"""Reproducers: as small as can be, wrong on their own, and written where they were asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Effect
from graphopt.deviations import Tolerance, locate
from graphopt.errors import ModelError
from graphopt.reproducer import (
    check_folder,
    cut_pair,
    fewest,
    reproducer,
    shrunk_cut,
    with_constants_computed,
)
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt.validation import Budget


@pytest.mark.parametrize("needed", [{"3"}, {"0", "19"}, {"4", "5", "11"}, set(map(str, range(20)))])
def test_only_what_is_needed_is_left(needed: set[str]) -> None:
    tried = 0

    def fails(items: Collection[str]) -> bool:
        nonlocal tried
        tried += 1
        return needed <= set(items)

    assert set(fewest([str(n) for n in range(20)], fails)) == needed
    assert tried <= 150


def test_it_ends_where_everything_fails() -> None:
    assert len(fewest(["a", "b", "c"], lambda _: True)) == 1


X = {"x": np.asarray([1.0, 2.0], np.float32)}
RIGHT = "agraph (float[2] x) => (float[2] y) { y = Exp (x) }"


def test_what_is_not_wrong_is_no_reproducer() -> None:
    tolerance = Tolerance(Effect.ROUNDING)

    assert reproducer(parse(RIGHT), parse(RIGHT), X, tolerance, "cpu") is None
    wrong = reproducer(parse(RIGHT), parse(RIGHT.replace("Exp", "Sin")), X, tolerance, "cpu")
    assert wrong is not None and wrong.max_error == "1e-05"


@pytest.mark.parametrize(
    ("tolerance", "max_error"),
    [
        (Tolerance(Effect.EXACT), "0"),
        (Tolerance(Effect.LOSSY, (Budget(0.25),)), "0.25"),
        (Tolerance(Effect.LOSSY, (Budget(5.0),)), "0.4"),
        (Tolerance(Effect.LOSSY, (Budget(0.1, "disagreement"),)), "0"),
    ],
)
def test_its_budget_is_that_of_the_model_or_less(tolerance: Tolerance, max_error: str) -> None:
    wrong = reproducer(parse(RIGHT), parse(RIGHT.replace("Exp", "Sin")), X, tolerance, "cpu")

    assert wrong is not None and wrong.max_error == max_error


def long_model(start: str, prefix: str, end: str) -> ir.Model:
    """Twelve nodes in a row, whose values have names of their own, between a start and an end."""
    operators = ["Abs", "Sqrt", "Sin", "Cos", "Tanh", "Exp", "Neg", "Erf", "Sin", "Cos", "Elu"]
    names = ["s", *(f"{prefix}{number}" for number in range(len(operators)))]
    nodes = [f"{b} = {op} ({a})" for a, op, b in zip(names, operators, names[1:], strict=False)]
    model = parse(
        f"agraph (float[2, 4] x) => (float[2, 4] y) <float[1] zero = {{0.0}}>"
        f"{{ {start} {' '.join(nodes)} last = {end} ({names[-1]})  y = {end} (last) }}"
    )
    infer_shapes(model)
    return model


def test_values_are_known_by_their_numbers_where_nothing_else_tells() -> None:
    first = long_model("s = Neg (x)", "a", "Floor")
    second = long_model("m = Relu (x)  n = Min (x, zero)  p = Add (m, n)  s = Neg (p)", "b", "Ceil")
    # Neither names nor the order of nodes says which is which.
    extra = ir.node("Elu", [next(iter(second.graph)).outputs[0]])
    extra.outputs[0].name = "unread"
    second.graph.append(extra)
    steps = [{"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}]
    tolerance = Tolerance(Effect.ROUNDING)
    found = locate(first, second, steps, tolerance, "cpu")
    assert found.culprit is not None
    far = [pair for pair in found.pairs if pair.how == "input"]
    found = replace(found, pairs=tuple(far))

    cut = shrunk_cut(first, second, found, found.culprit.pair, tolerance, "cpu")

    assert cut is not None
    assert len(cut.after.graph) <= 2


def test_constants_are_computed_where_that_makes_a_model_small() -> None:
    model = parse(
        """
        agraph (float[2] x) => (float[2] y) <float[2] w = {3.0, -4.0}>
        { a = Abs (w)  b = Sqrt (a)  c = Mul (x, b)  y = Add (c, a) }
        """
    )

    small = with_constants_computed(model)

    assert [node.op_type for node in small.graph] == ["Mul", "Add"]
    assert sorted(small.graph.initializers) == ["a", "b"]
    np.testing.assert_array_equal(Session(small).run(X)["y"], Session(model).run(X)["y"])
    assert len(model.graph) == 4


def test_a_value_that_should_have_stayed_is_compared_with_itself() -> None:
    before = "agraph (float[2] x) => (float[2] y) { a = Abs (x)  y = Exp (a) }"
    after = """
    agraph (float[2] x) => (float[2] y) <float s = {0.5}, uint8 z = {0}>
    { a = Abs (x)  k = QuantizeLinear (a, s, z)  w = DequantizeLinear (k, s, z)  y = Exp (w) }
    """
    first, second = parse(before), parse(after)
    for model in (first, second):
        infer_shapes(model)
    tolerance = Tolerance(Effect.LOSSY, (Budget(0.01),))
    found = locate(first, second, [{"x": np.asarray([0.2, 3], np.float32)}], tolerance, "cpu")
    assert found.culprit is not None and found.culprit.pair.after == "w"

    cut = cut_pair(first, second, found, found.pairs, found.culprit.pair)

    assert cut is not None
    assert [n.op_type for n in cut.before.graph] == ["Identity"]
    assert [n.op_type for n in cut.after.graph] == ["QuantizeLinear", "DequantizeLinear"]
    made = reproducer(cut.before, cut.after, cut.inputs, tolerance, "cpu")
    assert made is not None and made.error > 0.01


def test_folders_that_will_not_do_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="it is a file"):
        check_folder(tmp_path / "file", ())
    with pytest.raises(ModelError, match="there is no folder"):
        check_folder(tmp_path / "a" / "b", ())
    with pytest.raises(ModelError, match="would be overwritten"):
        check_folder(tmp_path, [tmp_path / "before.onnx"])
    check_folder(tmp_path / "new", [tmp_path / "model.onnx"])
