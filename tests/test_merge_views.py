from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels

import graphopt
from graphopt import load
from graphopt.contract import Context, Effect
from graphopt.operators import node_count
from graphopt.random_samples import random_samples
from graphopt.saving import save, stored_bytes
from graphopt.skeleton import infer_shapes
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_models.llama import TINY, write_llama
from graphopt_passes.share.lost_fusions import WEIGHT_ONLY
from graphopt_passes.share.merge_views import TOO_LARGE, MergeViews
from graphopt_passes.share.views import BLOCK_ELEMENTS, find_views

ALL = MergeViews(min_bytes=0)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def initializer(array: np.ndarray, name: str = "w") -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))


# ------------------------------------------------------------------ with a node


TIED = """
agraph (int64[N] i, float[B, S, 8] x, float[{table}] w, float[{head}] v)
    => (float[N, 8] e, float[B, S, 12] y)
{{ e = Gather(w, i)  y = MatMul(x, {operand}) }}
"""


def test_a_tied_head_is_made_from_the_embedding() -> None:
    weight = numbers(12, 8)
    before = parse(TIED.format(table="12, 8", head="8, 12", operand="v"), w=weight, v=weight.T)
    after = parse(
        "agraph (int64[N] i, float[B, S, 8] x, float[12, 8] w)"
        " => (float[N, 8] e, float[B, S, 12] y)"
        " { t = Transpose<perm=[1, 0]>(w)  e = Gather(w, i)  y = MatMul(x, t) }",
        w=weight,
    )

    change = assert_rewrites(ALL, before, after)

    assert change.counts == {"initializer made by Transpose": 1}


def test_the_head_is_made_whichever_is_listed_first() -> None:
    weight = numbers(12, 8)
    model = parse(TIED.format(table="12, 8", head="8, 12", operand="v"), v=weight.T, w=weight)

    apply_pass(ALL, model)

    assert list(model.graph.initializers) == ["w"]


READ = "agraph (float[{shape}] x, float[{first}] w, float[{shape}] v) => (float[{first}] a, float[{shape}] b) {{ a = Relu(w)  b = Sub(x, v) }}"  # noqa: E501


def reading(first: np.ndarray, second: np.ndarray) -> ir.Model:
    shapes = {"first": str([*first.shape])[1:-1], "shape": str([*second.shape])[1:-1]}
    return parse(READ.format(**shapes), w=first, v=np.ascontiguousarray(second))


@pytest.mark.parametrize(
    ("view", "operators"),
    [
        (lambda w: w.reshape(6, 20), "Reshape"),
        (lambda w: w.reshape(-1), "Reshape"),
        (lambda w: w.transpose(0, 2, 1), "Transpose"),
        (lambda w: w.transpose(2, 1, 0), "Transpose"),
        (lambda w: w.transpose(2, 0, 1), "Transpose"),
        (lambda w: w[1:3], "Slice"),
        (lambda w: w[3:], "Slice"),
        (lambda w: w[2], "Slice and Reshape"),
        (lambda w: w[:2].reshape(10, 6), "Slice and Reshape"),
    ],
)
def test_forms(view: object, operators: str) -> None:
    weight = numbers(4, 5, 6)
    model = reading(weight, view(weight))  # type: ignore[operator]
    before = model.clone()

    change = apply_pass(ALL, model)

    assert change.counts == {f"initializer made by {operators}": 1}
    assert "v" not in model.graph.initializers
    assert_equivalent(before, model, Effect.EXACT)
    assert not apply_pass(ALL, model)


@pytest.mark.parametrize("permutation", [(0, 2, 3, 1), (3, 2, 0, 1), (1, 0, 2, 3), (3, 1, 2, 0)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint32, np.bool_])
def test_permutations_of_four_axes_and_of_any_type(
    permutation: tuple[int, ...], dtype: type
) -> None:
    array = (numbers(5, 2, 3, 2) * 9).astype(dtype)

    found = find_views([initializer(array), initializer(array.transpose(permutation), "v")])

    if dtype is np.bool_:
        assert len(found) <= 1
        return
    (view,) = found
    assert view.permutation is not None
    np.testing.assert_array_equal(array.transpose(view.permutation), view.value.const_value.numpy())


@pytest.mark.parametrize("place", [0, 1, 77, -1])
@pytest.mark.parametrize(
    "form",
    [lambda w: w.T, lambda w: w.reshape(-1, 4), lambda w: w[3:33], lambda w: w[3:33].ravel()],
)
def test_one_other_bit_keeps_both(place: int, form: object) -> None:
    weight = numbers(40, 32)
    other = np.array(form(weight), order="C")  # type: ignore[operator]
    other.reshape(-1)[place] = np.nextafter(other.reshape(-1)[place], np.float32(9))

    assert_unchanged(ALL, reading(weight, other))


