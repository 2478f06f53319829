"""prune-structures: what goes is what the outputs need least, and what stays makes good for it."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from generated_structures import structure
from observed import observer
from rich.console import Console

import graphopt
from graphopt.contract import Change, Context, Sample
from graphopt.gate import interface_of, why_other_interface
from graphopt.groups import analyze
from graphopt.layer_costs import macs_of_nodes
from graphopt.random_samples import random_samples
from graphopt.report import render_inspection
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import canonical, parse
from graphopt_passes.prune.blocks import blocks_of
from graphopt_passes.prune.prune_structures import PruneStructures
from graphopt_passes.prune.sinks import sinks_of
from graphopt_passes.prune.unit_choice import BlockOption, Choosing, UnitOptions
from graphopt_passes.prune.unit_costs import Costs, macs_terms, parameters_terms
from graphopt_passes.prune.unit_scores import curve_of

DIGITS = Path(__file__).parents[1] / "models" / "graphopt_models"

CNN = """agraph (float[N, 3, 8, 8] x) => (float[N, 4] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads=[1, 1, 1, 1]>(r, w2, b2)
    s = Relu(c)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w3, b3)
}"""

RESIDUAL = """agraph (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
    s = Conv(x, w0)
    a = Conv<pads=[1, 1, 1, 1]>(s, w1)
    r = Relu(a)
    c = Conv<pads=[1, 1, 1, 1]>(r, w2)
    t = Add(s, c)
    u = Relu(t)
    y = Conv(u, w3)
}"""


def built(text: str, **arrays: np.ndarray) -> ir.Model:
    """A model whose text does not state what initializers are like."""
    types = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64", np.dtype(np.int8): "int8"}
    stated = "".join(
        f", {types[a.dtype]}[{', '.join(map(str, a.shape))}] {n}" if a.ndim else f", float {n}"
        for n, a in arrays.items()
    )
    return parse(text.replace(") =>", f"{stated}) =>", 1), **arrays)


def normal(*shape: int, seed: int = 0, scale: float | None = None) -> np.ndarray:
    """Random weights that keep the scale of what they read."""
    scale = float(np.prod(shape[1:])) ** -0.5 if scale is None else scale
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def cnn() -> ir.Model:
    return built(
        CNN,
        w1=normal(16, 3, 3, 3),
        b1=normal(16, scale=0.1),
        w2=normal(16, 16, 3, 3, seed=1),
        b2=normal(16, scale=0.1),
        w3=normal(4, 16, seed=2),
        b3=normal(4, scale=0.1),
    )


def residual(scale: float = 1e-3) -> ir.Model:
    return built(
        RESIDUAL,
        w0=normal(8, 8, 1, 1),
        w1=normal(8, 8, 3, 3, seed=1),
        w2=normal(8, 8, 3, 3, seed=2, scale=scale),
        w3=normal(8, 8, 1, 1, seed=3),
    )


def samples(model: ir.Model, count: int = 12) -> list[Sample]:
    found: list[Sample] = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        found.append(
            {
                v.name or "": random.normal(
                    size=[d if isinstance(d, int) else 2 for d in v.shape or ()]
                ).astype(np.float32)
                for v in model.graph.inputs
            }
        )
    return found


def context_of(model: ir.Model, given: list[Sample]) -> Context:
    original = model.clone()
    return Context(lambda: original, samples=given, observer=observer(model, given))


def applied(one: PruneStructures, model: ir.Model, given: list[Sample] | None = None) -> Change:
    infer_shapes(model)
    return one.apply(model, context_of(model, given or samples(model)))


def macs(model: ir.Model) -> int:
    return sum(m or 0 for m in macs_of_nodes(model).values())


def error(first: ir.Model, second: ir.Model, given: list[Sample]) -> float:
    """Relative L2 of all outputs of all samples."""
    one, other = Session(first), Session(second)
    pairs = [(a, b) for sample in given for a, b in _pairs(one.run(sample), other.run(sample))]
    missed = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(missed / sum(float(np.square(a).sum()) for a, _ in pairs)))


def _pairs(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(first[name], second[name]) for name in first]


# ------------------------------------------------------------------ the whole pass


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_budget_of_multiply_accumulates_is_met(share: float) -> None:
    model = cnn()
    infer_shapes(model)
    before = model.clone()

    change = applied(PruneStructures(macs=share, multiple=1), model)

    assert change.counts["unit removed"]
    assert why_invalid(model) is None
    assert why_other_interface(interface_of(before), interface_of(model)) is None
    assert 0.85 * share <= macs(model) / macs(before) <= share


def test_the_budget_of_parameters_is_met() -> None:
    model = cnn()
    infer_shapes(model)
    before = sum(term.amount for term in parameters_terms(model))

    applied(PruneStructures(parameters=0.6, multiple=1), model)

    assert 0.5 <= sum(term.amount for term in parameters_terms(model)) / before <= 0.6


def test_numbers_of_channels_are_multiples() -> None:
    model = cnn()

    applied(PruneStructures(macs=0.6, multiple=4), model)

    for name in ("w1", "w2"):
        shape = model.graph.initializers[name].shape
        assert shape is not None and shape[0] % 4 == 0


def test_a_channel_that_gives_nothing_goes_first() -> None:
    model = cnn()
    for name in ("w2", "w3"):
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[:, 8:] = 0
        value.const_value = ir.tensor(array, name=name)
    infer_shapes(model)
    before = model.clone()

    applied(PruneStructures(macs=0.5, multiple=8), model)

    assert error(before, model, samples(before)) < 1e-3


def test_refitting_lowers_the_error() -> None:
    given = [{"image": image} for image in _digits()[:64]]
    original = graphopt.load(DIGITS / "digits_cnn.onnx")
    run = graphopt.optimize(original, recipe="basic", samples=given, benchmark=False)
    errors = []
    for refit in (True, False):
        model = run.model.clone()
        name = model.graph.inputs[0].name or ""
        named: list[Sample] = [{name: sample["image"]} for sample in given]
        before = model.clone()
        applied(PruneStructures(macs=0.7, refit=refit), model, named[:40])
        errors.append(error(before, model, named[40:]))

    assert errors[0] < 0.7 * errors[1]


def _digits() -> np.ndarray:
    with np.load(DIGITS / "digits_cnn_samples.npz") as file:
        (array,) = (file[name] for name in file.files)
    return np.asarray(array)


def test_a_branch_that_adds_little_is_left_out() -> None:
    model = residual()
    infer_shapes(model)
    before = model.clone()

    change = applied(PruneStructures(macs=0.3, multiple=8), model)

    assert change.counts["residual branch removed"] == 1
    assert [node.op_type for node in model.graph].count("Conv") == 2
    assert error(before, model, samples(before)) < 0.01


def test_blocks_stay_where_they_are_to() -> None:
    model = residual()

    change = applied(PruneStructures(macs=0.6, multiple=1, blocks=False), model)

    assert not change.counts["residual branch removed"]
    assert change.counts["unit removed"]


def test_the_hidden_units_of_an_lstm() -> None:
    text = """agraph (float[5, 2, 6] x) => (float[5, 2, 3] y) {
        h = LSTM<hidden_size=8>(x, w, r, b)
        axes = Constant<value_ints=[1]>()
        s = Squeeze(h, axes)
        y = MatMul(s, m)
    }"""
    model = built(
        text,
        w=normal(1, 32, 6),
        r=normal(1, 32, 8, seed=1, scale=0.3),
        b=normal(1, 64, scale=0.1),
        m=normal(8, 3, seed=2),
    )
    infer_shapes(model)
    before = model.clone()

    change = applied(PruneStructures(macs=0.6, multiple=1), model)

    assert change.counts["unit removed"] >= 2
    assert why_invalid(model) is None
    assert macs(model) <= 0.6 * macs(before)
    assert error(before, model, samples(before)) < 0.7


def test_whole_heads_of_attention() -> None:
    text = """agraph (float[1, 5, 8] x) => (float[1, 5, 8] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        q4 = Reshape(q, heads)
        k4 = Reshape(k, heads)
        v4 = Reshape(v, heads)
        qt = Transpose<perm=[0, 2, 1, 3]>(q4)
        kt = Transpose<perm=[0, 2, 3, 1]>(k4)
        vt = Transpose<perm=[0, 2, 1, 3]>(v4)
        s = MatMul(qt, kt)
        p = Softmax<axis=-1>(s)
        o = MatMul(p, vt)
        ot = Transpose<perm=[0, 2, 1, 3]>(o)
        merged = Reshape(ot, flat)
        y = MatMul(merged, wo)
    }"""
    weights = {f"w{n}": normal(8, 8, seed=i) for i, n in enumerate("qkvo")}
    model = built(text, heads=np.array([0, 0, 4, 2]), flat=np.array([0, 0, -1]), **weights)

    change = applied(PruneStructures(macs=0.8, multiple=1), model)

    assert change.counts["unit removed"] >= 1
    assert why_invalid(model) is None
    shape = model.graph.initializers["wo"].shape
    assert shape is not None and shape[0] in (2, 4, 6)


# ------------------------------------------------------------------ what it leaves alone


def test_nothing_that_can_go_says_why() -> None:
    model = built("agraph (float[1, 4] x) => (float[1, 6] y) { y = MatMul(x, w) }", w=normal(4, 6))

    change = applied(PruneStructures(), model)

    assert not change.counts
    assert any("output of the model" in skip.reason for skip in change.skips)


def test_a_budget_that_cannot_be_had_says_what_can() -> None:
    model = cnn()
    infer_shapes(model)
    before = macs(model)

    change = applied(PruneStructures(macs=0.01, multiple=8), model)

    assert not change.counts
    assert macs(model) == before
    assert any("have to stay" in note for note in change.notes)


def test_groups_that_are_to_stay() -> None:
    model = cnn()
    infer_shapes(model)
    first = analyze(model).prunable[0].name

    change = applied(PruneStructures(macs=0.8, multiple=1, keep=(first,)), model)

    assert any(s.node == first and s.reason == "it is to be kept" for s in change.skips)
    assert model.graph.initializers["w1"].shape == ir.Shape([16, 3, 3, 3])


def test_a_group_that_is_not_there_is_refused() -> None:
    model = cnn()
    infer_shapes(model)
    first = analyze(model).prunable[0].name

    reason = PruneStructures(keep=(f"{first}x",)).refuse(model, Context(lambda: model))

    assert reason == f"no group is called '{first}x'; did you mean {first!r}?"
    assert PruneStructures(keep=(first,)).refuse(model, Context(lambda: model)) is None


def test_codes_are_left_alone() -> None:
    text = """agraph (float[1, 4] x) => (float[1, 3] y) {
        a = MatMul(x, w1)
        w = DequantizeLinear(codes, scale)
        y = MatMul(a, w)
    }"""
    model = built(
        text,
        w1=normal(4, 16),
        codes=np.ones((16, 3), np.int8),
        scale=np.array(0.1, np.float32),
    )

    assert not applied(PruneStructures(), model).counts


def test_a_milder_form() -> None:
    assert PruneStructures(macs=0.7).narrow() == PruneStructures(macs=0.85)
    assert PruneStructures(parameters=0.6).narrow() == PruneStructures(parameters=0.8)
    assert PruneStructures(macs=0.92).narrow() is None


# ------------------------------------------------------------------ its parts


def test_costs_are_those_of_the_smaller_model() -> None:
    model = cnn()
    infer_shapes(model)
    groups = analyze(model).prunable
    costs = Costs(groups, macs_terms(model, {}))

    assert costs.total == macs(model)
    # 64 places: 3 x 9 x 8, and 8 x 9 x 4; then 4 x 4.
    assert costs.of([8, 4]) == pytest.approx(64 * (3 * 9 * 8 + 8 * 9 * 4) + 4 * 4)
    along = costs.along(1, np.array([4, 16]), [8, 16])
    assert along[1] - along[0] == pytest.approx(costs.of([8, 16]) - costs.of([8, 4]))


def test_the_curve_is_that_of_least_squares() -> None:
    model = cnn()
    infer_shapes(model)
    group = analyze(model).prunable[0]
    (sinks,) = sinks_of([group], model, context_of(model, samples(model))).values()
    (sink,) = sinks
    curve = curve_of(sinks)

    gone = np.zeros(sink.matrix.shape[2], bool)
    gone[sink.columns[curve.order[: curve.half]].ravel()] = True
    best = sink.without(gone)
    change = best - sink.matrix
    square = float(np.einsum("gnk,gkj,gnj->", change, sink.moments, change))

    assert curve.costs[curve.half] == pytest.approx(square / sink.energy, rel=1e-3)
    np.testing.assert_allclose(curve.halves[0], best, atol=1e-4)


def test_the_first_unit_to_go_is_the_cheapest_of_all() -> None:
    model = cnn()
    infer_shapes(model)
    group = analyze(model).prunable[1]
    ((sink,),) = sinks_of([group], model, context_of(model, samples(model))).values()
    costs = []
    for columns in sink.columns:
        gone = np.zeros(sink.matrix.shape[2], bool)
        gone[columns] = True
        change = sink.without(gone) - sink.matrix
        costs.append(float(np.einsum("gnk,gkj,gnj->", change, sink.moments, change)))

    assert curve_of([sink]).order[0] == np.argmin(costs)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_the_choice_is_near_the_best_of_all(share: float) -> None:
    model = cnn()
    infer_shapes(model)
    groups = analyze(model).prunable
    costs = Costs(groups, macs_terms(model, {}))
    allowed = np.arange(1, 17)
    random = np.random.default_rng(0)
    squares = [np.cumsum(np.sort(random.random(16)))[::-1] for _ in groups]
    squares = [s - s[-1] for s in squares]
    choosing = Choosing(costs, [UnitOptions(allowed, s) for s in squares], [])
    limit = share * costs.total

    chosen = choosing.within(limit)

    every = [
        float(squares[0][a - 1] + squares[1][b - 1])
        for a in allowed.tolist()
        for b in allowed.tolist()
        if costs.of([a, b]) <= limit
    ]
    assert choosing.cost(chosen) <= limit
    assert choosing.square(chosen) <= 1.3 * min(every) + 1e-9


def test_a_cheap_block_goes_before_units() -> None:
    model = residual()
    infer_shapes(model)
    groups = list(analyze(model).prunable)
    costs = Costs(groups, macs_terms(model, {}))
    (block,) = blocks_of(model, macs_of_nodes(model))
    options = [UnitOptions(np.arange(1, g.units + 1), np.linspace(1, 0, g.units)) for g in groups]
    choosing = Choosing(costs, options, [BlockOption(block.nodes, frozenset(), 1e-6)])

    assert choosing.within(0.5 * costs.total).dropped == {0}
    assert {node.op_type for node in block.nodes} == {"Conv", "Relu"}


def test_inspect_says_what_goes_together_and_what_must_stay() -> None:
    found, tried = graphopt.inspect(cnn())

    assert [group["units"] for group in found.groups] == [16, 16, 4]
    assert found.groups[0]["frozen"] is None
    assert "output of the model" in found.groups[2]["frozen"]
    shown = Console(width=200, file=StringIO())
    shown.print(render_inspection(found, tried, groups=True))
    assert "removable" in shown.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------ laws on generated models


def check(model: ir.Model, one: PruneStructures) -> bool:
    """Whether the pass changed the model; asserts that the result is valid and within budget."""
    infer_shapes(model)
    text, after = canonical(model), model.clone()
    given = random_samples(model, 3)
    context = Context(lambda: model, given, observer=observer(model, given))
    change = one.apply(after, context)
    assert canonical(model) == text, "the original was written over"
    if not change:
        assert canonical(after) == text, "unreported change"
        return False
    assert why_invalid(after) is None, why_invalid(after)
    assert why_other_interface(interface_of(model), interface_of(after)) is None
    assert macs(after) <= one.macs * macs(model)
    Session(after).run(given[0])
    return True


def test_laws_of_prune_structures() -> None:
    assert sum(check(structure(seed), PruneStructures(multiple=1)) for seed in range(5)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(5, 65, 20))
def test_laws_of_prune_structures_on_many_models(first: int) -> None:
    passes = [PruneStructures(multiple=1), PruneStructures(macs=0.5, multiple=2)]
    seeds = range(first, first + 20)

    assert sum(check(structure(seed), passes[seed % 2]) for seed in seeds) > 8
