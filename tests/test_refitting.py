from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import normal

from graphopt.contract import Change, Context, Sample
from graphopt.observe import Observer
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import canonical, parse
from graphopt_passes.quantize.quantize_binary import QuantizeBinary
from graphopt_passes.quantize.refitting import refit_layers

CONVS = """
agraph (float[1,8,10,10] x, float[16,8,3,3] w, float[12,16,3,3] v, float[12] b)
    => (float[N,C,H,W] y)
{ a = Conv<pads = [1,1,1,1]>(x, w) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, v, b) }
"""
PRODUCTS = """
agraph (float[64,24] x, float[24,32] w, float[32,16] v) => (float[N,M] y)
{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }
"""
GEMMS = """
agraph (float[64,24] x, float[32,24] w, float[16,32] v, float[16] b) => (float[N,M] y)
{ a = Gemm<transB = 1>(x, w) r = Relu(a) y = Gemm<transB = 1>(r, v, b) }
"""


def convs() -> ir.Model:
    return parse(CONVS, w=normal(0, 16, 8, 3, 3), v=normal(1, 12, 16, 3, 3), b=normal(2, 12))


def products() -> ir.Model:
    return parse(PRODUCTS, w=normal(0, 24, 32), v=normal(1, 32, 16))


def gemms() -> ir.Model:
    return parse(GEMMS, w=normal(0, 32, 24), v=normal(1, 16, 32), b=normal(2, 16))


def samples(model: ir.Model, count: int, seed: int = 0) -> list[Sample]:
    """Inputs that have much in common with each other."""
    rng = np.random.default_rng(seed)
    shape = [d for d in model.graph.inputs[0].shape or () if isinstance(d, int)]
    axis = 1
    mix = np.random.default_rng(7).normal(size=(shape[axis], shape[axis]))
    found = []
    for _ in range(count):
        array = np.moveaxis(rng.normal(size=shape), axis, -1) @ mix
        found.append({"x": np.moveaxis(array, -1, axis).astype(np.float32) + 1})
    return found


def coarse(model: ir.Model) -> ir.Model:
    """The same with the first weight in signs."""
    rough = model.clone()
    weight = rough.graph.initializers["w"]
    array = np.asarray(weight.const_value)
    weight.const_value = ir.tensor(np.sign(array) * np.abs(array).mean(), name="w")
    return rough


def context(model: ir.Model, given: list[Sample]) -> Context:
    return Context(lambda: model, observer=observer(model, given))


def error(model: ir.Model, other: ir.Model, given: list[Sample]) -> float:
    """Relative L2 error of the output."""
    pairs = [[next(iter(Session(m).run(s).values())) for m in (model, other)] for s in given]
    return float(
        np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))
    )


@pytest.mark.parametrize("make", [convs, products, gemms])
def test_layers_behind_take_errors_back(make: object) -> None:
    model: ir.Model = make()  # type: ignore[operator]
    infer_shapes(model)
    given, held_out = samples(model, 24), samples(model, 8, seed=1)
    rough, change = coarse(model), Change()
    before = error(model, rough, held_out)

    refit_layers(rough, model, context(model, given), change)

    assert change.counts.total() == 1
    assert error(model, rough, held_out) < 0.8 * before


def test_it_is_least_squares() -> None:
    """The oracle: numpy's own solver, where rows are many and the ridge is small beside them."""
    model = gemms()
    infer_shapes(model)
    given, rough = samples(model, 40), coarse(model)
    refit_layers(rough, model, context(model, given), Change())

    read, gave = [], []
    for sample in given:
        for m, kept in ((coarse(model), read), (model, gave)):
            w = np.asarray(m.graph.initializers["w"].const_value, np.float64)
            kept.append(np.maximum(sample["x"] @ w.T, 0))
    v, b = (np.asarray(model.graph.initializers[n].const_value, np.float64) for n in "vb")
    z, y = np.concatenate(read), np.concatenate(gave) @ v.T + b
    solved, *_ = np.linalg.lstsq(np.c_[z, np.ones(len(z))], y, rcond=None)
    (refitted,) = Session(rough).run(given[0]).values()
    ideal = np.c_[read[0], np.ones(len(read[0]))] @ solved
    wanted = gave[0] @ v.T + b

    best, found = (np.linalg.norm(one - wanted) for one in (ideal, refitted))
    assert found < 1.05 * best


