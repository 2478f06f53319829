from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import code_all, normal, samples_of, work

import graphopt
from graphopt.code_fields import bits_per_code, fields_of
from graphopt.contract import Change, Context, Sample
from graphopt.encoding import NODES_BYTES, SCALES_BYTES
from graphopt.errors import SpecError
from graphopt.packing import packed_weights
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import apply_pass, assert_unchanged, parse
from graphopt_passes.quantize.cluster_weights import CLUSTERS, Clusters, ClusterWeights
from graphopt_passes.quantize.kmeans import nearest_levels, optimal_levels
from graphopt_passes.quantize.narrow_weights import targets_of
from graphopt_passes.quantize.narrowing import problem_of

TWO_CONVS = """
agraph (float[1,8,10,10] x) => (float[N,C,H,W] y)
{ a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, v, b) }
"""


TABLES = [field.table().shape for count in range(2, 257) for field in fields_of(count)]
"""Of digits, by which bytes become codes."""


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    """A model from text, with initializers that are declared here."""
    kinds = (f"float[{','.join(map(str, w.shape))}] {name}" for name, w in weights.items())
    return parse(text.replace(") =>", f", {', '.join(kinds)}) =>", 1), **weights)


def two_convs(channels: int = 16) -> ir.Model:
    first, second = (channels, 8, 3, 3), (channels, channels, 3, 3)
    return model_of(
        TWO_CONVS,
        w=normal(0, *first),
        v=normal(1, *second, scale=0.1),
        b=normal(2, channels, scale=0.1),
    )


def samples(count: int = 6) -> list[Sample]:
    """Images whose neighbouring places and channels are alike, as in real ones."""
    noise = samples_of(1, 8, 10, 10, count=count)
    return [{"x": 0.3 * s["x"].cumsum(1).cumsum(3) + 1} for s in noise]


def stored_bytes(model: ir.Model) -> int:
    """Of all constants but the tables of digits, which all weights share."""
    return sum(
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and tuple(value.const_value.shape) not in TABLES
    )


def clustered(
    model: ir.Model, given: list[Sample] | None = None, **options: object
) -> tuple[ir.Model, Change]:
    infer_shapes(model)
    after = model.clone()
    context = Context(lambda: model, observer=observer(model, given) if given else None)
    change = ClusterWeights(min_elements=64, **options).apply(after, context)  # type: ignore[arg-type]
    infer_shapes(after)
    return after, change


def error(before: ir.Model, after: ir.Model, given: list[Sample]) -> float:
    """The relative L2 error of the first output."""
    wrong = total = 0.0
    sessions = Session(before), Session(after)
    for sample in given:
        first, second = (next(iter(s.run(sample).values())) for s in sessions)
        wrong += float(np.square(first - second).sum())
        total += float(np.square(first).sum())
    return float(np.sqrt(wrong / total))


def unpacked(model: ir.Model) -> dict[str, np.ndarray]:
    """What the packed weights of a model stand for."""
    graph = model.clone()
    names = [v.name or "" for v in packed_weights(graph.graph)]
    values = {o.name: o for node in graph.graph for o in node.outputs}
    graph.graph.outputs[:] = [values[name] for name in names]
    return Session(graph).run(
        {i.name: np.zeros([1, 8, 10, 10], np.float32) for i in graph.graph.inputs}
    )


@pytest.mark.parametrize("count", [2, 3, 6, 8, 16, 64])
def test_so_many_values_for_each_weight(count: int) -> None:
    model = two_convs()
    after, change = clustered(model, clusters=count)

    assert change.counts == {f"weight of Conv stored as {count} clusters": 2}
    for name, array in unpacked(after).items():
        weight = model.graph.initializers[name].const_value
        assert weight is not None and weight.shape == array.shape
        rows = array.reshape(16, -1)
        scales = np.abs(rows).max(axis=1, keepdims=True)
        assert len(np.unique(np.round(rows / scales, 4))) <= count * 16
        assert max(len(np.unique(row)) for row in rows) <= count


def test_samples_make_it_closer() -> None:
    model, given = two_convs(), samples(12)
    held_out = samples(20)[12:]
    blind, seeing = (clustered(model, g, clusters=8)[0] for g in (None, given))

    assert error(model, seeing, held_out) < 0.8 * error(model, blind, held_out)