def test_bits_decide() -> None:
    weight = numbers(8, 8)
    weight[0, 1], weight[2, 2], weight[3, 1] = -0.0, np.nan, np.inf
    swapped = weight.T.copy()
    swapped[1, 0] = 0.0

    assert_unchanged(ALL, reading(weight, swapped))
    assert apply_pass(ALL, reading(weight, weight.T))


def test_equal_elements_in_another_order_are_no_view() -> None:
    weight = numbers(6, 6)
    shuffled = weight.T.copy()
    shuffled[[1, 2], 5] = shuffled[[2, 1], 5]

    assert_unchanged(ALL, reading(weight, shuffled))


def test_tables_of_equal_rows_are_given_up() -> None:
    table = np.zeros((100, 8), np.float32)

    assert find_views([initializer(table), initializer(table[:50] + 0, "v")]) == []


def test_small_ones_are_not_worth_a_node() -> None:
    weight = numbers(100, 100)

    assert_unchanged(MergeViews(), reading(weight, weight.T))
    assert apply_pass(MergeViews(min_bytes=40_000), reading(weight, weight.T))


def test_several_views_of_one_and_a_view_of_a_view() -> None:
    weight = numbers(16, 9)
    model = parse(
        "agraph (float[16, 9] w, float[9, 16] a, float[4, 9] b, float[6, 6] c)"
        " => (float[16, 9] y, float[9, 16] z, float[4, 9] u, float[6, 6] v)"
        " { y = Neg(w) z = Neg(a) u = Neg(b) v = Neg(c) }",
        w=weight,
        a=weight.T,
        b=weight[5:9],
        c=weight[5:9].reshape(6, 6),
    )
    before = model.clone()

    apply_pass(ALL, model)

    assert Counter(n.op_type for n in model.graph if n.op_type != "Neg") == {
        "Transpose": 1,
        "Slice": 1,
        "Reshape": 1,
    }
    assert_equivalent(before, model, Effect.EXACT)


def test_types_that_cannot_be_sliced_or_have_no_bytes_are_left() -> None:
    codes = numbers(4, 6)
    for dtype in (ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4):
        model = reading(codes, codes.T)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy().astype(dtype.numpy())
            value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
            value.dtype = dtype
        assert not ALL.apply(model, Context(model.clone))
    texts = parse(
        "agraph (int64 i) => (string[3] y, string[2, 3] z)"
        ' <string[2, 3] s = {"a", "b", "c", "d", "e", "f"},'
        ' string[3, 2] t = {"a", "d", "b", "e", "c", "f"}>'
        " { y = Gather(t, i) z = Identity(s) }"
    )
    assert not ALL.apply(texts, Context(lambda: texts))


@pytest.mark.slow
def test_over_1_gib_a_node_would_run_at_every_inference(tmp_path: Path) -> None:
    """Files with nothing but holes in them, but for a few numbers."""
    rows, columns = 16_400, 16_400
    tensors = []
    for name, places in (("w", [(0, 5), (77, 99)]), ("v", [(5, 0), (99, 77)])):
        with open(tmp_path / name, "wb") as file:
            file.truncate(rows * columns * 4)
            for number, (row, column) in enumerate(places, 1):
                file.seek((row * columns + column) * 4)
                file.write(np.float32(number).tobytes())
        shape = ir.Shape([rows, columns])
        tensors.append(
            ir.ExternalTensor(
                name, 0, rows * columns * 4, ir.DataType.FLOAT,
                shape=shape, name=name, base_dir=tmp_path,
            )
        )  # fmt: skip
    text = (
        "agraph (int64[N] i, float[B, S, 16400] x, float[16400, 16400] w, float[16400, 16400] v)"
        " => (float[N, 16400] e, float[B, S, 16400] y) { e = Gather(w, i)  y = MatMul(x, v) }"
    )
    model = parse(text)
    for tensor in tensors:
        value = next(v for v in model.graph.inputs if v.name == tensor.name)
        model.graph.inputs.remove(value)
        value.const_value = tensor
        model.graph.register_initializer(value)
    infer_shapes(model)

    change = MergeViews().apply(model, Context(lambda: model))

    assert [(skip.node, skip.reason) for skip in change.skips] == [("v", TOO_LARGE)]
    assert not change


