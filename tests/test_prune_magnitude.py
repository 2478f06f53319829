"""Which numbers become zero, how many, what is left alone, and how the rest is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from on_codes import normal
from pruned_models import MODELS, convs, error, lstm, products, pruned, samples, weights
from pruned_models import share_of_zeros as zeros_in

import graphopt
from graphopt.contract import Context
from graphopt.errors import SpecError
from graphopt.packing import packed_weights
from graphopt.registry import parse_passes
from graphopt.runtime import Reference, Session
from graphopt.saving import stored_bytes
from graphopt.testing import canonical, parse
from graphopt_passes.prune.masks import erk, lamp
from graphopt_passes.prune.prune_magnitude import PruneMagnitude

BLIND = PruneMagnitude(min_elements=100, refit=False, form="dense")
"""Without samples, and stored as before."""

LARGE = """
agraph (float[N,64] x, float[64,96] w, float[96,64] v) => (float[A,B] y)
{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }
"""


def large() -> ir.Model:
    return parse(LARGE, w=normal(0, 64, 96), v=normal(1, 96, 64))


# ------------------------------------------------------------------ which become zero


def test_the_smallest_numbers_become_zero_and_others_stay() -> None:
    product = "agraph (float[2,4] x) => (float[2,3] y) <float[4,3] w = {%s}> { y = MatMul(x, w) }"
    before = product % "1, -8, 3, -4, 5, 6, -7, 2, 9, 10, -11, 12"
    after = product % "0, -8, 0, 0, 0, 6, -7, 0, 9, 10, -11, 12"
    one = PruneMagnitude(sparsity=5 / 12, min_elements=1)
    model, change = pruned(one, parse(before))
    assert canonical(model) == canonical(parse(after))
    assert change.counts == {"weight of MatMul pruned": 1}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("layers", ["lamp", "uniform", "global", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.9, 0.99])
def test_so_many_numbers_become_zero(sparsity: float, layers: str, name: str) -> None:
    model = MODELS[name]()
    after, change = pruned(replace(BLIND, layers=layers, sparsity=sparsity), model)
    old, new = weights(model), weights(after)
    sizes = [array.size for array in old.values()]

    assert change.counts.total() == len(old) == 3 and not change.skips
    left = sum(map(np.count_nonzero, new.values()))
    assert left == round(sum(sizes) * (1 - sparsity))
    for weight, array in old.items():
        stays = new[weight] != 0
        np.testing.assert_array_equal(new[weight][stays], array[stays])
        assert not np.signbit(new[weight][~stays]).any()
        largest = np.abs(array[~stays]).max(initial=0)
        assert np.abs(array[stays]).min(initial=np.inf) >= largest
        if layers == "uniform":
            assert abs(stays.mean() - (1 - sparsity)) < 2 / array.size


@pytest.mark.parametrize("layers", ["lamp", "global", "erk"])
def test_how_they_are_spread(layers: str) -> None:
    """Against the rules themselves, on all scores at once."""
    model = convs()
    after, _ = pruned(replace(BLIND, layers=layers), model)
    old, new = weights(model), weights(after)
    keep = round(sum(array.size for array in old.values()) / 2)
    if layers == "global":
        every = np.sort(np.abs(np.concatenate([array.ravel() for array in old.values()])))
        counts = [int((np.abs(array) >= every[-keep]).sum()) for array in old.values()]
    elif layers == "lamp":
        counts = lamp(list(old.values()), keep).tolist()
    else:
        counts = erk([array.shape for array in old.values()], keep).tolist()
    assert [np.count_nonzero(new[name]) for name in old] == counts
    assert len({round(count / old[n].size, 2) for n, count in zip(old, counts, strict=True)}) > 1


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_of_each_so_many_input_channels_so_many_stay(form: str, given: bool) -> None:
    model = convs()
    one = PruneMagnitude(pattern="2:4", min_elements=100, form=form)  # type: ignore[arg-type]
    after, change = pruned(one, model, samples(model) if given else None)
    found = weights(after)

    assert (found["w"].reshape(16, 2, 4, 9) != 0).sum(2).tolist() == [[[2] * 9] * 2] * 16
    assert (found["v"].reshape(12, 4, 4) != 0).sum(2).tolist() == [[2] * 4] * 12
    assert found["u"].all()
    (skip,) = change.skips
    assert (skip.node, skip.reason) == ("u", "its 1 input channels are no multiple of 4")


@pytest.mark.parametrize("weight", ["w", "r"])
def test_patterns_of_recurrent_weights_are_along_their_inputs(weight: str) -> None:
    model = lstm()
    after, _ = pruned(replace(BLIND, pattern="1:4"), model, samples(model))
    array = weights(after)[weight]
    groups = (array.reshape(*array.shape[:2], -1, 4) != 0).sum(3)
    assert (groups == 1).all()


def test_of_a_matmul_channels_are_rows() -> None:
    after, _ = pruned(replace(BLIND, pattern="2:4"), products())
    assert ((weights(after)["w"].reshape(6, 4, 32) != 0).sum(1) == 2).all()
    # Of a transposed Gemm they are columns.
    assert ((weights(after)["v"].reshape(16, 8, 4) != 0).sum(2) == 2).all()


@pytest.mark.parametrize("given", [False, True])
def test_blocks_stay_or_go_together(given: bool) -> None:
    model = products()
    one = PruneMagnitude(pattern="4x2", sparsity=0.7, min_elements=100, form="dense")
    after, _ = pruned(one, model, samples(model) if given else None)
    found = weights(after)
    for name, array in (("w", found["w"].T), ("u", found["u"].T), ("v", found["v"])):
        blocks = array.reshape(array.shape[0] // 4, 4, array.shape[1] // 2, 2)
        assert set((blocks != 0).sum((1, 3)).ravel()) <= {0, 8}, name
    assert zeros_in(after) == pytest.approx(0.7, abs=3 * 8 / 2304)


# ------------------------------------------------------------------ what is left alone


def test_what_is_left_alone_says_why() -> None:
    text = """
        agraph (int64[N] i, float[N,64] x, float16[N,64] z, bool q, float[64,64] given,
                float[80,64] table, float16[64,64] half, float[64,64] w,
                float[64,64] added, float[64,64] nan, float[64,1] small)
            => (float[A,B] y, float16[C,D] h)
        {
            e = Gather(table, i) f = Add(e, x) a = MatMul(f, w) g = MatMul(a, given)
            s = Add(g, added) o = MatMul(s, nan) m = MatMul(o, small) k = Add(o, m)
            h = MatMul(z, half)
            y = If (q) <
                then_branch = t () => (float[N,64] p) <float[64,64] inner = {INNER}> {
                    p = MatMul(k, inner)
                },
                else_branch = e () => (float[N,64] n) { n = Neg(k) }
            >
        }
    """.replace("float[N,64] x,", "float[64,64] x,").replace("int64[N] i", "int64[64] i")
    text = text.replace("INNER", ",".join(f"{number:.3f}" for number in normal(3, 4096)))
    broken = normal(6, 64, 64)
    broken[3, 5] = np.nan
    model = parse(
        text,
        table=normal(0, 80, 64),
        half=normal(1, 64, 64).astype(np.float16),
        w=normal(2, 64, 64),
        added=normal(4, 64, 64),
        nan=broken,
        small=normal(5, 64, 1),
    )
    default = next(v for v in model.graph.inputs if v.name == "given")
    default.const_value = ir.tensor(normal(7, 64, 64), name="given")
    model.graph.register_initializer(default)
    after, change = pruned(PruneMagnitude(form="dense"), model)

    assert {skip.node: skip.reason for skip in change.skips} == {
        "table": "it is a table whose rows are looked up",
        "half": "it is float16; widen-halves or unpack-weights makes it float32",
        "inner": "it is in the body of an If, Loop or Scan, which is not looked into",
        "added": "Add reads it, and not as a weight",
        "nan": "it holds infinity or NaN",
    }
    assert change.counts == {"weight of MatMul pruned": 1}
    for name, value in model.graph.initializers.items():
        now = after.graph.initializers[name]
        assert (now.const_value is value.const_value) == (name != "w"), name
    assert np.mean(weights(after)["w"] == 0) == 0.5


def test_a_table_that_is_a_product_too_is_pruned() -> None:
    text = """
        agraph (int64[N] i, float[64,48] w) => (float[A,B] y)
        { e = Gather(w, i) t = Transpose<perm = [1,0]>(w) y = MatMul(e, t) }
    """
    model = parse(text, w=normal(0, 64, 48))
    ids = [{"i": np.random.default_rng(s).integers(0, 64, 9)} for s in range(6)]
    for given in (None, ids):
        after, change = pruned(PruneMagnitude(form="dense"), model, given)
        assert change.counts.total() == 1 and not change.skips
        assert zeros_in(after) == 0.5


def test_a_weight_with_two_readers_is_pruned_once() -> None:
    text = """
        agraph (float[N,48] x, float[48,48] w) => (float[A,B] y)
        { a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) }
    """
    model = parse(text, w=normal(0, 48, 48, scale=0.2))
    given, held_out = samples(model), samples(model, 4, seed=1)
    blind, _ = pruned(BLIND, model)
    seen, change = pruned(replace(BLIND, refit=True), model, given)
    assert change.counts == {"weight of MatMul pruned": 1}
    assert zeros_in(seen) == zeros_in(blind) == 0.5
    assert error(model, seen, held_out) < 0.9 * error(model, blind, held_out)


def test_too_small_weights_stay() -> None:
    model = convs()
    after, change = pruned(replace(BLIND, min_elements=150), model)
    assert change.counts == {"weight of Conv pruned": 2}
    np.testing.assert_array_equal(weights(after)["u"], weights(model)["u"])
    nothing, change = pruned(replace(BLIND, min_elements=5000), model)
    assert not change and canonical(nothing) == canonical(model)


@pytest.mark.parametrize("fill", [0.0, -3.0])
def test_weights_of_one_number(fill: float) -> None:
    model = products()
    model.graph.initializers["u"].const_value = ir.tensor(np.full((32, 32), fill, np.float32))
    for given in (None, samples(model)):
        after, _ = pruned(replace(BLIND, refit=True), model, given)
        assert zeros_in(after) >= 0.5
        assert all(np.isfinite(array).all() for array in weights(after).values())


def test_double_weights_stay_double() -> None:
    model = parse(
        "agraph (double[N,24] x, double[24,32] w) => (double[A,B] y) { y = MatMul(x, w) }",
        w=normal(0, 24, 32).astype(np.float64),
    )
    after, _ = pruned(replace(BLIND, refit=True), model)
    array = weights(after)["w"]
    assert array.dtype == np.float64 and np.mean(array == 0) == 0.5
    np.testing.assert_array_equal(array[array != 0], weights(model)["w"][array != 0])


# ------------------------------------------------------------------ what samples add


@pytest.mark.parametrize("name", sorted(MODELS))
def test_samples_refit_what_stays(name: str) -> None:
    model = MODELS[name]()
    given, held_out = samples(model), samples(model, 4, seed=1)
    blind, _ = pruned(BLIND, model, given)
    seen, _ = pruned(replace(BLIND, refit=True), model, given)

    assert error(model, seen, held_out) < 0.8 * error(model, blind, held_out)
    for weight, array in weights(seen).items():
        # Which stay is as it was without.
        np.testing.assert_array_equal(array != 0, weights(blind)[weight] != 0)


@pytest.mark.parametrize("count, batch", [(1, 1), (1, 40), (3, 2)])
def test_few_samples_do_no_harm(count: int, batch: int) -> None:
    model = products()
    given, held_out = samples(model, count, batch=batch), samples(model, 6, seed=1)
    blind, _ = pruned(BLIND, model)
    seen, _ = pruned(replace(BLIND, refit=True), model, given)
    assert error(model, seen, held_out) < 1.1 * error(model, blind, held_out)


@pytest.mark.parametrize("number", [0.0, 2.0, 1000.0, np.nan])
def test_inputs_that_are_always_the_same(number: float) -> None:
    model = products()
    given = [{"x": np.full((6, 24), number, np.float32)}] * 3
    after, _ = pruned(replace(BLIND, refit=True), model, given)
    assert zeros_in(after) == 0.5
    assert all(np.isfinite(array).all() for array in weights(after).values())
    if np.isfinite(number):
        assert error(model, after, given) < 1e-4


def test_weights_are_not_written_over() -> None:
    model = products()
    kept = {name: array.copy() for name, array in weights(model).items()}
    pruned(PruneMagnitude(min_elements=100), model, samples(model))
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, kept[name])


# ------------------------------------------------------------------ how it is stored


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_zeros_take_a_bit_or_less(sparsity: float, tmp_path: Path) -> None:
    model = large()
    run = graphopt.optimize(
        model,
        passes=str(PruneMagnitude(sparsity=sparsity)),
        samples=samples(model, 12),
        max_error=2.0,
        benchmark=False,
    )
    (step,) = run.steps
    assert step.verdict == "kept", step.reason
    run.save(tmp_path / "pruned.onnx")
    entries = 2 * 64 * 96
    size = (tmp_path / "pruned.onnx").stat().st_size
    stored = entries * (1 - sparsity) * 4
    assert stored < size < stored + entries / 8 + 4000
    assert sum(1 for _ in packed_weights(run.model.graph)) == 2
    session = ort.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    (sample,) = samples(model, 1, seed=3)
    (found,) = session.run(None, dict(sample))
    (wanted,) = Session(run.model, Reference.AS_WRITTEN).run(sample).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_both_forms_are_the_same_model() -> None:
    model = large()
    packed, change = pruned(PruneMagnitude(), model)
    dense, other = pruned(PruneMagnitude(form="dense"), model)
    assert change.counts["weight stored without its zeros"] == 2
    assert "weight stored without its zeros" not in other.counts
    assert stored_bytes(packed) < 0.6 * stored_bytes(dense)
    for name, array in weights(dense).items():
        np.testing.assert_array_equal(weights(packed)[name], array)
    assert not any(packed_weights(dense.graph))


@pytest.mark.parametrize("given", [False, True])
def test_numbers_of_float16_take_two_bytes(given: bool) -> None:
    model = large()
    given_samples = samples(model) if given else None
    after, _ = pruned(PruneMagnitude(numbers="float16"), model, given_samples)
    entries = 2 * 64 * 96
    for array in weights(after).values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, array.astype(np.float16).astype(np.float32))
    assert stored_bytes(after) < entries * (0.5 * 2 + 1 / 8) + 3500
    wide, _ = pruned(PruneMagnitude(), model, given_samples)
    held_out = samples(model, 4, seed=1)
    assert error(wide, after, held_out) < 2e-3


def test_an_old_opset_is_refused_when_packed() -> None:
    model = large()
    model.opset_imports[""] = 11
    context = Context(lambda: model)
    reason = PruneMagnitude().refuse(model, context)
    assert reason is not None and "opset" in reason
    assert PruneMagnitude(form="dense").refuse(model, context) is None


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("given", [False, True])
def test_pruned_twice_zeros_stay_zero(given: bool, form: str) -> None:
    model = large()
    seen = samples(model) if given else None
    one = PruneMagnitude(form=form, layers="uniform")  # type: ignore[arg-type]
    half, _ = pruned(one, model, seen)
    more, change = pruned(replace(one, sparsity=0.7), half, seen)
    assert change.counts["weight of MatMul pruned"] == 2
    for name, array in weights(more).items():
        assert not array[weights(half)[name] == 0].any()
    assert zeros_in(more) == pytest.approx(0.7, abs=1e-4)


def test_what_is_packed_stays_packed_where_nothing_is_pruned() -> None:
    half, _ = pruned(PruneMagnitude(), large())
    same, change = pruned(PruneMagnitude(min_elements=10**6), half)
    assert not change
    # Names that count on aside.
    assert abs(stored_bytes(same) - stored_bytes(half)) < 50


# ------------------------------------------------------------------ as a pass


def test_milder_forms_come_to_an_end() -> None:
    one: PruneMagnitude | None = PruneMagnitude(sparsity=0.55)
    found = []
    while one is not None:
        found.append(one.sparsity)
        one = one.narrow()
    assert found == [0.55, 0.45, 0.35, 0.25, 0.15]
    assert PruneMagnitude(pattern="2:4").narrow() is None
    assert PruneMagnitude(pattern="4x1").narrow() is not None


@pytest.mark.parametrize(
    "text, reason",
    [
        ("sparsity=1", "0.99"),
        ("sparsity=-0.1", "0"),
        ("pattern=half", "'half' is no pattern"),
        ('pattern="4:4"', "keep at least 1 and fewer than all"),
        ("pattern=1x1", "blocks of 1 entries"),
        ("layers=best", "lamp"),
        ("form=sparse", "packed"),
        ("numbers=int8", "float32"),
        ("min-elements=0", "1"),
    ],
)
def test_wrong_options_are_told_in_words(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_passes(f"prune-magnitude{{{text}}}")


@pytest.mark.slow
def test_a_budget_makes_it_milder() -> None:
    model = large()
    run = graphopt.optimize(
        model,
        passes="prune-magnitude{sparsity=0.9}",
        samples=samples(model, 24),
        max_error=0.1,
        benchmark=False,
    )
    (step,) = run.steps
    assert step.kept and step.spec != "prune-magnitude{sparsity=0.9}"
    assert 0 < zeros_in(run.model) < 0.85
    assert error(model, run.model, samples(model, 6, seed=2)) < 0.13


def test_it_tells_how_far_it_is() -> None:
    model, told = products(), list[str]()
    PruneMagnitude(min_elements=100).apply(model, Context(lambda: model, progress=told.append))
    assert told[:3] == [f"pruning weight {n} of 3" for n in (1, 2, 3)]