def test_the_mean_of_the_outputs_stays() -> None:
    model, given = two_convs(), samples(12)
    after, _ = clustered(model, given, clusters=4)
    blind, _ = clustered(model, None, clusters=4)
    exact, corrected, wrong = (
        np.mean([next(iter(Session(m).run(s).values())) for s in given], axis=(0, 1, 3, 4))
        for m in (model, after, blind)
    )

    assert np.abs(corrected - exact).max() < 0.2 * np.abs(wrong - exact).max()


def test_bits_limit_the_bytes() -> None:
    given = samples()
    sizes = []
    for bits in (3.0, 4.0, 6.0):
        model = two_convs()
        after, _ = clustered(model, given, bits=bits)
        numbers = 16 * 8 * 9 + 16 * 16 * 9
        assert stored_bytes(after) <= numbers * bits / 8 + 2 * (NODES_BYTES + SCALES_BYTES)
        sizes.append(error(model, after, given))

    assert sizes == sorted(sizes, reverse=True)


def test_an_error_limits_what_is_done() -> None:
    model, given = two_convs(), samples(8)
    fine, _ = clustered(model, given, error=0.02)
    coarse, _ = clustered(model, given, error=0.3)

    assert error(model, fine, given) <= 0.021
    assert error(model, coarse, given) <= 0.31
    assert error(model, fine, given) < error(model, coarse, given)
    assert not any(packed_weights(clustered(model, given, error=0.0)[0].graph))


def test_pruned_weights_stay_zero() -> None:
    model = two_convs()
    weight = normal(0, 16, 8, 3, 3)
    weight[np.abs(weight) < 0.8] = 0
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")

    after, _ = clustered(model, samples(), clusters=8, keep_zeros=True)

    assert (unpacked(after)["w"][weight == 0] == 0).all()


def on_codes(model: ir.Model, given: list[Sample]) -> ir.Model:
    """The same with all that can work on 8-bit codes doing so."""
    infer_shapes(model)
    coded = model.clone()
    code_all(coded, given)
    infer_shapes(coded)
    return coded


@pytest.mark.parametrize("layer", ["Conv(x, w)", "Gemm", "MatMul"])
def test_layers_on_codes_stay_on_codes(layer: str, tmp_path: Path) -> None:
    """The int8 weight of an integer kernel comes from codes, and the kernel stays."""
    if layer.startswith("Conv"):
        model, given = two_convs(), samples(8)
    else:
        body = "h = Gemm<transB = 1>(x, w, b) r = Relu(h) y = Gemm(r, v, b)"
        if layer == "MatMul":
            body = "t = MatMul(x, u) r = Relu(t) y = MatMul(r, v)"
        model = model_of(
            f"agraph (float[4,48] x) => (float[N,M] y) {{ {body} }}",
            w=normal(0, 64, 48),
            u=normal(0, 48, 64),
            v=normal(1, 64, 64),
            b=normal(2, 64),
        )
        given = samples_of(4, 48, count=8)
    model.opset_imports[""] = 21
    coded = on_codes(model, given)
    [(tmp_path / name).mkdir() for name in ("before", "after")]
    before = work(coded, tmp_path / "before")
    # onnxruntime has no integer MatMul whose output is float.
    kernel = {"Conv(x, w)": "QLinearConv", "Gemm": "QGemm", "MatMul": "QLinearMatMul"}[layer]
    assert before[kernel] == (1 if layer == "MatMul" else 2)

    context = Context(lambda: model, observer=observer(model, given))
    after = coded.clone()
    change = ClusterWeights(clusters=16, min_elements=64).apply(after, context)
    infer_shapes(after)

    assert change.counts.total() == 2
    assert work(after, tmp_path / "after") == before
    assert error(model, after, given) < 0.2
    assert sum(1 for _ in packed_weights(after.graph)) >= 2