def test_outputs_and_overridable_initializers_stay() -> None:
    weight = numbers(6, 4)
    model = reading(weight, weight.T)
    model.graph.outputs.append(model.graph.initializers["v"])
    model.graph.outputs.append(model.graph.initializers["w"])

    change = assert_unchanged(ALL, model)

    assert [skip.reason for skip in change.skips] == ["it is an output of its graph"]
    overridable = reading(weight, weight.T)
    overridable.graph.inputs.append(overridable.graph.initializers["w"])
    assert_unchanged(ALL, overridable)


# ------------------------------------------------------------------ without a node


PRODUCT = """
agraph (int64[N] i, float[M, 8] x, float[12] c, float[12, 8] w, float[{head}] v)
    => (float[N, 8] e, float[M, 12] y)
{{ e = Gather(w, i)  {product} }}
"""


@pytest.mark.parametrize(
    ("product", "shape", "rewritten"),
    [
        ("y = MatMul(x, v)", "8, 12", "y = Gemm<transB=1>(x, w)"),
        ("m = MatMul(x, v) y = Relu(m)", "8, 12", "m = Gemm<transB=1>(x, w) y = Relu(m)"),
        ("y = Gemm<alpha=0.5>(x, v, c)", "8, 12", "y = Gemm<alpha=0.5, transB=1>(x, w, c)"),
    ],
)
def test_a_gemm_transposes_itself(product: str, shape: str, rewritten: str) -> None:
    weight = numbers(12, 8)
    text = PRODUCT.format(head=shape, product=product)
    after = PRODUCT.format(head=shape, product=rewritten).replace(f", float[{shape}] v", "")

    change = assert_rewrites(
        ALL,
        parse(text, w=weight, v=weight.T, c=numbers(12)),
        parse(after, w=weight, c=numbers(12)),
    )

    assert change.counts == {"transposed copy left to Gemm": 1}


def test_a_gemm_that_transposes_no_longer_does() -> None:
    weight = numbers(8, 12)
    text = (
        "agraph (int64[N] i, float[M, 8] x, float[8, 12] w, float[12, 8] v)"
        " => (float[N, 12] e, float[M, 12] y) { e = Gather(w, i) y = Gemm<transB=%d>(x, %s) }"
    )

    assert_rewrites(
        ALL,
        parse(text % (1, "v"), w=weight, v=weight.T),
        parse((text % (0, "w")).replace(", float[12, 8] v", ""), w=weight),
    )


@pytest.mark.parametrize(
    "product",
    [
        "m = MatMul(x, v) y = Add(m, c)",
        "m = MatMul(x, v) y = Mul(m, c)",
        "d = Mul(x, k) y = MatMul(d, v)",
        "m = MatMul(x, v) n = Neg(v) s = ReduceMax<keepdims=0>(n) y = Sub(m, s)",
    ],
    ids=["Add", "Mul after", "Mul before", "another reader"],
)
def test_a_matmul_stays_where_that_is_faster_or_needed(product: str, tmp_path: Path) -> None:
    weight = numbers(12, 8)
    text = PRODUCT.replace("c,", "c, float k,").format(head="8, 12", product=product)
    model = parse(text, w=weight, v=weight.T, c=numbers(12), k=np.float32(0.5))
    before = kernels(model, tmp_path)

    change = apply_pass(ALL, model)

    assert change.counts == {"initializer made by Transpose": 1}
    assert kernels(model, tmp_path) == before


# ------------------------------------------------------------------ at load


def test_what_runs_is_the_same(tmp_path: Path) -> None:
    """The nodes are gone after load, also where the weight is one of a fused Conv."""
    weight = numbers(24, 16, 3, 3)
    model = parse(
        """
        agraph (float[1, 16, 8, 8] x, int64[1] i, float[24, 16, 3, 3] w, float[16, 16, 3, 3] v,
                float[8, 432] r, float[16] c)
            => (float[1, 24, 6, 6] a, float[1, 16, 6, 6] y, float[1, 432] z)
        {
            a = Conv(x, w)
            f = Conv(x, v)
            g = BatchNormalization(f, c, c, c, c)
            y = Relu(g)
            z = Gather(r, i)
        }
        """,
        w=weight,
        v=weight[4:20],
        r=weight.reshape(-1)[: 8 * 432].reshape(8, 432),
        c=np.abs(numbers(16)),
    )
    original, before = model.clone(), kernels(model, tmp_path)

    change = apply_pass(ALL, model)

    assert change.counts.total() >= 1
    assert kernels(model, tmp_path) == before
    assert_equivalent(original, model)


BRANCHES = """
agraph (bool c, float[2, 16, 16] x, int64[1] i, float[24, 16] w) => (float[1, 16] z, float[A, B, C] y)
{
    z = Gather(w, i)
    y = If(c) <
        then_branch = t () => (float[A, B, C] p) <float[1] a = {1.0}> { p = MatMul(x, a) },
        else_branch = e () => (float[A, B, C] q) <float[1] b = {1.0}> { q = MatMul(x, b) }
    >
}
"""  # noqa: E501


