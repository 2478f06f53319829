"""What layers should give: numpy on the values of both models is the oracle."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import normal

from graphopt.contract import Change, Context, Sample
from graphopt.regression import Regression
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import canonical, parse
from graphopt_passes.prune.aims import GAIN_MAXIMUM, Aim, aim_of, has_aim, sum_of
from graphopt_passes.prune.entries import UNSTRUCTURED, Criterion
from graphopt_passes.prune.pruning import Pruning
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.twins import side_by_side, values_of

CHAIN = """
agraph (float[N,12] x, float[10,12] w, float[6,10] v, float[6] b) => (float[A,B] y)
{ a = Gemm<transB = 1>(x, w) r = Relu(a) y = Gemm<transB = 1>(r, v, b) }
"""
RESIDUAL = """
agraph (float[N,12] x, float[12,12] w, float[12,12] v, float[12] b) => (float[A,B] y)
{ a = MatMul(x, w) c = Gemm<transB = 1>(x, v, b) s = Add(a, c) y = Relu(s) }
"""


def chain() -> ir.Model:
    return parse(CHAIN, w=normal(0, 10, 12), v=normal(1, 6, 10), b=normal(2, 6))


def residual(text: str = RESIDUAL) -> ir.Model:
    return parse(text, w=normal(0, 12, 12), v=normal(1, 12, 12), b=normal(2, 12))


def samples(count: int = 12, rows: int = 20, seed: int = 0) -> list[Sample]:
    """Inputs that have much in common with each other, about a mean of 1."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(12, 12))
    return [{"x": (rng.normal(size=(rows, 12)) @ mix + 1).astype(np.float32)} for _ in range(count)]


def changed(model: ir.Model, name: str = "w") -> ir.Model:
    """The same with the smaller half of a weight set to zero."""
    infer_shapes(model)
    after = model.clone()
    value = after.graph.initializers[name]
    array = np.asarray(value.const_value)
    rest = np.where(np.abs(array) < np.median(np.abs(array)), 0, array)
    value.const_value = ir.tensor(rest.astype(array.dtype), name=name)
    return after


def layer(model: ir.Model, weight: str) -> Layer:
    (use,) = model.graph.initializers[weight].uses()
    return layer_of(use.node)


def aim(after: ir.Model, before: ir.Model, weight: str, given: list[Sample]) -> Aim:
    context = Context(lambda: before, observer=observer(before, given))
    found = aim_of(layer(after, weight), after, before, context)
    assert found is not None
    return found


def values(model: ir.Model, names: Iterable[str], given: list[Sample]) -> list[np.ndarray]:
    """Of all samples, float64, as rows of one matrix."""
    probe = model.clone()
    probe.graph.outputs[:] = values_of(probe, names)
    infer_shapes(probe)
    session = Session(probe)
    runs = [list(session.run(sample).values()) for sample in given]
    return [np.concatenate(arrays).astype(np.float64) for arrays in zip(*runs, strict=True)]


# ------------------------------------------------------------------ the aim


def test_a_layer_should_give_what_it_gave_of_what_it_reads_now() -> None:
    model, given = chain(), samples()
    after = changed(model)
    found = aim(after, model, "v", given)
    (read,), (gave,) = values(after, ["r"], given), values(model, ["y"], given)
    z, t = read - read.mean(0), gave - gave.mean(0)

    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(found.moments[0], z.T @ z / len(z), **close)
    np.testing.assert_allclose(found.cross[0], t.T @ z / len(z), **close)
    np.testing.assert_allclose(found.squares[0], np.square(t).mean(0), **close)
    solved, *_ = np.linalg.lstsq(z, t, rcond=None)
    weight = found.weight(np.zeros((1, 6, 10)), found.moments)
    np.testing.assert_allclose(weight[0], solved.T, rtol=1e-2, atol=1e-3)
    # Whatever the weight becomes, the bias makes the means right.
    other = normal(9, 1, 6, 10).astype(np.float64)
    means = (read @ other[0].T + found.bias(other)).mean(0)
    np.testing.assert_allclose(means, gave.mean(0), rtol=1e-4, atol=1e-4)


