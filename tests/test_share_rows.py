"""share-rows: which rows become one, what they share, and what is in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from optimized import kernels
from packed_models import FORMS, READERS, packed_reader

import graphopt
from graphopt.contract import Change, Context, Effect, Sample
from graphopt.encoding import NODES_BYTES, Rows
from graphopt.inspection import inspect_model
from graphopt.operators import all_graphs
from graphopt.packing import is_packed, packed_weights
from graphopt.registry import parse_passes
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    canonical,
    parse,
)
from graphopt_passes.share.near_rows import (
    COMPARED_ROWS_MAXIMUM,
    ROUNDING,
    distinct_rows,
    fit_rows,
    leaders_of,
)
from graphopt_passes.share.share_rows import ShareRows
from graphopt_passes.simplify.fold_constants import FoldConstants

GEMM = "agraph (float[4,64] x, float[1] w) => (float[4,N] y) { y = Gemm<transB = 1>(x, w) }"
CONV = "agraph (float[1,16,6,6] x, float[1] w) => (float[1,32,4,4] y) { y = Conv(x, w) }"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def alike(seed: int, kinds: int, rows: int, inputs: int, noise: float = 0.0) -> np.ndarray:
    """Rows that are multiples of few, of either sign, with noise of a share of their norm."""
    rng = np.random.default_rng(seed)
    kind = np.concatenate([np.arange(kinds), rng.integers(0, kinds, rows - kinds)])
    factors = rng.uniform(0.5, 2, (rows, 1)) * rng.choice([-1, 1], (rows, 1))
    exact = factors * normal(seed, kinds, inputs)[kind]
    power = np.linalg.norm(exact, axis=1, keepdims=True) / inputs**0.5
    return np.asarray(exact + noise * power * rng.standard_normal((rows, inputs)), np.float32)


def repeated(seed: int, kinds: int, rows: int, inputs: int) -> np.ndarray:
    """Rows that are equal to one of few."""
    chosen = np.random.default_rng(seed).integers(0, kinds, rows - kinds)
    return normal(seed, kinds, inputs)[np.concatenate([np.arange(kinds), chosen])]


def shared(
    model: ir.Model, given: list[Sample] | None = None, **options: object
) -> tuple[ir.Model, Change]:
    infer_shapes(model)
    after = model.clone()
    context = Context(lambda: model, observer=observer(model, given) if given else None)
    change = ShareRows(**options).apply(after, context)  # type: ignore[arg-type]
    infer_shapes(after)
    return after, change


def constants(model: ir.Model) -> list[np.ndarray]:
    """What nodes read."""
    values = (v for graph in all_graphs(model) for v in graph.initializers.values() if v.uses())
    return [v.const_value.numpy() for v in values if v.const_value is not None]


def unpacked(model: ir.Model) -> ir.Model:
    after = model.clone()
    apply_pass(parse_passes("unpack-weights")[0], after)
    assert not any(packed_weights(after.graph))
    return after


def weight_of(model: ir.Model) -> np.ndarray:
    """What the packed weight stands for, by onnxruntime."""
    tensor = unpacked(model).graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def error(first: ir.Model, second: ir.Model, given: list[Sample]) -> float:
    """The relative L2 error of all outputs."""
    outputs = [
        [np.concatenate([a.ravel() for a in Session(m).run(s).values()]) for s in given]
        for m in (first, second)
    ]
    exact, other = map(np.concatenate, outputs)
    return float(np.linalg.norm(exact - other) / np.linalg.norm(exact))


# ------------------------------------------------------------------ rows


def test_distinct_rows_are_those_that_numpy_finds() -> None:
    matrix = np.float32([[1, 0], [2, 3], [1, -0.0], [2, 3], [0, 0], [-0.0, 0]])
    first, kind = distinct_rows(matrix)

    assert first.tolist() == [0, 1, 4]
    assert kind.tolist() == [0, 1, 0, 1, 2, 2]
    assert np.array_equal(matrix[first][kind], matrix)


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_rows_are_near_their_leaders_and_leaders_are_not_near(
    similarity: float, noise: float
) -> None:
    rows = alike(1, 60, 3000, 12, noise)
    leader = leaders_of(rows, similarity, np.random.default_rng(0))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    leaders = np.unique(leader)
    among = np.abs(units[leaders] @ units[leaders].T) - np.eye(len(leaders))

    assert np.array_equal(leader[leaders], leaders)
    assert np.abs(np.einsum("nk,nk->n", units, units[leader])).min() >= similarity - 2 * ROUNDING
    assert among.max() < similarity + ROUNDING
    assert (len(leaders) == 60) if not noise and similarity > 0.9 else len(leaders) > 1


def test_each_row_joins_the_nearest_leader() -> None:
    rows = np.float32([[1, 0], [0.8, 0.6], [0.97, 0.243], [0, 0], [-2, 0.1], [0, 0]])
    leader = leaders_of(rows, 0.85, np.random.default_rng(0))

    assert leader.tolist() == [0, 1, 0, 3, 0, 5]


def test_very_many_rows_are_found_by_planes() -> None:
    rows = alike(3, 4000, COMPARED_ROWS_MAXIMUM + 4000, 24, 0.05)
    leader = leaders_of(rows, 0.98, np.random.default_rng(0))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    assert np.array_equal(leader[leader], leader)
    assert np.abs(np.einsum("nk,nk->n", units, units[leader])).min() >= 0.98 - 2 * ROUNDING
    assert len(np.unique(leader)) < 1.1 * 4000
    assert np.array_equal(leader, leaders_of(rows, 0.98, np.random.default_rng(0)))


def test_a_group_shares_its_leading_direction() -> None:
    rows, counts = alike(4, 5, 40, 10, 0.2), np.random.default_rng(4).integers(1, 4, 40)
    leader = leaders_of(rows, 0.9, np.random.default_rng(0))
    root = normal(5, 10, 10)
    table, group, factors = fit_rows(rows, rows @ root, counts, leader)
    wrong = np.square((factors[:, np.newaxis] * table[group] - rows) @ root).sum(axis=1)

    assert any(np.sum(leader == one) > 3 for one in leader)
    for one in np.unique(leader):
        of = leader == one
        values = np.linalg.svd(np.sqrt(counts[of, np.newaxis]) * rows[of] @ root, compute_uv=False)
        assert counts[of] @ wrong[of] == pytest.approx(np.square(values[1:]).sum(), 1e-2, 1e-9)
        if of.sum() == 1:
            assert np.array_equal(table[group[of]], rows[of])
            assert factors[of] == 1


# ------------------------------------------------------------------ what is written


def test_equal_filters_are_stored_once() -> None:
    weight = repeated(0, 8, 32, 144).reshape(32, 16, 3, 3)
    first, index = distinct_rows(weight.reshape(32, -1))
    table = weight[first]
    model = parse(CONV, w=weight)
    expected = parse(
        CONV.replace("float[1] w", "float[8,16,3,3] t, uint8[32] i").replace(
            "y =", "n = Cast<to = 6>(i) w = Gather(t, n) y ="
        ),
        t=table,
        i=index.astype(np.uint8),
    )
    before = model.clone()
    change = assert_rewrites(ShareRows(), model, expected)
    assert_equivalent(before, model, Effect.EXACT)

    assert change.counts == {"weight of Conv stored as shared rows": 1}
    assert change.notes == ["32 rows stored as 8"]


def test_filters_that_are_multiples_have_factors() -> None:
    weight = alike(1, 8, 32, 144).reshape(32, 16, 3, 3)
    model = parse(CONV, w=weight)
    after, _ = shared(model, similarity=1.0)

    assert [n.op_type for n in after.graph] == ["Cast", "Gather", "Mul", "Conv"]
    assert sorted(a.shape for a in constants(after)) == [(8, 16, 3, 3), (32,), (32, 1, 1, 1)]
    assert np.abs(weight_of(after) - weight).max() < 1e-5 * np.abs(weight).max()
    assert_equivalent(model, after, Effect.ROUNDING)


def test_near_rows_are_as_near_as_numpy_can_bring_them() -> None:
    weight = alike(2, 10, 100, 64, 0.1)
    after, _ = shared(parse(GEMM, w=weight), similarity=0.95)
    found = weight_of(after)
    leader = leaders_of(weight, 0.95, np.random.default_rng(0))
    least = sum(
        np.square(np.linalg.svd(weight[leader == one], compute_uv=False)[1:]).sum()
        for one in np.unique(leader)
    )

    assert len(np.unique(leader)) == 10
    assert np.square(found - weight).sum() == pytest.approx(least, 1e-3)


@pytest.mark.parametrize("rows", [40, 300])
def test_the_index_is_as_narrow_as_it_can_be(rows: int) -> None:
    model = parse(GEMM, w=repeated(3, rows - 8, rows + 600, 64))
    after, _ = shared(model)
    (index,) = (a for a in constants(after) if a.ndim == 1)

    assert index.dtype == (np.uint8 if rows <= 256 else np.uint16)
    assert_equivalent(model, after, Effect.EXACT)


@pytest.mark.parametrize("kind", ["float16", "double"])
@pytest.mark.parametrize("noise", [None, 0.02])
def test_other_types_stay_what_they_are(kind: str, noise: float | None) -> None:
    weight = repeated(4, 16, 128, 64) if noise is None else alike(4, 16, 128, 64, noise)
    dtype = {"float16": np.float16, "double": np.float64}[kind]
    weight = weight.T.astype(dtype)
    text = f"agraph ({kind}[4,64] x, {kind}[1] w) => ({kind}[4,N] y) {{ y = MatMul(x, w) }}"
    model = parse(text, w=weight)
    after, change = shared(model)

    assert change.notes == ["128 rows stored as 16"]
    assert max(constants(after), key=lambda a: a.size).dtype == dtype
    assert weight_of(after).dtype == dtype
    wrong = np.abs(weight_of(after) - weight).max()
    assert wrong == 0 if noise is None else 0 < wrong < 0.5
    Session(after)


def test_samples_tell_what_matters() -> None:
    """Inputs that are zero in all samples, and noise in these, hide that rows are multiples."""
    weight = alike(5, 12, 96, 64)
    weight[:, 32:] += normal(6, 96, 32)
    given: list[Sample] = [{"x": normal(s, 4, 64) * (np.arange(64) < 32)} for s in range(30)]
    model = parse(GEMM, w=weight)
    blind, seeing = shared(model), shared(model, given[:20])

    assert not blind[1]
    assert seeing[1].notes == ["96 rows stored as 12"]
    assert error(model, seeing[0], given[20:]) < 0.05


def test_channels_of_a_depthwise_conv() -> None:
    """Each has inputs of its own; those of one are always zero."""
    weight = alike(8, 10, 80, 25, 0.02).reshape(80, 1, 5, 5)
    text = "agraph (float[1,80,9,9] x, float[1] w) => (float[1,80,5,5] y)"
    model = parse(f"{text} {{ y = Conv<group = 80>(x, w) }}", w=weight)
    lively = (np.arange(80) != 3)[:, np.newaxis, np.newaxis]
    given: list[Sample] = [{"x": lively * normal(s, 1, 80, 9, 9)} for s in range(20)]
    after, change = shared(model, given[:12])

    assert change.notes == ["80 rows stored as 10"]
    assert 0 < error(model, after, given[12:]) < 0.03


def test_inputs_that_are_always_zero() -> None:
    model = parse(GEMM, w=alike(1, 16, 96, 64))
    after, change = shared(model, [{"x": np.zeros((4, 64), np.float32)}])

    assert change.notes == ["96 rows stored as 16"]
    assert_equivalent(model, after)


def test_the_bias_takes_back_the_means() -> None:
    weight = alike(7, 12, 96, 64, 0.15)
    model = parse(GEMM, w=weight)
    given: list[Sample] = [{"x": normal(s, 4, 64) + 2} for s in range(40)]
    (blind, _), (seeing, _) = (shared(model, g, similarity=0.9) for g in (None, given[:30]))

    assert error(model, seeing, given[30:]) < 0.7 * error(model, blind, given[30:])
    means = [
        np.mean([next(iter(Session(m).run(s).values())) for s in given[:30]], axis=(0, 1))
        for m in (model, seeing)
    ]
    assert np.abs(means[0] - means[1]).max() < 1e-3


def test_equal_rows_alone_where_factors_would_take_more() -> None:
    """Two rows that are multiples save less than 4 bytes for each of 512 rows."""
    weight = repeated(8, 256, 512, 64)
    weight[7] = 2 * weight[6]
    after, change = shared(parse(GEMM, w=weight))

    assert "Mul" not in [n.op_type for n in after.graph]
    assert np.array_equal(weight_of(after), weight)
    assert change


@pytest.mark.parametrize("reader", READERS)
def test_every_reader(reader: str) -> None:
    """Weights of every place in a model, with rows of either axis repeated."""
    model = packed_reader(reader, FORMS["16 levels"])
    apply_pass(parse_passes("unpack-weights")[0], model)
    for graph in all_graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None and value.const_value.size >= 1024:
                array = value.const_value.numpy()
                for axis, size in enumerate(array.shape[-4:2]):
                    array = np.take(array, np.arange(size) % max(size // 4, 1), axis)
                value.const_value = ir.tensor(array, name=name)
    before = model.clone()
    change = apply_pass(ShareRows(similarity=1.0), model)

    assert change, change.skips
    assert_equivalent(before, model)
    kept = graphopt.optimize(model, recipe="basic", validate=False, benchmark=False).model
    assert sum(1 for g in all_graphs(kept) for _ in packed_weights(g)) > 0
    assert max(a.size for a in constants(kept)) == max(a.size for a in constants(model))
    assert_equivalent(before, kept)


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (normal(0, 64, 64), "no two of its rows are alike"),
        (repeated(0, 127, 128, 64), "1 of its 128 rows could go, which saves no bytes"),
        (np.full((64, 64), np.nan, np.float32), "it holds infinity or NaN"),
    ],
    ids=["unlike", "few", "NaN"],
)
def test_weights_that_stay(weight: np.ndarray, reason: str) -> None:
    change = assert_unchanged(ShareRows(), parse(GEMM, w=weight))

    assert [skip.reason for skip in change.skips] == [reason]


def test_small_weights_stay() -> None:
    assert_unchanged(ShareRows(min_elements=4097), parse(GEMM, w=repeated(0, 4, 64, 64)))


def test_two_readers_and_a_body_of_an_if() -> None:
    model = parse(
        """
        agraph (float[4,64] x, bool c, float[1] w) => (float[4,64] y)
        {
            a = MatMul(x, w) b = MatMul(a, w)
            y = If(c) <then_branch = then () => (float[4,64] t) { t = MatMul(b, w) },
                       else_branch = other () => (float[4,64] e) { e = Relu(b) }>
        }
        """,
        w=repeated(1, 16, 64, 64).T / 8,
    )
    after, change = shared(model)

    assert change.counts.total() == 1
    assert len(constants(after)) == 2
    assert_equivalent(model, after)


def test_a_weight_that_a_caller_can_override_stays() -> None:
    model = parse(GEMM, w=repeated(0, 4, 64, 64))
    model.graph.inputs.append(model.graph.initializers["w"])

    assert_unchanged(ShareRows(), model)


def test_rows_of_several_axes_stay() -> None:
    model = parse(
        "agraph (float[2,4,64] x, float[1] w) => (float[2,4,32] y) { y = MatMul(x, w) }",
        w=np.ones((2, 64, 32), np.float32),
    )
    change = assert_unchanged(ShareRows(), model)

    assert [skip.reason for skip in change.skips] == ["its rows lie along no single axis"]


def test_it_leaves_what_it_wrote() -> None:
    model = parse(GEMM, w=alike(1, 30, 300, 64, 0.3))
    change = apply_pass(ShareRows(similarity=0.8), model)
    again = assert_unchanged(ShareRows(similarity=0.5), model)

    assert change
    assert [skip.reason for skip in again.skips] == ["it holds shared rows"]


def test_it_leaves_packed_weights() -> None:
    model = parse(GEMM, w=repeated(0, 4, 64, 64))
    apply_pass(parse_passes("quantize-weights{bits=8}")[0], model)
    change = assert_unchanged(ShareRows(), model)

    assert [skip.reason for skip in change.skips] == ["it is stored narrow already"]


def test_an_old_opset_is_refused() -> None:
    model = parse('<ir_version: 8, opset_import: ["" : 12]> ' + GEMM, w=repeated(0, 4, 64, 64))

    assert ShareRows().refuse(model, Context(lambda: model)) is not None


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((64, 64), np.float32),
        np.ones((64, 64), np.float32),
        np.where(np.arange(64)[:, np.newaxis] < 3, normal(0, 64, 64), -0.0).astype(np.float32),
        1e38 * np.sign(repeated(0, 4, 64, 64)),
        1e-42 * np.sign(repeated(0, 4, 64, 64)),
    ],
    ids=["zeros", "ones", "pruned rows", "huge", "subnormal"],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_numbers_at_the_edge(weight: np.ndarray) -> None:
    model = parse(GEMM, w=weight.astype(np.float32))
    after, change = shared(model)

    assert change
    assert np.array_equal(weight_of(after), weight.astype(np.float32))


# ------------------------------------------------------------------ file and other passes


def test_the_file_is_smaller_by_what_was_claimed(tmp_path: Path) -> None:
    weight = alike(9, 40, 400, 64, 0.05)
    text = GEMM.replace("w) =>", "w, float[1] b) =>").replace("x, w)", "x, w, b)")
    model = parse(text, w=weight, b=normal(0, 400))
    run = graphopt.optimize(model, passes="share-rows", benchmark=False, max_error="0.1")
    run.save(tmp_path / "after.onnx")
    graphopt.save(model, tmp_path / "before.onnx")
    saved = (tmp_path / "before.onnx").stat().st_size - (tmp_path / "after.onnx").stat().st_size

    assert run.steps[0].verdict == "kept"
    claimed = weight.nbytes - (40 * 64 * 4 + 400 + 400 * 4)
    assert claimed - 2 * NODES_BYTES <= saved <= claimed

    read = graphopt.load(tmp_path / "after.onnx")
    (packed,) = inspect_model(read).packed
    assert any(is_packed(o) for node in read.graph for o in node.outputs)
    assert (packed.name, packed.shape, packed.widened) == ("w", (400, 64), "at load")
    assert packed.stored_bytes == 40 * 64 * 4 + 400 + 400 * 4
    assert packed.bits_per_weight == pytest.approx(8 * packed.stored_bytes / weight.size)
    assert packed.memory_bytes == weight.nbytes
    assert (packed.levels, packed.code_bits) == (None, None)


@pytest.mark.parametrize("rows", [20, 600])
def test_inspect_sees_every_width_of_the_index(rows: int) -> None:
    after, _ = shared(parse(GEMM, w=repeated(0, rows // 2 + 1, rows, 64)))
    (packed,) = inspect_model(after).packed
    width = 1 if rows < 500 else 2

    assert packed.stored_bytes == (rows // 2 + 1) * 64 * 4 + width * rows


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_onnxruntime_makes_the_weight_when_it_loads_the_model(
    kind: str, noise: float, tmp_path: Path
) -> None:
    weight = alike(4, 16, 128, 64, noise) if noise else repeated(4, 16, 128, 64)
    text = f"agraph ({kind}[4,64] x, {kind}[1] w) => ({kind}[4,128] y) {{ y = MatMul(x, w) }}"
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[kind]
    model = parse(text, w=weight.T.astype(dtype))
    after, change = shared(model)

    assert change
    assert kernels(after, tmp_path) == kernels(model, tmp_path)


def test_unpacking_gives_the_weight_back() -> None:
    weight = repeated(1, 20, 60, 64)
    model = parse(GEMM, w=weight)
    before = canonical(model)
    for name in ("share-rows", "unpack-weights", "drop-unused"):
        apply_pass(parse_passes(name)[0], model)

    assert canonical(model) == before
    assert np.array_equal(constants(model)[0], weight)


@pytest.mark.parametrize(
    "behind",
    [
        "cluster-weights{clusters=16}",
        "cluster-weights{bits=4.0}",
        "quantize-weights{bits=8}",
        "quantize-weights{bits=4}",
        "quantize-weights{average-bits=5.0}",
        "quantize-weights{form=kernel,bits=4}",
        "quantize-binary",
        "quantize-dynamic",
        "quantize-static",
        "convert-numbers{format=float16}",
        "convert-numbers{format=float8e4m3fn}",
        "equalize-layers",
        "smooth-activations",
    ],
)
def test_other_passes_come_behind(behind: str) -> None:
    text = """
    agraph (float[4,64] x, float[1] w, float[1] v) => (float[4,96] y)
    { a = Gemm<transB = 1>(x, w) r = Relu(a) y = Gemm<transB = 1>(r, v) }
    """
    model = parse(text, w=alike(1, 24, 160, 64, 0.02), v=normal(2, 96, 160) / 8)
    given: list[Sample] = [{"x": normal(seed, 4, 64)} for seed in range(24)]
    run = graphopt.optimize(
        model,
        passes=f"share-rows{{min-elements=64}},{behind}",
        samples=given,
        benchmark=False,
        max_error="0.9",
    )
    first, second = run.steps[0], run.steps[1]

    assert first.verdict == "kept"
    assert second.verdict in ("kept", "unchanged", "refused"), second.reason
    assert second.bytes_after <= second.bytes_before + 1000
    basic = graphopt.optimize(run.model, recipe="basic", samples=given, benchmark=False)
    assert basic.optimized.stored_bytes <= run.optimized.stored_bytes + 200


@pytest.mark.parametrize(
    "behind",
    ["cluster-weights{clusters=16,min-elements=64}", "quantize-weights{bits=8,min-elements=64}"],
)
@pytest.mark.parametrize("rows", [48, 160])
def test_shared_rows_are_made_narrow_behind(behind: str, rows: int) -> None:
    """And stay so, also where the index is of few rows."""
    model = parse(GEMM, w=alike(1, rows // 4, rows, 64, 0.02))
    after = model.clone()
    first = apply_pass(ShareRows(), after)
    shared_bytes = sum(a.nbytes for a in constants(after))
    second = apply_pass(parse_passes(behind)[0], after)
    narrow_bytes = sum(a.nbytes for a in constants(after))
    apply_pass(FoldConstants(), after)
    given: list[Sample] = [{"x": normal(seed, 4, 64)} for seed in range(4)]
    (packed,) = inspect_model(after).packed

    assert first and second
    assert narrow_bytes < 0.6 * shared_bytes
    # A few scales of float16 may be widened.
    assert sum(a.nbytes for a in constants(after)) <= narrow_bytes + 2 * rows // 4
    assert error(model, after, given) < 0.15
    assert packed.shape == (rows, 64)
    assert packed.stored_bytes == sum(a.nbytes for a in constants(after))
    assert error(after, unpacked(after), given) < 1e-6


# ------------------------------------------------------------------ options


def test_over_budget_it_comes_nearer_to_one() -> None:
    found, current = [], ShareRows()
    while current is not None:
        found.append(current.similarity)
        current = current.narrow()  # type: ignore[assignment]

    assert found == [0.98, 0.99, 0.995, 0.9975, 0.99875, 1.0]


def test_a_budget_narrows_it() -> None:
    weight = alike(3, 100, 400, 64, 0.15)
    weight[300:] = weight[:100]
    run = graphopt.optimize(
        parse(GEMM, w=weight),
        passes="share-rows{similarity=0.9}",
        benchmark=False,
        max_error="0.001",
    )
    (step,) = run.steps

    assert step.verdict == "kept"
    assert step.spec == "share-rows{similarity=0.9875}"
    *wider, last = step.notes
    assert last == "400 rows stored as 300"
    assert [note.split(" was rolled back")[0] for note in wider] == [
        f"share-rows{{similarity={similarity}}}" for similarity in (0.9, 0.95, 0.975)
    ]


def test_shared_rows_that_do_not_fit() -> None:
    table, index = np.ones((2, 3), np.float32), np.array([0, 1, 1])
    assert Rows(table, index, 0, np.ones(3, np.float32)).shape == (3, 3)
    for wrong in (
        (table, np.array([0, 2]), 0, None),
        (table, np.array([-1, 0]), 0, None),
        (table, index[:0], 0, None),
        (table, index, 2, None),
        (table, index, 0, np.ones(2, np.float32)),
    ):
        with pytest.raises(ValueError, match=r"index|axis|scales"):
            Rows(*wrong)