def with_branches(main: np.ndarray, first: np.ndarray, second: np.ndarray) -> ir.Model:
    model = parse(BRANCHES, w=main)
    for body, name, array in (("then_branch", "a", first), ("else_branch", "b", second)):
        value = model.graph[1].attributes[body].as_graph().initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        value.shape = ir.Shape(array.shape)
    return model


def test_a_body_makes_its_view_from_the_main_graph(tmp_path: Path) -> None:
    weight = numbers(24, 16)
    model = with_branches(weight, weight.T, numbers(16, 24, seed=1))
    before, loaded = model.clone(), kernels(model, tmp_path)

    change = apply_pass(ALL, model)

    assert change.counts == {"initializer made by Transpose": 1}
    assert kernels(model, tmp_path) == loaded
    assert_equivalent(before, model)


def test_views_of_two_bodies_stay() -> None:
    weight = numbers(16, 16)

    change = assert_unchanged(ALL, with_branches(numbers(24, 16, seed=1), weight, weight.T))

    assert "in a subgraph of its own" in change.skips[0].reason


def test_weights_of_weight_only_products_stay(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-99, 99, (64, 64)).astype(np.int8)
    model = parse(
        """
        agraph (float[2, 3, 64] x, int8[64, 64] w, int8[64, 64] v, float[64] s, float[64] t)
            => (float[2, 3, 64] y, float[2, 3, 64] z)
        {
            a = DequantizeLinear<axis=1>(w, s)  y = MatMul(x, a)
            b = DequantizeLinear<axis=1>(v, t)  z = MatMul(x, b)
        }
        """,
        w=codes,
        v=codes.T,
        s=np.abs(numbers(64)),
        t=np.abs(numbers(64, seed=1)),
    )

    change = assert_unchanged(ALL, model)

    assert [skip.reason for skip in change.skips] == [WEIGHT_ONLY]
    assert kernels(model, tmp_path)["MatMulNBits"] == 2


# ------------------------------------------------------------------ in files


@pytest.mark.parametrize("shape", [(2100, 1030), (3, 1000, 701), (900, 2, 31, 40)])
def test_external_data_is_compared_in_blocks(shape: tuple[int, ...], tmp_path: Path) -> None:
    first = numbers(*shape)
    assert first.size > BLOCK_ELEMENTS
    for permutation in (tuple(range(len(shape)))[::-1], (1, 0, *range(2, len(shape)))):
        second = np.ascontiguousarray(first.transpose(permutation))
        other = second.copy()
        other.reshape(-1)[second.size * 2 // 3] += 1
        assert [v.permutation for v in views_on_disk(tmp_path, first, second)] == [permutation]
        assert views_on_disk(tmp_path, first, other) == []


def test_rows_are_found_in_external_data(tmp_path: Path) -> None:
    first = numbers(3000, 700)
    second = first[1234:2345].copy()

    (view,) = views_on_disk(tmp_path, first, second)

    assert view.rows == (1234, 2345)
    second[700, 3] += 1
    assert views_on_disk(tmp_path, first, second) == []


def views_on_disk(folder: Path, first: np.ndarray, second: np.ndarray) -> list[object]:
    save(reading(first, second), folder / "m.onnx", external_data=True)
    initializers = list(load(folder / "m.onnx").graph.initializers.values())
    assert all(isinstance(value.const_value, ir.ExternalTensor) for value in initializers)
    return list(find_views(initializers))


def test_a_decoder_with_a_copied_head_is_stored_as_one_with_a_shared_head(tmp_path: Path) -> None:
    write_llama(tmp_path / "copied.onnx", **TINY, seed=1, tied="copied")
    write_llama(tmp_path / "shared.onnx", **TINY, seed=1, tied="shared")
    copied, shared = load(tmp_path / "copied.onnx"), load(tmp_path / "shared.onnx")

    run = graphopt.optimize(copied, recipe="basic", benchmark=False)
    other = graphopt.optimize(shared, recipe="basic", benchmark=False)

    assert [s.spec for s in run.steps if s.verdict == "rolled back"] == []
    assert abs(stored_bytes(run.model) - stored_bytes(other.model)) < 100
    assert node_count(run.model) == node_count(other.model)
    assert_equivalent(copied, run.model, samples=random_samples(copied, 2))


def test_old_opsets_are_refused() -> None:
    model = parse(
        '<ir_version: 4, opset_import: ["" : 9]> agraph (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    infer_shapes(model)

    assert "older than 10" in (ALL.refuse(model, Context(lambda: model)) or "")