def test_what_reads_the_same_stays() -> None:
    model = convs()
    infer_shapes(model)
    same, change = model.clone(), Change()
    text = canonical(same)

    refit_layers(same, model, context(model, samples(model, 6)), change)

    assert not change
    assert canonical(same) == text


def test_of_few_rows_little_is_learnt() -> None:
    """Two rows of 24 inputs say nothing of most directions; weights stay near what they were."""
    model = gemms()
    infer_shapes(model)
    few = [{"x": s["x"][:2]} for s in samples(model, 1)]
    model.graph.inputs[0].shape = ir.Shape(["N", 24])
    infer_shapes(model)
    rough = coarse(model)
    refit_layers(rough, model, context(model, few), Change())

    old, new = (np.asarray(m.graph.initializers["v"].const_value) for m in (model, rough))
    assert np.linalg.norm(new - old) < 0.25 * np.linalg.norm(old)


def test_weights_are_not_written_over() -> None:
    model = convs()
    infer_shapes(model)
    rough = coarse(model)
    kept = np.asarray(rough.graph.initializers["v"].const_value).copy()
    shared = rough.graph.initializers["v"].const_value
    refit_layers(rough, model, context(model, samples(model, 6)), Change())

    np.testing.assert_array_equal(np.asarray(shared), kept)


def test_nothing_is_remembered_of_what_was_only_tried() -> None:
    model = convs()
    infer_shapes(model)
    told = context(model, samples(model, 6))
    refit_layers(coarse(model), model, told, Change())

    assert isinstance(told.observer, Observer)
    assert not told.observer._known


def test_a_branch_beside_does_not_disturb() -> None:
    """Names in bodies, nodes of equal names, and a value that only a body reads."""
    text = """
        agraph (float[64,24] x, bool c, float[32,24] w, float[16,32] v) => (float[N,M] y)
        {
            [one] a = Gemm<transB = 1>(x, w)
            [two] s = If (c) <
                then_branch = t () => (float[64,32] p) { q = Abs(a) p = Neg(q) },
                else_branch = e () => (float[64,32] p2) { p2 = Relu(a) }
            >
            y = Gemm<transB = 1>(s, v)
        }
    """
    model = parse(text, w=normal(0, 32, 24), v=normal(1, 16, 32))
    infer_shapes(model)
    given = [{**s, "c": np.array(index % 2 == 0)} for index, s in enumerate(samples(model, 12))]
    rough, change = coarse(model), Change()
    before = error(model, rough, given)

    refit_layers(rough, model, context(model, given), change)

    assert change.counts.total() == 1
    assert error(model, rough, given) < before


def test_quantize_binary_refits_what_stays() -> None:
    model = products()
    infer_shapes(model)
    given, held_out = samples(model, 30), samples(model, 8, seed=1)
    errors = []
    for refit in (False, True):
        after = model.clone()
        one = QuantizeBinary(layers="all", min_elements=600, refit=refit)
        change = one.apply(after, context(model, given))
        infer_shapes(after)
        errors.append(error(model, after, held_out))
        assert (change.counts["weight of MatMul refitted"] == 1) is refit, change.counts
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("count", [1, 12])
def test_what_never_varies_teaches_nothing(count: int) -> None:
    """The same rows again and again: their covariance is rounding and nothing else."""
    model = gemms()
    infer_shapes(model)
    row = samples(model, 1)[0]["x"][:1]
    given = [{"x": np.repeat(row, 64, 0)}] * count
    rough, change = coarse(model), Change()
    refit_layers(rough, model, context(model, given), change)

    assert not change