@pytest.mark.parametrize(
    ("count", "on_integers", "most"),
    [(16, False, 0.75), (64, False, 0.9), (16, True, 0.78), (64, True, 0.5)],
)
def test_rows_of_the_same_range_share_levels(count: int, on_integers: bool, most: float) -> None:
    """A row with a few large numbers takes no levels, and no steps of int8, from the others."""
    model, given = two_convs(channels=32), samples(8)
    numbers = np.random.default_rng(5).standard_t(3, (32, 32, 3, 3)).astype(np.float32)
    model.graph.initializers["v"].const_value = ir.tensor(numbers, name="v")
    infer_shapes(model)
    targets = targets_of(on_codes(model, given) if on_integers else model, 64, Change())
    (target,) = [one for one in targets if one.size == numbers.size]
    problem = problem_of(target, {})

    solved = problem.error(Clusters(count).solve(problem))

    # Rows of the same power, whose numbers go to the nearest of the best levels.
    scales = np.sqrt(np.square(problem.weight).mean(axis=1, keepdims=True))
    rows = problem.weight / scales
    levels = optimal_levels(rows, None, count)
    if on_integers:
        step = np.abs(levels).max() / 127
        levels = np.unique(np.rint(levels / step)) * step
    change = (rows - levels[nearest_levels(rows, levels)]) * scales
    assert solved < most * float(np.square(change).sum())


def test_parameters_of_codes_that_stay_become_narrow(tmp_path: Path) -> None:
    """A layer that stands no clusters keeps its codes; scale and bias take float16."""
    model, given = two_convs(channels=32), samples(8)
    coded = on_codes(model, given)
    [(tmp_path / name).mkdir() for name in ("before", "after")]
    before = work(coded, tmp_path / "before")

    after = coded.clone()
    context = Context(lambda: model, observer=observer(model, given))
    ClusterWeights(error=1e-6, min_elements=64).apply(after, context)
    infer_shapes(after)

    assert before["QLinearConv"] == 2
    read = [v.const_value for v in after.graph.initializers.values() if v.uses()]
    kinds = Counter(t.dtype for t in read if t is not None and t.size == 32)
    assert kinds == {ir.DataType.FLOAT16: 4}
    assert work(after, tmp_path / "after") == before
    assert error(model, after, given) < 1.1 * error(model, coded, given)


@pytest.mark.parametrize("size", [0.16, 0.2, 0.3])
def test_the_file_is_filled_up_to_its_size(size: float) -> None:
    model = two_convs(channels=64)
    apply_pass(graphopt_pass("raise-opset"), model)
    run = graphopt.optimize(
        model,
        passes=f"cluster-weights{{size={size},min-elements=64}}",
        samples=samples(10),
        max_error=10.0,
        benchmark=False,
    )

    share = run.steps[-1].bytes_after / run.original.stored_bytes
    assert 0.85 * size < share <= size


def test_one_scale_for_all_channels_becomes_one_for_each(tmp_path: Path) -> None:
    """As in models that other tools quantized: no axis, and a scalar scale and zero point."""
    weight = np.clip(np.rint(40 * normal(0, 24, 8, 3, 3)), -127, 127).astype(np.int8)
    scalars = {"s": np.float32(0.05), "t": np.float32(0.025), "z": np.uint8(128), "o": np.int8(0)}
    model = parse(
        """
        agraph (float[1,8,10,10] x, int8[24,8,3,3] w, float s, float t, uint8 z, int8 o)
            => (float[N,C,H,W] y)
        {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
            v = DequantizeLinear(w, t, o) c = Conv(d, v)
            p = QuantizeLinear(c, s, z) y = DequantizeLinear(p, s, z)
        }
        """,
        w=weight,
        **{name: np.asarray(number) for name, number in scalars.items()},
    )
    given = samples_of(1, 8, 10, 10, count=4)
    infer_shapes(model)
    before = work(model, tmp_path)

    after, change = clustered(model, given, clusters=32)

    assert change.counts == {"weight of Conv stored as 32 clusters": 1}
    assert work(after, tmp_path) == before
    assert error(model, after, given) < 0.1


def test_weights_that_are_int8_already_become_narrower() -> None:
    model = two_convs()
    infer_shapes(model)
    packed = model.clone()
    apply_pass(graphopt_pass("quantize-weights{min-elements=64}"), packed)
    infer_shapes(packed)
    after, change = clustered(packed, clusters=8)

    assert change.counts == {"weight of Conv stored as 8 clusters": 2}
    assert not any(v.uses() for n, v in after.graph.initializers.items() if n.endswith("_codes"))
    assert error(model, after, samples()) < 0.5


def graphopt_pass(text: str) -> graphopt.Pass:
    from graphopt.registry import pass_class
    from graphopt.spec import parse_pipeline

    (one,) = parse_pipeline(text, pass_class)
    assert isinstance(one, graphopt.Pass)
    return one


