"""Tails: layers before a mean over places that can work on a quarter of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from test_prune_structures import applied, built, context_of, error, macs, normal, samples

from graphopt.contract import Change, Sample
from graphopt.gate import interface_of, why_other_interface
from graphopt.rewriting import Names
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt_passes.prune.aims import aims_of
from graphopt_passes.prune.prune_structures import PruneStructures
from graphopt_passes.prune.tails import Tail, averaged, pool, tails_of
from graphopt_passes.prune.unit_refitting import refit_units
from graphopt_passes.quantize.layers import layer_of

CLASSIFIER = """agraph (float[N, 3, 9, 8] x) => (float[N, 5] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1)
    b = Relu(a)
    c = Conv<pads=[1, 1, 1, 1]>(b, w2)
    d = Relu(c)
    e = Conv(d, w3)
    f = Relu(e)
    g = GlobalAveragePool(f)
    h = Flatten(g)
    y = Gemm<transB=1>(h, w4)
}"""


def classifier(last: int = 16) -> ir.Model:
    """Most of what it costs is its last convolution, if that has many channels."""
    model = built(
        CLASSIFIER,
        w1=normal(8, 3, 3, 3),
        w2=normal(8, 8, 3, 3, seed=1),
        w3=normal(last, 8, 1, 1, seed=2),
        w4=normal(5, last, seed=3),
    )
    infer_shapes(model)
    return model


def inferred(text: str, **arrays: np.ndarray) -> ir.Model:
    model = built(text, **arrays)
    infer_shapes(model)
    return model


def read_by(model: ir.Model) -> list[str | None]:
    """What the tails of a model read."""
    return [tail.value.name for tail in tails_of(model)]


def tail_at(model: ir.Model, value: str) -> Tail:
    return next(tail for tail in tails_of(model) if tail.value.name == value)


def test_every_cut_between_layers_begins_a_tail() -> None:
    assert read_by(classifier()) == ["f", "e", "d", "c", "b", "a"]


@pytest.mark.parametrize("mean", ["ReduceMean<axes=[2, 3]>", "AveragePool<kernel_shape=[6, 6]>"])
def test_a_mean_is_one_however_it_is_written(mean: str) -> None:
    text = "agraph (float[1, 3, 6, 6] x) => (y) { a = Conv(x, w) b = Relu(a) y = %s(b) }"
    assert read_by(inferred(text % mean, w=normal(4, 3, 1, 1))) == ["b", "a"]


@pytest.mark.parametrize(
    "mean",
    ["ReduceMean<axes=[1, 2]>", "AveragePool<kernel_shape=[3, 3]>", "GlobalMaxPool", "Flatten"],
)
def test_what_is_no_mean_over_all_places_has_no_tail(mean: str) -> None:
    text = "agraph (float[1, 3, 6, 6] x) => (y) { a = Conv(x, w) b = Relu(a) y = %s(b) }"
    assert read_by(inferred(text % mean, w=normal(4, 3, 1, 1))) == []


@pytest.mark.parametrize(("axis", "found"), [(1, ["d", "x"]), (-3, ["d", "x"]), (2, ["d"])])
def test_channels_may_be_put_together(axis: int, found: list[str]) -> None:
    text = """agraph (float[1, 4, 6, 6] i) => (float[1, 8, 1, 1] y) {
        x = Relu(i) a = Conv(x, w) d = Concat<axis=%d>(x, a) y = GlobalAveragePool(d)
    }"""
    shape = "[1, 8, 1, 1]" if axis != 2 else "[1, 4, 1, 1]"
    text = text.replace("[1, 8, 1, 1]", shape)
    assert read_by(inferred(text % axis, w=normal(4, 4, 1, 1))) == found


def test_images_of_other_types_have_none() -> None:
    text = """agraph (double[1, 3, 6, 6] x) => (double[1, 3, 1, 1] y) {
        a = Relu(x) b = Relu(a) y = ReduceMean<axes=[2, 3]>(b)
    }"""
    assert read_by(inferred(text)) == []
    assert read_by(inferred(text.replace("double", "float"))) == ["b", "a"]


def test_branches_are_in_a_tail_as_a_whole() -> None:
    """A residual sum, with the squeeze and excitation of its branch."""
    model = inferred(
        """agraph (float[1, 4, 6, 6] x) => (float[1, 4, 1, 1] y) {
            s = Conv(x, w1)
            a = Conv(s, w2)
            m = GlobalAveragePool(a)
            k = Conv(m, w3)
            g = Sigmoid(k)
            b = Mul(a, g)
            t = Add(s, b)
            y = GlobalAveragePool(t)
        }""",
        w1=normal(4, 4, 1, 1),
        w2=normal(4, 4, 1, 1, seed=1),
        w3=normal(4, 4, 1, 1, seed=2),
    )
    # The mean within has one, too, but reads what others read as well.
    assert read_by(model) == ["a", "t", "s"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # Numbers of places are stated.
        (
            """agraph (float[1, 4, 6, 6] x) => (y, z) {
                a = Conv(x, w) r = Reshape(a, shape) b = Relu(r) y = GlobalAveragePool(b)
                z = Identity(shape)
            }""",
            ["b", "r"],
        ),
        # Something else reads all places.
        (
            """agraph (float[1, 4, 6, 6] x) => (y, z) {
                a = Conv(x, w) b = Relu(a) y = GlobalAveragePool(b) z = Flatten(b)
            }""",
            ["b"],
        ),
        # A constant differs by place.
        (
            """agraph (float[1, 4, 6, 6] x) => (y, z) {
                a = Conv(x, w) b = Add(a, map) y = GlobalAveragePool(b) z = Identity(map)
            }""",
            ["b"],
        ),
    ],
)
def test_a_tail_ends_where_the_number_of_places_matters(text: str, found: list[str]) -> None:
    arrays = {"w": normal(4, 4, 1, 1), "shape": np.array([1, 4, 6, 6]), "map": normal(6, 6)}
    read = {name: array for name, array in arrays.items() if name in text}
    assert read_by(inferred(text, **read)) == found


def test_where_neighbours_are_alike_nothing_changes() -> None:
    model = inferred(
        CLASSIFIER.replace("<pads=[1, 1, 1, 1]>", "").replace("9, 8", "8, 8"),
        w1=normal(8, 3, 1, 1),
        w2=normal(8, 8, 1, 1, seed=1),
        w3=normal(16, 8, 1, 1, seed=2),
        w4=normal(5, 16, seed=3),
    )
    given = [{"x": s["x"][:, :, ::2, ::2].repeat(2, 2).repeat(2, 3)} for s in samples(model)]
    for value in read_by(model):
        shorter = model.clone()
        assert pool(shorter, tail_at(shorter, value or "")) is not None
        assert error(model, shorter, given) < 1e-6


def test_a_tail_reads_means_of_two_by_two_places() -> None:
    model = classifier()
    names = pool(model, tail_at(model, "d"))
    assert names == {"e", "f"}
    assert why_invalid(model) is None
    (reading,) = [n for n in model.graph if any(o.name == "e" for o in n.outputs)]
    assert reading.inputs[0].producer().op_type == "AveragePool"  # type: ignore[union-attr]
    assert list(reading.outputs[0].shape or ())[2:] == [5, 4]


def test_a_mean_with_a_window_becomes_one_without() -> None:
    text = """agraph (float[1, 3, 6, 6] x) => (float[1, 4, 1, 1] y) {
        a = Conv(x, w) b = Relu(a) y = AveragePool<kernel_shape=[6, 6]>(b)
    }"""
    model = inferred(text, w=normal(4, 3, 1, 1))
    before = interface_of(model)
    assert pool(model, tail_at(model, "a")) == {"b"}
    assert why_other_interface(before, interface_of(model)) is None
    assert Session(model).run(samples(model)[0])["y"].shape == (1, 4, 1, 1)


def test_a_tail_whose_places_do_not_fit_is_none() -> None:
    """Without padding, a window of 3 leaves 2 of 4 places, and 6 of 8."""
    model = inferred(CLASSIFIER.replace("c = Conv<pads=[1, 1, 1, 1]>", "c = Conv"), **_weights())
    assert pool(model, tail_at(model, "b")) is None


def _weights() -> dict[str, np.ndarray]:
    return {
        "w1": normal(8, 3, 3, 3),
        "w2": normal(8, 8, 3, 3, seed=1),
        "w3": normal(16, 8, 1, 1, seed=2),
        "w4": normal(5, 16, seed=3),
    }


@pytest.mark.parametrize("rectifier", ["Relu(a)", "Clip(a, low, high)"])
def test_a_layer_before_a_relu_is_asked_for_the_mean_of_what_that_gives(rectifier: str) -> None:
    text = """agraph (float[1, 2, 4, 3] x) => (float[1, 2, 4, 3] y, float[1, 2, 4, 3] z) {
        a = Neg(x)
        y = %s
        z = Identity(x)
    }"""
    limits = {"low": np.array(0, np.float32), "high": np.array(99, np.float32)}
    model = inferred(text % rectifier, **(limits if "Clip" in rectifier else {}))
    made = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(averaged(made[name], model, Names(model)) for name in ("a", "z"))
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 3)).astype(np.float32)
    x[0, 0, :2, :2] = [[1, 2], [3, 4]]
    found = list(Session(model).run({"x": x}).values())[2:]

    padded = np.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=np.nan)
    cells = padded.reshape(1, 2, 2, 2, 2, 2)
    mean = np.nanmean(cells, (3, 5))
    positive = np.nanmean(np.maximum(-cells, 0), (3, 5))
    assert np.allclose(found[0], np.where(positive > 0, positive, -mean), atol=1e-6)
    assert found[0][0, 0, 0, 0] == -2.5
    assert np.allclose(found[1], mean, atol=1e-6)


def test_layers_of_a_tail_are_refitted_to_what_they_gave_on_the_mean() -> None:
    model = classifier()
    given, before = samples(model, 40), model.clone()
    tail = tail_at(model, "b")
    pooled = pool(model, tail)
    assert pooled
    raw, change = model.clone(), Change()
    refit_units(model, before, context_of(before, given), change, only=tail.nodes, pooled=pooled)
    # Of those before the pool, and behind the mean, none.
    assert change.counts == {"Conv refitted": 2}
    assert error(before, model, given) < error(before, raw, given)
    (aim,) = aims_of(
        [layer_of(next(n for n in model.graph if n.outputs[0].name == "e"))],
        model,
        before,
        context_of(before, given),
        pooled=pooled,
    )
    assert aim is not None and aim.rows == 40 * 2 * 5 * 4


def test_places_go_where_they_cost_less_than_channels() -> None:
    model = classifier(last=64)
    given, before = _plain(samples(model, 40)), model.clone()
    change = applied(PruneStructures(macs=0.6, multiple=1), model, given)

    assert change.counts["Conv at a quarter of the places"]
    assert any("the mean over each two by two places" in note for note in change.notes)
    assert why_invalid(model) is None
    assert macs(model) <= 0.6 * macs(before)

    other = before.clone()
    change = applied(PruneStructures(macs=0.6, multiple=1, places=False), other, given)
    assert not change.counts["Conv at a quarter of the places"]
    assert error(before, model, given) < 0.1


def test_places_stay_where_they_are_worth_more() -> None:
    """What sees a corner of the image is lost in a mean over neighbours; idle channels are not."""
    model = classifier(last=8)
    for name in ("w3", "w2"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[3:] *= 1e-4
        value.const_value = ir.tensor(array)
    change = applied(PruneStructures(macs=0.7, multiple=1), model, samples(model, 40))
    assert change.counts["unit removed"]
    assert not change.counts["Conv at a quarter of the places"]


def _plain(given: list[Sample]) -> list[Sample]:
    """Images that differ from each other more than their places do."""
    return [{"x": s["x"].mean((2, 3), keepdims=True) * 9 + 0.1 * s["x"]} for s in given]