def test_where_nothing_has_changed_a_layer_keeps_its_weight() -> None:
    model, given = chain(), samples()
    infer_shapes(model)
    for name in ("w", "v"):
        found, own = aim(model.clone(), model, name, given), layer(model, name)
        weight = found.weight(own.matrix(), found.moments + 0.01 * np.eye(own.dimensions[2]))
        np.testing.assert_allclose(weight, own.matrix(), rtol=1e-3, atol=1e-4)
        old = 0 if own.bias() is None else own.bias()
        np.testing.assert_allclose(found.bias(own.matrix()) - old, 0, atol=1e-4)


def test_a_weight_is_drawn_to_what_it_was() -> None:
    model, given = chain(), samples()
    after = changed(model)
    found, near = aim(after, model, "v", given), layer(model, "v").matrix()
    scale = float(np.trace(found.moments[0]))
    apart = [
        np.linalg.norm(found.weight(near, found.moments + ridge * scale * np.eye(10)) - near)
        for ridge in (0, 0.1, 10, 1e6)
    ]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] > 0.1 and apart[-1] < 1e-5


def test_without_a_bias_moments_are_about_zero() -> None:
    model, given = residual(), samples()
    after = changed(model, "v")
    found = aim(after, model, "w", given)
    (read,) = values(after, ["x"], given)
    np.testing.assert_allclose(found.moments[0], read.T @ read / len(read), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pruned, refitted", ["wv", "vw"])
def test_a_layer_makes_good_for_what_it_is_added_to(pruned: str, refitted: str) -> None:
    """It should give the sum as it was, less the other value as it is."""
    model, given = residual(), samples()
    after = changed(model, pruned)
    found = aim(after, model, refitted, given)
    (total,), (other,) = (
        values(model, ["s"], given),
        values(after, ["a" if pruned == "w" else "c"], given),
    )
    wanted = total - other
    np.testing.assert_allclose(found.given_means[0], wanted.mean(0), rtol=1e-3, atol=1e-3)
    assert np.abs(wanted - values(model, ["c" if pruned == "w" else "a"], given)[0]).max() > 1


def test_a_sum_of_several_is_one_aim() -> None:
    text = RESIDUAL.replace("s = Add(a, c)", "p = Add(x, a) s = Add(c, p)")
    model, given = residual(text), samples()
    after = changed(model, "v")
    found = aim(after, model, "w", given)
    (total,), (read, other) = values(model, ["s"], given), values(after, ["x", "c"], given)

    # The input is no computed value: the first sum is left as it is.
    (gave,) = values(model, ["a"], given)
    np.testing.assert_allclose(found.given_means[0], gave.mean(0), rtol=1e-3, atol=1e-3)
    text = text.replace("p = Add(x, a)", "n = Neg(x) p = Add(n, a)")
    model = residual(text)
    found = aim(changed(model, "v"), model, "w", given)
    (total,) = values(model, ["s"], given)
    wanted = (total - other + read).mean(0)
    np.testing.assert_allclose(found.given_means[0], wanted, rtol=1e-3, atol=1e-3)


NO_SUMS = {
    "twice": "s = Add(c, c) t = Sub(s, a)",
    "constant": "k = Constant<value = float[1,1] {1.0}>() t = Add(c, k) s = Mul(t, a)",
    "broadcast": "m = ReduceMean<keepdims = 1>(a, axes) t = Add(c, m) s = Identity(t)",
    "two readers": "t = Add(c, a) n = Neg(c) s = Add(t, n)",
    "other operator": "s = Mul(c, a)",
}


@pytest.mark.parametrize("name", sorted(NO_SUMS))
def test_what_is_no_sum_of_alike_values_is_no_aim(name: str) -> None:
    text = RESIDUAL.replace("s = Add(a, c)", NO_SUMS[name])
    text = text.replace("float[12] b", "float[12] b, int64[1] axes")
    weights = {"w": normal(0, 12, 12), "v": normal(1, 12, 12), "b": normal(2, 12)}
    model = parse(text, **weights, axes=np.array([0]))
    infer_shapes(model)
    given, others = sum_of(layer(model, "v"))
    assert (given.name, others) == ("c", [])


def test_an_output_of_the_graph_is_what_it_is() -> None:
    model = residual(RESIDUAL.replace("(float[A,B] y)", "(float[A,B] y, float[C,D] c)"))
    infer_shapes(model)
    assert sum_of(layer(model, "v"))[0].name == "c"


def test_an_add_in_a_body_is_no_sum_of_the_graph_outside() -> None:
    text = """
        agraph (float[N,12] x, bool q, float[12,12] w, float[12,12] v, float[12] b)
            => (float[A,B] y)
        { a = MatMul(x, w) c = Gemm<transB = 1>(x, v, b)
          y = If (q) <
            then_branch = t () => (float[N,12] p) { p = Add(a, c) },
            else_branch = e () => (float[N,12] n) { n = Neg(a) }
          > }
    """
    model = residual(text)
    given = [{**s, "q": np.array(i % 2 == 0)} for i, s in enumerate(samples())]
    after = changed(model, "w")
    found = aim(after, model, "v", given)
    np.testing.assert_allclose(
        found.given_means[0], values(model, ["c"], given)[0].mean(0), rtol=1e-3, atol=1e-3
    )


def test_values_of_unknown_size_that_broadcast_are_left_alone() -> None:
    """The sum has more rows than the layer: nothing is learnt, and nothing breaks."""
    text = """
        agraph (float[P,12] x, float[Q,12] z, float[12,12] w, float[12,12] v, int64[2] to)
            => (float[A,B] y)
        { p = Reshape(x, to) q = Reshape(z, to) a = MatMul(p, w) c = MatMul(q, v) y = Add(a, c) }
    """
    model = parse(text, w=normal(0, 12, 12), v=normal(1, 12, 12), to=np.array([-1, 12]))
    given = [{"x": s["x"][:1], "z": s["x"]} for s in samples()]
    after = changed(model, "v")
    context = Context(lambda: model, observer=observer(model, given))

    assert aim_of(layer(after, "w"), after, model, context) is None
    # The other one has as many as the sum.
    assert aim_of(layer(after, "v"), after, model, context) is not None


def test_where_no_row_is_a_number_there_is_no_aim() -> None:
    model = chain()
    infer_shapes(model)
    given = [{"x": np.full((3, 12), np.nan, np.float32)}]
    context = Context(lambda: model, observer=observer(model, given))
    assert aim_of(layer(model, "w"), model.clone(), model, context) is None


@pytest.mark.parametrize(
    "node, fits",
    [
        ("Gemm<transB = 1>(x, w, b)", True),
        ("Gemm<transB = 1, alpha = 0.5>(x, w, b)", False),
        ("Gemm<transB = 1, beta = 2.0>(x, w, b)", False),
        ("Gemm<transA = 1, transB = 1>(x, w, b)", False),
        ("MatMul(x, w)", True),
    ],
)
def test_scaled_and_transposed_products_have_no_aim(node: str, fits: bool) -> None:
    model = parse(
        f"agraph (float[12,12] x, float[12,12] w, float[12] b) => (float[A,B] y) {{ y = {node} }}",
        w=normal(0, 12, 12),
        b=normal(1, 12),
    )
    infer_shapes(model)
    assert has_aim(layer(model, "w")) is fits


# ------------------------------------------------------------------ the variance


def aim_of_rows(read: np.ndarray, given: np.ndarray, rows: int = 10**9) -> Aim:
    z, t = read - read.mean(0), given - given.mean(0)
    return Aim(
        (z.T @ z / len(z))[None],
        (t.T @ z / len(z))[None],
        np.square(t).mean(0)[None],
        read.mean(0)[None],
        given.mean(0)[None],
        rows,
    )


def test_outputs_vary_as_they_should() -> None:
    read = np.random.default_rng(0).normal(size=(500, 8)) + 2
    given = read @ np.random.default_rng(1).normal(size=(8, 4))
    found = aim_of_rows(read, given)
    weight = found.cross.copy()
    weight[0] = np.linalg.solve(found.moments[0], found.cross[0].T).T
    # More than half of what each gives is left.
    weight[0, :, :2] = 0
    repaired = found.with_variance(weight)

    np.testing.assert_allclose((read @ repaired[0].T).var(0), given.var(0), rtol=1e-7)
    np.testing.assert_array_equal(repaired == 0, weight == 0)


def test_the_gain_has_a_limit_and_nothing_stays_nothing() -> None:
    read = np.random.default_rng(0).normal(size=(500, 8))
    found = aim_of_rows(read, read[:, :4])
    weight = np.zeros((1, 4, 8))
    weight[0, 0, 0], weight[0, 1, 1], weight[0, 2, 2] = 0.01, 4, 1
    gains = found.with_variance(weight)[0].max(1) / [0.01, 4, 1, 1]
    np.testing.assert_allclose(gains, [GAIN_MAXIMUM, 0.25, 1, 0])
    still = aim_of_rows(read, np.ones((500, 4)))
    np.testing.assert_array_equal(still.with_variance(weight), weight)


def test_of_few_rows_little_of_the_gain_is_believed() -> None:
    read = np.random.default_rng(0).normal(size=(500, 8))
    weight = np.eye(4, 8)[np.newaxis] / 2
    gains = [
        aim_of_rows(read, read[:, :4], rows).with_variance(weight)[0, 0, 0] * 2
        for rows in (0, 1, 16, 10**6)
    ]
    np.testing.assert_allclose(gains, [1, 1 + 1 / 17, 1.5, 2], rtol=1e-4)


def test_where_nothing_varies_the_gain_is_1() -> None:
    """What is left of sums in float32 is no variance."""
    found = Regression()
    found.add(np.repeat(normal(0, 1, 30) * 100, 60, 0), np.repeat(normal(1, 1, 4) * 100, 60, 0))
    moments, cross, squares = found.moments(central=True)
    still = Aim(moments, cross, squares + 1, found.means, found.aim_means, found.rows)
    weight = normal(2, 1, 4, 30).astype(np.float64)
    np.testing.assert_array_equal(still.with_variance(weight), weight)


# ------------------------------------------------------------------ what comes of it


@pytest.mark.parametrize("criterion", ["magnitude", "activations", "second-order"])
@pytest.mark.parametrize("make", [chain, residual])
def test_the_means_of_outputs_with_a_bias_stay(make: object, criterion: Criterion) -> None:
    model: ir.Model = make()  # type: ignore[operator]
    if make is residual:
        # What comes last has the bias.
        model = residual(RESIDUAL.replace("y = Relu(s)", "y = Identity(s)"))
    infer_shapes(model)
    given, after = samples(), model.clone()
    context = Context(lambda: model, observer=observer(model, given))
    pruning = Pruning(after, context, criterion, UNSTRUCTURED, Change())
    pruning.run([target.size // 2 for target in pruning.targets])

    assert why_invalid(after) is None
    (old,), (new,) = (values(m, ["y"], given) for m in (model, after))
    assert np.abs(new - old).max() > 0.1
    np.testing.assert_allclose(new.mean(0), old.mean(0), atol=2e-3)


# ------------------------------------------------------------------ models side by side


def test_both_models_run_as_one() -> None:
    text = """
        agraph (float[N,12] x, float d, float[12,12] w, float[12,12] v, float[12] b)
            => (float[A,B] y)
        { a = MatMul(x, w) m = Mul(a, d) c = Gemm<transB = 1>(m, v, b)
          t = ReduceSum(c) z = Less(d, t)
          y = If (z) <
            then_branch = t () => (float[N,12] p) { k = Neg(c) p = Add(k, m) },
            else_branch = e () => (float[N,12] n) { n = Neg(m) }
          > }
    """
    model = residual(text)
    default = next(v for v in model.graph.inputs if v.name == "d")
    default.const_value = ir.tensor(np.float32(0.5), name="d")
    model.graph.register_initializer(default)
    after = changed(model)
    texts = canonical(model), canonical(after)
    twin, theirs = side_by_side(after, model)
    own = [o.name for o in twin.graph.outputs]
    twin.graph.outputs.extend(theirs[name] for name in "acy")
    infer_shapes(twin)

    assert (canonical(model), canonical(after)) == texts
    assert own == ["y"] and why_invalid(twin) is None
    for one in samples(3):
        for sample in (one, {**one, "d": np.array(-3, np.float32)}):
            found = Session(twin).run(sample)
            for name in "acy":
                (wanted,) = values(model, [name], [sample])
                np.testing.assert_allclose(
                    found[theirs[name].name or ""], wanted, rtol=1e-5, atol=1e-5
                )
            (wanted,) = values(after, ["y"], [sample])
            np.testing.assert_allclose(found["y"], wanted, rtol=1e-5, atol=1e-5)
