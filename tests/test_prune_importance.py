"""What samples say of which numbers go: counts, errors, what comes after it, and real digits."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import normal
from pruned_models import MODELS, convs, error, lstm, products, pruned, samples, weights
from pruned_models import share_of_zeros as zeros_in

import graphopt
from graphopt.contract import Context, Pass, Sample
from graphopt.errors import SampleError, SpecError
from graphopt.registry import parse_passes
from graphopt.runtime import Session
from graphopt.saving import stored_bytes
from graphopt.skeleton import infer_shapes
from graphopt.testing import canonical, parse
from graphopt_models import DIGITS_CNN, DIGITS_CNN_LABELS, DIGITS_CNN_SAMPLES
from graphopt_passes.prune.prune_importance import PruneImportance
from graphopt_passes.prune.prune_magnitude import PruneMagnitude
from graphopt_passes.prune.prune_stability import PruneStability

DENSE = PruneImportance(min_elements=100, form="dense")


QUICK = ["products", *(pytest.param(name, marks=pytest.mark.slow) for name in ("convs", "lstm"))]

# ------------------------------------------------------------------ how many


@pytest.mark.parametrize("sparsity", [pytest.param(0.02, marks=pytest.mark.slow), 0.99])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_so_many_numbers_become_zero(name: str, sparsity: float) -> None:
    model = MODELS[name]()
    after, change = pruned(replace(DENSE, sparsity=sparsity), model, samples(model, 2))
    found, entries = weights(after), sum(a.size for a in weights(model).values())

    assert change.counts.total() == len(found) == 3 and not change.skips
    # By loss, weights are cut by twentieths, which may leave a step.
    step = max(array.size for array in found.values()) / 20
    left = sum(map(np.count_nonzero, found.values()))
    assert 0 <= round(entries * (1 - sparsity)) - left <= step
    assert all(array.any() and np.isfinite(array).all() for array in found.values())
    even, _ = pruned(replace(DENSE, sparsity=sparsity, layers="uniform"), model, samples(model, 2))
    for array in weights(even).values():
        assert abs(np.mean(array == 0) - sparsity) < 1.5 / array.size


@pytest.mark.slow
def test_many_small_weights_lose_as_many_as_are_asked() -> None:
    """What nodes would take in the file is left where a weight stays, which adds up."""
    text = ", ".join(f"float[16,16] w{n}" for n in range(12))
    nodes = " ".join(f"a{n + 1} = MatMul(a{n}, w{n}) " for n in range(12))
    model = parse(
        f"agraph (float[N,16] x, {text}) => (float[A,B] y) {{ a0 = Neg(x) {nodes} y = Neg(a12) }}",
        **{f"w{n}": normal(n, 16, 16, scale=0.25) for n in range(12)},
    )
    after, _ = pruned(replace(DENSE, sparsity=0.1), model, samples(model, 2))
    left = [int(np.count_nonzero(array)) for array in weights(after).values()]
    assert min(left) > 0
    assert zeros_in(after) == pytest.approx(0.1, abs=0.01)


def test_where_it_matters_more_stays() -> None:
    """A branch that is hardly heard loses more than the one that is."""
    model = parse(
        "agraph (float[N,48] x, float[48,48] w, float[48,48] v, float s) => (float[A,B] y)"
        "{ a = MatMul(x, w) b = MatMul(x, v) c = Mul(b, s) y = Add(a, c) }",
        w=normal(0, 48, 48),
        v=normal(1, 48, 48),
        s=np.float32(0.05),
    )
    after, _ = pruned(DENSE, model, samples(model))
    shares = {name: float(np.mean(array == 0)) for name, array in weights(after).items()}
    assert shares["v"] > 0.8 and shares["w"] < 0.2
    even, _ = pruned(replace(DENSE, layers="uniform"), model, samples(model))
    held_out = samples(model, 4, seed=1)
    assert error(model, after, held_out) < 0.7 * error(model, even, held_out)


@pytest.mark.parametrize("name", QUICK)
def test_an_error_limits_what_is_done(name: str, limit: float = 0.1) -> None:
    model = MODELS[name]()
    given = samples(model, 3)
    after, _ = pruned(replace(DENSE, error=limit, sparsity=0.0), model, given)
    found = error(model, after, given)
    # Nearly all of it is used.
    assert 0.5 * limit < found <= 1.001 * limit


@pytest.mark.slow
def test_more_error_means_more_zeros() -> None:
    model = products()
    given = samples(model, 3)
    found = [zeros_in(pruned(replace(DENSE, error=e), model, given)[0]) for e in (0.01, 0.5)]
    assert found[0] < 0.2 and found[-1] > 0.6


@pytest.mark.slow
def test_an_error_that_nothing_keeps_prunes_nothing() -> None:
    model = products()
    after, _ = pruned(replace(DENSE, error=1e-7), model, samples(model, 3))
    assert zeros_in(after) == 0
    assert error(model, after, samples(model, 4, seed=1)) < 1e-3


@pytest.mark.parametrize("pattern", ["1:4", "4x1", "1x8"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_patterns_hold(name: str, pattern: str) -> None:
    model = MODELS[name]()
    one = replace(DENSE, pattern=pattern, layers="uniform")
    after, change = pruned(one, model, samples(model, 2))
    skipped = {skip.node for skip in change.skips}
    assert skipped == ({"u"} if name == "convs" and ":" in pattern else set())
    for weight, array in weights(after).items():
        if weight in skipped:
            continue
        if array.ndim == 4:
            rows = (array != 0).reshape(len(array), array.shape[1], -1)
        elif name == "lstm" and weight in "wr":
            rows = (array != 0).reshape(-1, array.shape[-1], 1)
        else:
            rows = (array != 0 if weight == "v" and name == "products" else array.T != 0)[..., None]
        if ":" in pattern:
            kept, of = map(int, pattern.split(":"))
            groups = rows.reshape(len(rows), -1, of, rows.shape[2]).sum(2)
            assert (groups == kept).all()
            continue
        height, width = map(int, pattern.split("x"))
        flat = rows.reshape(len(rows), -1)
        for top in range(0, len(flat), height):
            for left in range(0, flat.shape[1], width):
                block = flat[top : top + height, left : left + width]
                assert block.all() or not block.any()


# ------------------------------------------------------------------ how well


@pytest.mark.parametrize("name", QUICK)
def test_it_loses_less_than_by_magnitude(name: str) -> None:
    model = MODELS[name]()
    given, held_out = samples(model, 12), samples(model, 4, seed=1)
    errors = {
        one: error(model, pruned(one, model, given)[0], held_out)
        for one in (
            DENSE,
            replace(DENSE, layers="uniform"),
            PruneMagnitude(min_elements=100, form="dense"),
            PruneMagnitude(min_elements=100, form="dense", layers="uniform"),
            PruneMagnitude(min_elements=100, form="dense", refit=False),
        )
    }
    best, even, magnitude, even_magnitude, blind = errors.values()
    assert best < 0.93 * magnitude < 0.93 * blind
    assert best < 0.65 * blind
    assert even < 0.9 * even_magnitude


@cache
def digits() -> tuple[ir.Model, list[Sample], np.ndarray, np.ndarray]:
    """The trained classifier as it is deployed, samples, and other images with labels."""
    images, labels = np.load(DIGITS_CNN_SAMPLES)["image"], np.load(DIGITS_CNN_LABELS)
    given = [{"image": image} for image in images[:64]]
    run = graphopt.optimize(DIGITS_CNN, recipe="basic", samples=given[:8], benchmark=False)
    return run.model, given, images[64:].reshape(-1, 1, 8, 8), labels[64:]


@cache
def logits(one: Pass | None) -> np.ndarray:
    model, given, images, _ = digits()
    after = model if one is None else pruned(one, model, given)[0]
    if one is not None:
        assert zeros_in(after, 256) == pytest.approx(0.85, abs=0.01)
    (found,) = Session(after).run({"image": images}).values()
    return found


@pytest.mark.slow
def test_a_trained_classifier_of_digits_loses_less_than_by_magnitude() -> None:
    """On images that no pass saw: 85 % zeros, by magnitude, refitted, and by importance."""
    passes = {
        "whole": None,
        "blind": PruneMagnitude(sparsity=0.85, refit=False),
        "magnitude": PruneMagnitude(sparsity=0.85),
        "importance": PruneImportance(sparsity=0.85),
    }
    found = {name: logits(one) for name, one in passes.items()}
    labels = digits()[3]
    right = {name: float(np.mean(array.argmax(1) == labels)) for name, array in found.items()}
    errors = {name: float(np.linalg.norm(array - found["whole"])) for name, array in found.items()}

    assert right["whole"] > 0.98 and right["blind"] < 0.5
    assert right["importance"] > 0.92 and right["importance"] >= right["magnitude"]
    assert errors["importance"] < 0.8 * errors["magnitude"] < 0.5 * errors["blind"]


@pytest.mark.slow
def test_a_trained_classifier_of_digits_by_what_is_sure() -> None:
    errors = [
        np.linalg.norm(logits(one) - logits(None))
        for one in (PruneStability(sparsity=0.85), PruneImportance(sparsity=0.85))
    ]
    assert errors[0] < 1.15 * errors[1]
    right = float(np.mean(logits(PruneStability(sparsity=0.85)).argmax(1) == digits()[3]))
    assert right > 0.92


# ------------------------------------------------------------------ what samples can be


@pytest.mark.parametrize("number", [0.0, 1000.0])
@pytest.mark.parametrize(
    "name, count, criterion", [("products", 1, "second-order"), ("convs", 3, "activations")]
)
def test_inputs_that_are_always_the_same(
    name: str, count: int, criterion: str, number: float
) -> None:
    model = MODELS[name]()
    (shape,) = {s["x"].shape for s in samples(model, 1)}
    row = normal(5, *shape[1:]) if number > 2 else np.ones(shape[1:], np.float32)
    given = [{"x": np.repeat(number * row[np.newaxis], 4, 0)}] * count
    after, _ = pruned(replace(DENSE, criterion=criterion), model, given)  # type: ignore[arg-type]
    assert all(np.isfinite(array).all() for array in weights(after).values())
    assert zeros_in(after) >= 0.5
    assert error(model, after, given) < (1e-2 if name == "products" else 0.2)


def test_inputs_that_are_no_numbers_leave_magnitude() -> None:
    model = products()
    given = [{"x": np.full((6, 24), np.nan, np.float32)}] * 3
    for one in (DENSE, replace(DENSE, error=0.1)):
        after, _ = pruned(one, model, given)
        assert all(np.isfinite(array).all() for array in weights(after).values())


def test_channels_that_are_never_other_than_zero_lose_their_weights() -> None:
    model = products()
    given = samples(model, 12)
    for sample in given:
        sample["x"][:, 6:12] = 0  # type: ignore[index]
    after, _ = pruned(DENSE, model, given)
    gone = np.mean(weights(after)["w"] == 0, axis=1)
    assert gone[6:12].mean() > 0.7 > 0.4 > gone[12:].mean()


@pytest.mark.slow
@pytest.mark.parametrize("fill", [0.0, pytest.param(-3.0, marks=pytest.mark.slow)])
def test_weights_of_one_number(fill: float) -> None:
    model = products()
    model.graph.initializers["u"].const_value = ir.tensor(np.full((32, 32), fill, np.float32))
    for one in (DENSE, replace(DENSE, error=0.1)):
        after, _ = pruned(one, model, samples(model, 2))
        assert all(np.isfinite(array).all() for array in weights(after).values())
        if not one.error:
            assert zeros_in(after) >= 0.5


def test_a_weight_that_is_no_number_is_left_alone() -> None:
    model = products()
    broken = normal(2, 16, 32)
    broken[3, 4] = np.nan
    model.graph.initializers["v"].const_value = ir.tensor(broken, name="v")
    after, change = pruned(DENSE, model, samples(model, 4))
    assert [(skip.node, skip.reason) for skip in change.skips] == [
        ("v", "it holds infinity or NaN")
    ]
    np.testing.assert_array_equal(weights(after)["v"], broken)
    assert np.mean(weights(after)["u"] == 0) > 0


def test_sequences_of_any_length() -> None:
    model = lstm()
    rng = np.random.default_rng(0)
    given = [{"x": rng.normal(size=(n, 1 + n % 3, 12)).astype(np.float32)} for n in (1, 9, 4, 17)]
    after, _ = pruned(DENSE, model, given)
    assert zeros_in(after) >= 0.5
    assert error(model, after, given) < 0.4


@pytest.mark.parametrize(
    "node", ["Gemm<alpha = 0.5, beta = 2.0>(x, w, b)", "Gemm<transA = 1>(x, w, b)"]
)
def test_what_cannot_be_looked_at_goes_by_itself(node: str) -> None:
    """Square, so that the wrong axis would fit."""
    model = parse(
        f"agraph (float[32,32] x, float[32,40] w, float[40] b) => (float[A,B] y) {{ y = {node} }}",
        w=normal(0, 32, 40),
        b=normal(1, 40),
    )
    given, held_out = samples(model), samples(model, 4, seed=1)
    blind, _ = pruned(PruneMagnitude(refit=False, form="dense"), model)
    after, _ = pruned(DENSE, model, given)
    assert zeros_in(after) == 0.5
    assert error(model, after, held_out) <= error(model, blind, held_out)
    if "transA" in node:
        np.testing.assert_array_equal(weights(after)["w"], weights(blind)["w"])
    np.testing.assert_array_equal(
        after.graph.initializers["b"].const_value.numpy(),  # type: ignore[union-attr]
        normal(1, 40),
    )


@pytest.mark.parametrize("one", [DENSE, PruneMagnitude(form="dense")], ids=lambda one: one.name)
def test_no_matrix_is_made_of_very_many_inputs(one: Pass) -> None:
    """A product of 30,000 inputs: the moments alone would take 7 GB."""
    model = parse(
        "agraph (float[N,30000] x, float[30000,4] w) => (float[A,B] y) { y = MatMul(x, w) }",
        w=normal(0, 30000, 4),
    )
    tracemalloc.start()
    after, _ = pruned(one, model, [{"x": normal(1, 2, 30000)}] * 2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 << 20
    array, old = weights(after)["w"], weights(model)["w"]
    assert np.mean(array == 0) == 0.5
    np.testing.assert_array_equal(array != 0, np.abs(old) >= np.median(np.abs(old)))


# ------------------------------------------------------------------ before and after other passes

LARGE = """
agraph (float[N,16,6,6] x, float[32,16,3,3] w, float[32,32,3,3] v) => (float[A,B,C,D] y)
{ a = Conv<pads = [1,1,1,1]>(x, w) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, v) }
"""


def large() -> ir.Model:
    return parse(LARGE, w=normal(0, 32, 16, 3, 3, scale=0.2), v=normal(1, 32, 32, 3, 3, scale=0.2))


@pytest.mark.parametrize(
    "later",
    [
        "cluster-weights{clusters=16,keep-zeros=true}",
        pytest.param("quantize-weights", marks=pytest.mark.slow),
        "quantize-static",
        "prune-importance{sparsity=0.7}",
        pytest.param("prune-magnitude{sparsity=0.7,layers=uniform}", marks=pytest.mark.slow),
    ],
)
def test_later_passes_keep_zeros(later: str) -> None:
    model = large()
    given = samples(model, 5)
    run = graphopt.optimize(
        model,
        passes=f"prune-importance{{layers=uniform}},{later}",
        samples=given,
        max_error=0.9,
        benchmark=False,
    )
    first, *others = run.steps
    assert first.kept and all(step.kept for step in others), [s.reason for s in run.steps]
    masks = masks_alone()
    for name, array in stood_for(run.model).items():
        assert array.shape == masks[name].shape
        assert np.mean(array[~masks[name]] != 0) <= (0.02 if "importance" in later else 0), name
        assert np.mean(array[masks[name]] != 0) > (0.35 if "0.7" in later else 0.9)


@cache
def masks_alone() -> dict[str, np.ndarray]:
    """Of what is not zero after the first pass."""
    model = large()
    run = graphopt.optimize(
        model,
        passes="prune-importance{layers=uniform}",
        samples=samples(model, 5),
        max_error=0.9,
        benchmark=False,
    )
    return {name: array != 0 for name, array in stood_for(run.model).items()}


def stood_for(model: ir.Model) -> dict[str, np.ndarray]:
    """The numbers that the weights of Convs come to when the model is loaded, of two Convs."""
    probe = model.clone()
    read = [node.inputs[1] for node in probe.graph if node.op_type == "Conv"]
    assert len(read) == 2
    probe.graph.outputs[:] = read
    infer_shapes(probe)
    session = Session(probe)
    feeds = {i.name or "": np.zeros((1, 16, 6, 6), np.float32) for i in probe.graph.inputs}
    return dict(zip(["w", "v"], session.run(feeds).values(), strict=True))


@pytest.mark.slow
def test_pruned_and_clustered_is_smaller_than_each_alone() -> None:
    model = large()
    sizes = []
    for passes in (
        "prune-importance{sparsity=0.7}",
        "cluster-weights{clusters=16}",
        "prune-importance{sparsity=0.7},cluster-weights{clusters=16,keep-zeros=true}",
    ):
        run = graphopt.optimize(
            model, passes=passes, samples=samples(model, 5), max_error=0.9, benchmark=False
        )
        assert all(step.kept for step in run.steps), [step.reason for step in run.steps]
        sizes.append(stored_bytes(run.model))
    assert sizes[2] < min(sizes[:2])


def test_the_ledger_tells_what_was_done() -> None:
    model = large()
    run = graphopt.optimize(
        model, passes="prune-importance", samples=samples(model, 5), benchmark=False
    )
    (step,) = run.steps
    assert step.kept, step.reason
    assert dict(step.changes) == {
        "weight of Conv pruned": 2,
        "weight stored without its zeros": 2,
    }
    assert stored_bytes(run.model) < 0.6 * stored_bytes(model)


def test_without_samples_it_does_not_run() -> None:
    with pytest.raises(SampleError, match="prune-importance needs samples; give --samples"):
        graphopt.optimize(large(), passes="prune-importance", benchmark=False)


def test_the_same_twice_gives_the_same() -> None:
    model = products()
    first, second = (pruned(DENSE, model, samples(model, 3))[0] for _ in range(2))
    assert canonical(first) == canonical(second)
    for name, array in weights(first).items():
        np.testing.assert_array_equal(array, weights(second)[name])


# ------------------------------------------------------------------ as a pass


def test_milder_forms_come_to_an_end() -> None:
    one: PruneImportance | None = PruneImportance(sparsity=0.5)
    sparsities = []
    while one is not None:
        sparsities.append(one.sparsity)
        one = one.narrow()
    assert sparsities == [0.5, 0.4, 0.3, 0.2, 0.1]
    one, errors = PruneImportance(error=0.04), []
    while one is not None:
        errors.append(one.error)
        one = one.narrow()
    assert errors == [0.04, 0.02, 0.01, 0.005]
    assert PruneImportance(pattern="2:4").narrow() is None


@pytest.mark.parametrize(
    "text, reason",
    [
        ('pattern="2:4",error=0.1', "pattern 2:4 says how many entries stay; leave error away"),
        ("layers=uniform,error=0.1", "an error is spread over layers by loss"),
        ("criterion=magnitude", "second-order"),
        ("sparsity=1.5", "0.99"),
        ("error=-1", "0"),
        ("pattern=3", "'3' is no pattern"),
    ],
)
def test_wrong_options_are_told_in_words(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_passes(f"prune-importance{{{text}}}")


def test_it_tells_how_far_it_is() -> None:
    model, told = convs(), list[str]()
    infer_shapes(model)
    after = model.clone()
    context = Context(
        lambda: model, observer=observer(model, samples(model, 3)), progress=told.append
    )
    DENSE.apply(after, context)
    assert told[-3:] == [f"pruning weight {n} of 3" for n in (1, 2, 3)]
    assert "measuring weight 1 of 3" in told