def test_the_file_is_as_small_as_the_arithmetic_says(tmp_path: Path) -> None:
    model = model_of(
        "agraph (float[4,256] x) => (float[N,M] y) { y = MatMul(x, w) }", w=normal(0, 256, 512)
    )
    run = graphopt.optimize(
        model, passes="cluster-weights{clusters=16}", benchmark=False, max_error=1.0
    )
    run.save(tmp_path / "model.onnx")

    codes = 256 * 512 // 2
    assert codes < (tmp_path / "model.onnx").stat().st_size < codes + 512 * 2 + 3000


def test_a_shared_table_and_head_are_stored_once() -> None:
    model = model_of(
        """
        agraph (int64[3] i) => (float[N,M] y)
        { g = Gather(w, i) t = Transpose<perm = [1,0]>(w) y = MatMul(g, t) }
        """,
        w=normal(0, 40, 32),
    )
    after, change = clustered(model, clusters=16)

    assert change.counts == {"weight of Gather stored as 16 clusters": 1}
    value = next(iter(packed_weights(after.graph)))
    assert value.name == "w"
    assert {use.node.op_type for use in value.uses()} == {"Gather", "Transpose"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Add(x, w)", "not as a weight"),
        ("h = MatMul(x, w) y = Add(h, w)", "not as a weight"),
    ],
)
def test_what_is_no_weight_stays(body: str, reason: str) -> None:
    model = model_of(
        f"agraph (float[16,16] x) => (float[16,16] y) {{ {body} }}", w=normal(0, 16, 16)
    )
    _, change = clustered(model, clusters=16)

    assert not change
    assert [reason in skip.reason for skip in change.skips] == [True]


def test_infinity_stays() -> None:
    model = two_convs()
    weight = normal(0, 16, 8, 3, 3)
    weight[0, 0, 0, 0] = np.inf
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    _, change = clustered(model, clusters=16)

    assert change.counts.total() == 1
    assert "infinity" in change.skips[0].reason


def test_small_weights_stay() -> None:
    assert_unchanged(ClusterWeights(clusters=16, min_elements=10_000), two_convs())


def test_an_old_opset_is_refused() -> None:
    model = two_convs()
    model.opset_imports[""] = 11
    assert "raise it first" in (ClusterWeights().refuse(model, Context(lambda: model)) or "")


def test_over_the_budget_it_takes_more_clusters() -> None:
    assert ClusterWeights(clusters=16).narrow() == ClusterWeights(clusters=32)
    assert ClusterWeights(clusters=256).narrow() is None
    assert ClusterWeights(bits=4.0).narrow() == ClusterWeights(bits=5.0)
    assert ClusterWeights(bits=7.5).narrow() is None
    assert ClusterWeights(error=0.1).narrow() == ClusterWeights(error=0.05)
    assert ClusterWeights(error=0.001).narrow() is None


def test_what_is_chosen_from_takes_ever_more_bits() -> None:
    bits = [bits_per_code(count) for count in CLUSTERS]
    assert bits == sorted(set(bits))


def test_targets_are_found_once() -> None:
    model = two_convs()
    infer_shapes(model)
    assert Counter(t.name for t in targets_of(model, 64, Change())) == {"w": 1, "v": 1}


def test_without_samples_the_error_is_that_of_the_weights() -> None:
    coarse, _ = clustered(two_convs(), error=0.3)
    fine, _ = clustered(two_convs(), error=0.03)
    assert stored_bytes(coarse) < stored_bytes(fine)


def test_a_size_that_nothing_fits_is_told() -> None:
    model = two_convs(channels=32)
    apply_pass(graphopt_pass("raise-opset"), model)
    run = graphopt.optimize(
        model,
        passes="cluster-weights{size=0.01,min-elements=64}",
        samples=samples(10),
        max_error=10.0,
        benchmark=False,
    )
    (note,) = run.steps[-1].notes
    assert note.startswith("the smallest choice takes ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 1}, "2 clusters or more"),
        ({"clusters": 16, "bits": 2.0}, "one of clusters, bits, size and each"),
        ({"bits": 4.0, "size": 0.2}, "one of clusters, bits, size and each"),
    ],
)
def test_contradictions_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ClusterWeights(**options)  # type: ignore[arg-type]
