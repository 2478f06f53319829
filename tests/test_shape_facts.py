"""What is said of sizes holds at run time, whatever the inputs are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from generated import generate
from generated import runs_as_written as runs

from graphopt.runtime import Reference, Session
from graphopt.shape_facts import ShapeFacts
from graphopt.shape_rules import FOLLOWED
from graphopt.sizes import (
    Algebra,
    Atom,
    Polynomial,
    Size,
    difference,
    evaluate,
    exact_quotient,
    is_positive,
    may_not_be_negative,
    total,
)
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse


def atoms_of(size: Size) -> set[Atom]:
    return {a for m, _ in size.terms for a in m} if isinstance(size, Polynomial) else set()


def assert_true_at_run_time(model: ir.Model, sample: dict[str, np.ndarray]) -> int:
    """Hold all facts to what onnxruntime computes; how many sizes were checked.

    Symbols other than dimensions of inputs get the value that they are seen to have first.
    """
    infer_shapes(model)
    facts = ShapeFacts(model)
    made = [v for n in model.graph for v in n.outputs if v.name and v.dtype is not None]
    shown = model.clone()
    values = {v.name: v for n in shown.graph for v in n.outputs if v.name}
    shown.graph.outputs[:] = [values[v.name] for v in made]
    results = Session(shown, Reference.AS_WRITTEN).run(sample)
    known: dict[Atom, int] = {}
    for value in model.graph.inputs:
        shape = facts.shape(value) or ()
        for size, actual in zip(shape, sample[value.name or ""].shape, strict=True):
            known.update(dict.fromkeys(atoms_of(size), actual))
    checked = 0
    for value in made:
        actual = results[value.name or ""]
        pairs = list(zip(facts.shape(value) or (), actual.shape, strict=False))
        if facts.shape(value) is not None:
            assert len(facts.shape(value) or ()) == actual.ndim, value.name
        content = facts.content(value)
        if content is not None:
            assert value.dtype in FOLLOWED and len(content) == actual.size
            pairs += zip(content, (int(n) for n in actual.reshape(-1)), strict=True)
        for size, number in pairs:
            unknown = atoms_of(size) - known.keys()
            if isinstance(size, Polynomial) and len(size.terms) == 1 and len(unknown) == 1:
                ((monomial, factor),) = size.terms
                if len(monomial) == 1 and factor == 1:
                    known[monomial[0]] = number
                    continue
            if not unknown:
                apart = evaluate(size, known) - number
                # Integers wrap around; what is said to be a number must be that number.
                assert apart % 2**64 == 0, (value.name, size, number)
                assert apart == 0 or not isinstance(size, int), (value.name, size, number)
                checked += 1
    return checked


@pytest.mark.parametrize("seed", range(60))
def test_on_generated_graphs(seed: int) -> None:
    model = generate(seed)
    free = not isinstance(model.graph.inputs[0].shape[0], int)  # type: ignore[index]
    sample = {"x": np.ones((3 if free else 2, 4, 6, 6), np.float32)}
    if not runs(model, sample):
        pytest.skip("onnxruntime does not run it as written")

    assert assert_true_at_run_time(model, sample) > 0


ARITHMETIC = """
<ir_version: 10, opset_import: ["" : 17]>
agraph (float[N, M, 6] x, int64[2] given) => (y)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1},
 int64[1] two = {2}, int64[1] minus = {-1}, int64[1] far = {9223372036854775807},
 int64[2] ends = {2, 5}, int64[2] starts = {0, 1}, int64[2] axes = {0, 2}, int64[2] both = {0, -1},
 int64[3] some = {0, -1, 2}, int64[3] thrice = {2, 1, 3}, int64[2] parts = {1, 2}>
{
    s = Shape(x)
    n = Gather(s, zero)  m = Gather(s, one)
    nm = Mul(n, m)  half = Div(nm, n)  odd = Mod(nm, m)  eight = Add(nm, one)
    less = Sub(eight, m)  negative = Neg(less)  most = Max(eight, nm)  least = Min(eight, nm)
    u = Unsqueeze(nm, first)  j = Concat<axis = 0>(u, minus)
    r = Reshape(x, j)  t = Transpose(r)  f = Flatten<axis = 2>(x)
    copied = Reshape(x, some)
    back = Slice(s, minus, minus, first, minus)
    tail = Slice(s, second, far)  head = Slice(s, first, two)
    cut = Slice(x, starts, ends, axes)
    p, q = Split<axis = 0>(s, parts)
    all = ReduceProd<keepdims = 0>(s)
    sum = ReduceSum<keepdims = 1>(s)
    e = Expand(m, head)  tiled = Tile(x, thrice)
    z = ConstantOfShape(head)  zz = ConstantOfShape<value = int64[1] {3}>(two)
    rows = Range(zero, n, one)
    c = Greater(eight, nm)  d = Equal(n, n)  w = Where(d, n, m)  either = Or(c, d)
    k = Cast<to = 6>(s)  kk = Cast<to = 7>(k)
    g = Gather<axis = 1>(x, both)  picked = Gather(given, first)
    two_of = Concat<axis = 1>(x, x)  summed = Add(two_of, m2)  m2 = Cast<to = 1>(m)
    size = Size(x)  squeezed = Squeeze(u)
    y = Identity(x)
}
"""


@pytest.mark.parametrize(("n", "m"), [(2, 3), (1, 2), (4, 2), (1, 5)])
def test_on_shape_arithmetic(n: int, m: int) -> None:
    model = parse(ARITHMETIC.replace("summed = Add(two_of, m2)  m2 = Cast<to = 1>(m)", ""))

    checked = assert_true_at_run_time(
        model, {"x": np.ones((n, m, 6), np.float32), "given": np.int64([5, 7])}
    )

    assert checked > 60


def test_sizes_are_equal_when_they_are_the_same_polynomial() -> None:
    algebra = Algebra()
    n, m = algebra.atom("n", True), algebra.atom("m", True)

    assert algebra.quotient(algebra.product(n, 8), 2) == algebra.product(4, n)
    assert difference(total(n, m), m) == n
    assert algebra.product(n, m) == algebra.product(m, n)
    assert exact_quotient(algebra.product(n, m), n) == m
    assert exact_quotient(total(n, 1), 2) is None
    assert algebra.quotient(total(n, 1), 2) == algebra.quotient(total(1, n), 2)
    assert algebra.quotient(7, -2) == -3


def test_signs_are_known_of_dimensions_only() -> None:
    algebra = Algebra()
    n, any_number = algebra.atom("n", True), algebra.atom("k")

    assert may_not_be_negative(n) and not may_not_be_negative(any_number)
    assert is_positive(total(n, 1)) and not is_positive(n)
    assert not may_not_be_negative(difference(n, 1))


def test_what_overflows_is_not_followed() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        agraph (float[N] x) => (int64[1] y, int64[1] z)
        <int64[1] most = {9223372036854775807}, int64[1] one = {1}>
        { n = Shape(x)  m = Add(n, most)  y = Neg(m)  k = Add(most, one)  z = Neg(k) }
        """
    )

    assert assert_true_at_run_time(model, {"x": np.ones(3, np.float32)}) > 0
