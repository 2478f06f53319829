from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from optimized import kernels

import graphopt
from graphopt.contract import Context
from graphopt.packing import is_packed
from graphopt.random_samples import random_samples
from graphopt.runtime import Reference, Session
from graphopt.scratch import Scratch, is_scratch
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.quantize.balanced_rounding import CODE_MAXIMUM, round_to_codes
from graphopt_passes.quantize.quantize_weights import FEW_CHANNELS, QuantizeWeights

PASS = QuantizeWeights()


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def array_of(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    """What the packed weights of a model stand for, by name."""
    found = {}
    for node in model.graph.all_nodes():
        if node.op_type != "Mul" or not is_packed(node.outputs[0]):
            continue
        cast, scales = node.inputs
        assert cast is not None
        codes = array_of(cast.producer().inputs[0])  # type: ignore[union-attr]
        assert codes.dtype == np.int8
        value, array = node.outputs[0], codes * array_of(scales)
        for use in value.uses():
            if use.node.op_type == "Cast":
                value, array = use.node.outputs[0], array.astype(np.float16)
        found[value.name or ""] = array
    return found


def filled(model: ir.Model, weights: dict[str, np.ndarray]) -> ir.Model:
    """The float model with other weights."""
    model = model.clone()
    for graph in [model.graph, *model.graph.subgraphs()]:
        for name, value in graph.initializers.items():
            if name in weights:
                assert isinstance(graph, ir.Graph)
                value.const_value = ir.tensor(weights[name], name=name)
    return model


def check(model: ir.Model, folder: Path) -> dict[str, np.ndarray]:
    """Pack, and compare with a float model that has what the codes stand for.

    As deployed, the outputs are the same to the bit, and so are the kernels that onnxruntime
    chooses: it folds the nodes, in time for its fusions. As written it does not, and some of its
    products add up in another order where it cannot pack their operand ahead.
    """
    before = model.clone()
    change = apply_pass(PASS, model)
    weights = weights_of(model)
    assert change.counts.total() == len(weights) > 0
    reference = filled(before, weights)
    assert_equivalent(reference, model)
    assert kernels(model, folder) == kernels(before, folder)
    (sample,) = random_samples(before, 1)
    deployed = [
        Session(m, Reference.AS_DEPLOYED, threads=1).run(sample) for m in (reference, model)
    ]
    for name, array in deployed[0].items():
        assert np.array_equal(array, deployed[1][name])
    return weights


# ------------------------------------------------------------------ what reads it


READERS = {
    "Conv": (
        "(float[1,16,8,8] x, float[32,16,3,3] w, float[32] b) => (float[N,C,H,W] y)",
        "c = Conv(x, w, b) y = Relu(c)",
        (1, 2, 3),
    ),
    "Conv and BatchNormalization": (
        "(float[1,16,8,8] x, float[32,16,3,3] w, float[32] b, float[32] v) => (float[N,C,H,W] y)",
        "c = Conv(x, w) n = BatchNormalization(c, v, b, b, v) y = Relu(n)",
        (1, 2, 3),
    ),
    "Conv by depth": (
        "(float[1,64,8,8] x, float[64,1,3,3] w) => (float[N,C,H,W] y)",
        "y = Conv<group = 64, pads = [1,1,1,1]>(x, w)",
        (1, 2, 3),
    ),
    "Conv of a signal": (
        "(float[1,8,50] x, float[16,8,5] w) => (float[N,C,H] y)",
        "y = Conv(x, w)",
        (1, 2),
    ),
    "ConvTranspose": (
        "(float[1,16,8,8] x, float[16,12,3,3] w) => (float[N,C,H,W] y)",
        "y = ConvTranspose(x, w)",
        (0, 2, 3),
    ),
    "ConvTranspose in groups": (
        "(float[1,16,8,8] x, float[16,6,3,3] w) => (float[N,C,H,W] y)",
        "y = ConvTranspose<group = 4>(x, w)",
        (1, 2, 3),
    ),
    "Gemm": (
        "(float[4,32] x, float[32,24] w, float[24] b) => (float[N,M] y)",
        "c = Gemm(x, w, b) y = Relu(c)",
        (0,),
    ),
    "Gemm transposed": (
        "(float[4,32] x, float[24,32] w) => (float[N,M] y)",
        "y = Gemm<transB = 1>(x, w)",
        (1,),
    ),
    "Gemm on the left": (
        "(float[32,4] x, float[24,32] w) => (float[N,M] y)",
        "y = Gemm(w, x)",
        (1,),
    ),
    "Gemm on the left transposed": (
        "(float[32,4] x, float[32,24] w) => (float[N,M] y)",
        "y = Gemm<transA = 1>(w, x)",
        (0,),
    ),
    "MatMul": (
        "(float[2,4,32] x, float[32,24] w, float[24] b) => (float[A,B,C] y)",
        "c = MatMul(x, w) y = Add(c, b)",
        (0,),
    ),
    "MatMul of many": (
        "(float[3,4,32] x, float[3,32,24] w) => (float[A,B,C] y)",
        "y = MatMul(x, w)",
        (1,),
    ),
    "MatMul on the left": (
        "(float[3,32,4] x, float[24,32] w) => (float[A,B,C] y)",
        "y = MatMul(w, x)",
        (1,),
    ),
    "Gather": (
        "(int64[2,3] i, float[40,16] w) => (float[A,B,C] y)",
        "y = Gather(w, i)",
        (1,),
    ),
    "Gather of columns": (
        "(int64[2] i, float[16,40] w) => (float[A,B] y)",
        "y = Gather<axis = -1>(w, i)",
        (0,),
    ),
    "Embedding and tied head": (
        "(int64[5] i, float[40,16] w) => (float[A,B] y)",
        "e = Gather(w, i) t = Transpose<perm = [1,0]>(w) y = MatMul(e, t)",
        (1,),
    ),
    "Transpose of a Conv's": (
        "(float[1,16,8,8] x, float[3,3,16,32] w) => (float[N,C,H,W] y)",
        "t = Transpose<perm = [3,2,0,1]>(w) y = Conv(x, t)",
        (0, 1, 2),
    ),
}


@pytest.mark.parametrize("case", READERS)
def test_each_reader_gets_what_the_codes_stand_for(case: str, tmp_path: Path) -> None:
    head, body, shared = READERS[case]
    model = parse(f"agraph {head} {{ {body} }}")
    arrays = {v.name or "": v for v in model.graph.inputs if v.name in ("w", "b", "v")}
    shapes = {name: tuple(int(d) for d in v.shape.numpy()) for name, v in arrays.items() if v.shape}
    given = {name: np.abs(numbers(*shape, seed=len(name))) + 0.1 for name, shape in shapes.items()}
    given["w"] = numbers(*shapes["w"])
    model = parse(f"agraph {head} {{ {body} }}", **given)

    weights = check(model, tmp_path)

    largest = np.abs(given["w"]).max(shared, keepdims=True)
    scale = next(v for n, v in model.graph.initializers.items() if n == "w_scales")
    assert scale.dtype == ir.DataType.FLOAT
    assert np.allclose(array_of(scale), largest / CODE_MAXIMUM, rtol=1e-6)
    # Some are rounded to the other side, so that the roundings of an output cancel.
    assert (np.abs(weights["w"] - given["w"]) <= largest / CODE_MAXIMUM).all()
    added = (weights["w"].astype(np.float64) - given["w"]).sum(shared, keepdims=True)
    assert (np.abs(added) <= 0.501 * largest / CODE_MAXIMUM).all()


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("operator", GATES)
def test_recurrent_weights_have_a_scale_for_each_row_of_a_gate(
    operator: str, directions: int, tmp_path: Path
) -> None:
    rows = GATES[operator] * 32
    direction = "forward" if directions == 1 else "bidirectional"
    model = parse(
        f"""
        agraph (float[5,2,24] x, float[{directions},{rows},24] w, float[{directions},{rows},32] r)
            => (float[A,B,C,D] y)
        {{ y = {operator}<hidden_size = 32, direction = "{direction}">(x, w, r) }}
        """,
        w=numbers(directions, rows, 24),
        r=numbers(directions, rows, 32, seed=1),
    )

    assert set(check(model, tmp_path)) == {"w", "r"}

    shapes = {n: v.const_value.shape.numpy() for n, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    assert tuple(shapes["w_scales"]) == tuple(shapes["r_scales"]) == (directions, rows, 1)


OTHER_TYPES = [
    (kind, given, shape, body)
    for kind in ("float16", "double")
    for given, shape, body in (
        ("{kind}[4,32] x", "32,24", "y = MatMul(x, w)"),
        ("{kind}[4,32] x", "24,32", "y = Gemm<transB = 1>(x, w)"),
        ("int64[4] x", "40,24", "y = Gather(w, x)"),
    )
]
# onnxruntime has no Conv of float64.
OTHER_TYPES.append(
    ("float16", "{kind}[1,16,8,8] x", "32,16,3,3", "c = Conv(x, w) y = Relu(c)"),
)


@pytest.mark.parametrize(("kind", "given", "shape", "body"), OTHER_TYPES)
def test_other_floating_point_types(
    kind: str, given: str, shape: str, body: str, tmp_path: Path
) -> None:
    dtype = np.float16 if kind == "float16" else np.float64
    sizes = [int(size) for size in shape.split(",")]
    read, output = given.format(kind=kind), ",".join("ABCD"[: len(sizes)])
    model = parse(
        f"agraph ({read}, {kind}[{shape}] w) => ({kind}[{output}] y) {{ {body} }}",
        w=numbers(*sizes, dtype=dtype),
    )

    weights = check(model, tmp_path)

    assert weights["w"].dtype == dtype


# ------------------------------------------------------------------ subgraphs


def looped(body: str, **initializers: np.ndarray) -> ir.Model:
    """A Loop, whose body may read `outer`; the arrays become initializers of the body."""
    model = parse(
        f"""
        agraph (float[1,32,8,8] x, float[32,32,3,3] outer) => (float[1,32,8,8] y)
        <int64 rounds = {{3}}, bool go = {{1}}>
        {{
            y = Loop(rounds, go, x) <body = b
                (int64 i, bool c, float[1,32,8,8] v) => (bool d, float[1,32,8,8] o)
                {{ d = Identity(c)  {body}  o = Relu(z) }}
            >
        }}
        """,
        outer=numbers(32, 32, 3, 3) / 16,
    )
    proto = ir.to_proto(model)
    inner = proto.graph.node[0].attribute[0].g
    inner.initializer.extend(numpy_helper.from_array(a, n) for n, a in initializers.items())
    return ir.from_proto(proto)


CONV = "z = Conv<pads = [1,1,1,1]>(v, {})"


def test_a_weight_that_a_body_reads_is_packed_where_it_is(tmp_path: Path) -> None:
    model = looped(CONV.format("outer"))

    check(model, tmp_path)

    assert [n.op_type for n in model.graph] == ["Cast", "Mul", "Loop"]


def test_a_weight_in_a_body_is_packed_there(tmp_path: Path) -> None:
    model = looped(CONV.format("inner"), inner=numbers(32, 32, 3, 3) / 16)

    check(model, tmp_path)

    (loop,) = model.graph
    body = loop.attributes["body"].as_graph()
    assert [n.op_type for n in body] == ["Cast", "Mul", "Identity", "Conv", "Relu"]


def test_branches_that_read_one_weight(tmp_path: Path) -> None:
    model = parse(
        """
        agraph (bool c, float[N,32] x, float[32,64] w) => (float[N,64] y)
        {
            y = If(c) <
                then_branch = t () => (float[N,64] a) { a = MatMul(x, w) },
                else_branch = e () => (float[N,64] b) { z = MatMul(x, w)  b = Relu(z) }
            >
        }
        """,
        w=numbers(32, 64),
    )

    assert set(check(model, tmp_path)) == {"w"}


# ------------------------------------------------------------------ several readers


def test_readers_that_agree_share_one_form(tmp_path: Path) -> None:
    model = parse(
        "agraph (float[N,32] x, float[N,32] z, float[32,24] w) => (float[N,24] y, float[N,24] u)"
        " { y = MatMul(x, w) u = Gemm(z, w) }",
        w=numbers(32, 24),
    )

    assert set(check(model, tmp_path)) == {"w"}


def test_where_readers_disagree_the_first_is_asked(tmp_path: Path) -> None:
    model = parse(
        "agraph (float[N,32] x, float[N,24] z, float[32,24] w) => (float[N,24] y, float[N,32] u)"
        " { y = MatMul(x, w) u = Gemm<transB = 1>(z, w) }",
        w=numbers(32, 24),
    )

    check(model, tmp_path)

    assert array_of(model.graph.initializers["w_scales"]).shape == (1, 24)


# ------------------------------------------------------------------ left alone


def reasons(model: ir.Model) -> list[str]:
    return [skip.reason for skip in assert_unchanged(PASS, model).skips]


def product(w: np.ndarray, kind: str = "float", body: str = "y = MatMul(x, w)") -> ir.Model:
    shape = ",".join(map(str, w.shape))
    return parse(
        f"agraph ({kind}[N,{w.shape[-2]}] x, {kind}[{shape}] w) => ({kind}[N,M] y) {{ {body} }}",
        w=w,
    )


def test_leaves_small_weights() -> None:
    assert reasons(product(numbers(15, 17))) == []


def test_leaves_what_would_not_be_smaller() -> None:
    assert reasons(product(numbers(1, 300))) == ["codes and scales would take no fewer bytes"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_leaves_what_is_not_finite(bad: float, dtype: type) -> None:
    weight = numbers(32, 24, dtype=dtype)
    weight[3, 5] = bad
    kind = "float" if dtype is np.float32 else "float16"

    assert reasons(product(weight, kind)) == ["it holds infinity or NaN"]


def test_leaves_bfloat16() -> None:
    import ml_dtypes

    model = product(numbers(32, 24).astype(ml_dtypes.bfloat16), "bfloat16")

    assert reasons(model) == ["a weight of type BFLOAT16 is not packed"]


def test_leaves_what_a_caller_can_override() -> None:
    model = product(numbers(32, 24))
    model.graph.inputs.append(model.graph.initializers["w"])

    assert reasons(model) == ["an input that a caller can override"]


def test_leaves_an_output_of_the_graph() -> None:
    model = product(numbers(32, 24))
    model.graph.outputs.append(model.graph.initializers["w"])

    assert reasons(model) == ["it is an output of its graph"]


@pytest.mark.parametrize(
    ("body", "reader"),
    [
        ("y = Add(x, w)", "Add"),
        ("p = MatMul(x, w) s = ReduceMax<keepdims = 0>(w) y = Mul(p, s)", "ReduceMax"),
        (
            "q = QuantizeLinear(w, half) d = DequantizeLinear(q, half) y = MatMul(x, d)",
            "QuantizeLinear",
        ),
    ],
)
def test_leaves_what_others_read_than_as_a_weight(body: str, reader: str) -> None:
    text = (
        "agraph (float[32,32] x, float[32,32] w) => (float[32,32] y)"
        f" <float half = {{0.5}}> {{ {body} }}"
    )

    assert reasons(parse(text, w=numbers(32, 32))) == [f"{reader} reads it, and not as a weight"]


def test_leaves_packed_weights() -> None:
    model = parse(
        "agraph (float[N,32] x, int8[32,24] w, float[24] s) => (float[N,24] y)"
        " { d = DequantizeLinear<axis = 1>(w, s) y = MatMul(x, d) }",
        w=numbers(32, 24).astype(np.int8),
        s=np.ones(24, np.float32),
    )

    assert reasons(model) == []


def test_leaves_tensors_that_onnxruntime_would_not_fold() -> None:
    class Huge(ir.LazyTensor):
        """Says how large it is, and has no content."""

    shape = ir.Shape([1 << 14, (1 << 14) + 1])

    def content() -> ir.TensorProtocol:
        raise AssertionError("it was read")

    model = product(numbers(32, 24))
    tensor = Huge(content, dtype=ir.DataType.FLOAT, shape=shape, name="w")
    value = model.graph.initializers["w"]
    value.const_value, value.shape = tensor, shape

    change = PASS.apply(model, Context(model.clone))

    assert [s.reason for s in change.skips] == [
        "over 1 GiB onnxruntime would widen it at every inference"
    ]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('<ir_version: 8, opset_import: ["" : 6]>', "opset 6 is older than 7; raise it first"),
        (
            '<ir_version: 3, opset_import: ["" : 8]>',
            "IR version 3 has no constant initializers; raise it first",
        ),
    ],
)
def test_refuses_models_that_are_too_old(header: str, reason: str) -> None:
    model = parse(f"{header} agraph (float[2] x) => (float[2] y) {{ y = Relu(x) }}")

    assert PASS.refuse(model, Context(model.clone)) == reason


# ------------------------------------------------------------------ numbers


SIZES = {
    np.float16: (1e-7, 1e-3, 1.0, 6e4),
    np.float32: (1e-44, 1e-38, 1e-7, 1.0, 3e38),
    np.float64: (1e-300, 1e-7, 1.0, 3e38, 1e308),
}


@pytest.mark.parametrize(("dtype", "size"), [(t, s) for t, sizes in SIZES.items() for s in sizes])
def test_numbers_of_every_size(dtype: type, size: float) -> None:
    weight = (np.linspace(-1, 1, 64 * 32).reshape(64, 32) * size).astype(dtype)

    coded = round_to_codes(weight, (1,))

    assert (coded.scales > 0).all() and np.isfinite(coded.scales).all()
    widened = coded.codes * coded.scales
    assert np.isfinite(widened.astype(dtype)).all()
    error = np.abs(widened.astype(np.float64) - weight.astype(np.float64))
    # To the other side at most, which is a whole step.
    assert (error <= coded.scales.astype(np.float64) * 1.001).all()


def test_rows_of_zeros_stay_zero() -> None:
    weight = numbers(8, 64)
    weight[2:4] = 0.0

    coded = round_to_codes(weight, (1,))

    assert (coded.scales[2:4] == 1).all()
    assert not coded.codes[2:4].any()


def test_zeros_stay_zero() -> None:
    weight = numbers(8, 512) * (numbers(8, 512, seed=1) > 0)

    coded = round_to_codes(weight, (1,))

    assert not coded.codes[weight == 0].any()


def test_what_codes_stand_for_is_rounded_to_itself() -> None:
    first = round_to_codes(numbers(16, 300), (1,))

    again = round_to_codes((first.codes * first.scales).astype(np.float32), (1,))

    assert np.array_equal(first.codes, again.codes)
    assert np.array_equal(first.scales, again.scales)


def test_roundings_that_are_all_alike_cancel() -> None:
    """Rounded to the nearest, all of them would go the same way."""
    weight = np.full((1, 1001), 0.3 / CODE_MAXIMUM, np.float32)
    weight[0, 0] = 1.0

    coded = round_to_codes(weight, (1,))

    assert abs((coded.codes * coded.scales - weight).sum()) <= 0.501 / CODE_MAXIMUM


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_slabs_make_no_difference(shared: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(5, 7, 9)
    whole = round_to_codes(weight, shared)
    monkeypatch.setattr("graphopt_passes.quantize.balanced_rounding.SLAB_BYTES", 1)

    parts = round_to_codes(weight, shared)

    assert np.array_equal(whole.codes, parts.codes)
    assert np.array_equal(whole.scales, parts.scales)


# ------------------------------------------------------------------ the pass


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = product(numbers(300, 400))
    apply_pass(PASS, model)

    assert reasons(model) == []


def test_the_narrower_form_leaves_filters_of_a_signal() -> None:
    model = parse(
        "agraph (float[1,1,600] x, float[64,1,99] f, float[32,64,3] w) => (float[A,B,C] y)"
        " { c = Conv(x, f) y = Conv(c, w) }",
        f=numbers(64, 1, 99),
        w=numbers(32, 64, 3),
    )

    narrow = PASS.narrow()
    assert narrow == QuantizeWeights(min_channels=FEW_CHANNELS)
    change = apply_pass(narrow, model)

    assert change.counts == {"weight of Conv stored as int8": 1}
    assert [s.reason for s in change.skips] == ["of its inputs and its outputs, the fewer are 1"]


def test_of_many_weights_the_one_that_harms_stays() -> None:
    """Its large rows meet small inputs: what rounding leaves of the small ones is all there is."""
    sizes = np.where(np.arange(64) < 8, 1e4, 1.0).astype(np.float32)[:, np.newaxis]
    model = parse(
        """
        agraph (float[N,64] x, float[64,64] w, float[64,64] a, float[64,64] b, float[64] s)
            => (float[N,64] y)
        {
            r = Mul(x, s) h = MatMul(r, w)
            p = MatMul(x, a) t = Tanh(p) q = MatMul(t, b)
            y = Add(h, q)
        }
        """,
        w=numbers(64, 64, seed=1) * sizes,
        a=numbers(64, 64, seed=2) / 8,
        b=numbers(64, 64, seed=3) / 8,
        s=(1 / sizes[:, 0] ** 2).astype(np.float32),
    )
    samples = [{"x": numbers(4, 64, seed=10 + number)} for number in range(4)]
    run = graphopt.optimize(
        model, passes="quantize-weights{error=0.01}", samples=samples, benchmark=False
    )

    (step,) = run.steps
    assert step.changes == {"weight of MatMul stored as int8": 2}
    assert [s.reason for s in step.skips] == [
        "packing it adds too much to the error of the outputs"
    ]
    assert "w" in run.model.graph.initializers


def test_narrower_forms_come_to_an_end() -> None:
    forms: list[QuantizeWeights] = [PASS]
    while (narrower := forms[-1].narrow()) is not None:
        forms.append(narrower)

    assert [(f.min_channels, f.min_elements) for f in forms] == [
        (1, 256),
        (5, 256),
        (5, 1 << 13),
        (5, 1 << 16),
    ]


def test_filters_by_depth_have_many_channels() -> None:
    model = parse(
        "agraph (float[1,64,8,8] x, float[64,1,3,3] w) => (float[A,B,C,D] y)"
        " { y = Conv<group = 64>(x, w) }",
        w=numbers(64, 1, 3, 3),
    )

    assert apply_pass(QuantizeWeights(min_channels=FEW_CHANNELS), model)


def test_large_codes_go_to_the_scratch_file() -> None:
    model = product(numbers(1024, 1040))
    scratch = Scratch()

    apply_pass(PASS, model, scratch=scratch)

    tensor = model.graph.initializers["w_codes"].const_value
    assert tensor is not None and is_scratch(tensor)


def test_the_file_is_a_quarter(tmp_path: Path) -> None:
    layers = [numbers(512, 512, seed=s) for s in range(4)]
    text = " ".join(f"h{k + 1} = MatMul(h{k}, w{k})" for k in range(4))
    model = parse(
        f"agraph (float[1,512] h0, {', '.join(f'float[512,512] w{k}' for k in range(4))})"
        f" => (float[1,512] h4) {{ {text} }}",
        **{f"w{k}": array / 22 for k, array in enumerate(layers)},
    )
    run = graphopt.optimize(model, passes="quantize-weights", random_samples=4, benchmark=False)

    path = tmp_path / "packed.onnx"
    run.save(path)

    assert path.stat().st_size < 0.255 * 4 * 512 * 512 * 4
    found, basic = graphopt.inspect(path)
    assert [(w.dtype, w.bytes) for w in found.weights] == [
        ("int8", 4 * 512 * 512),
        ("float", 4 * 512 * 4),
    ]
    assert not any(step.changes for step in basic.steps)


# ------------------------------------------------------------------ other passes leave it


def packed_network() -> ir.Model:
    """Packed weights beside nodes that the passes of `basic` would like to fold into them."""
    model = parse(
        """
        agraph (float[2,16,12,12] x, float[5,2,24] u, int64[4] i, float[32,16,3,3] c,
                float[32,16,3,3] c2, float[32] g, float[32] b, float[1,32,1,1] k, float[32,64] m,
                float[64,48] n, float[64] a, float[40,64] e, float[1,128,24] w, float[1,128,32] r)
            => (float[A,B] y, float[C,D] h1, float[E,F,G,H] l)
        <float two = {2.0}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] last = {40}>
        {
            c0 = Conv(x, c)
            c1 = BatchNormalization(c0, g, b, b, g)
            c3 = Mul(c1, k)
            c4 = Conv(x, c2)
            c5 = Sub(c3, c4)
            c6 = Mul(c5, two)
            z = Mul(c6, two)
            p = GlobalAveragePool(z)
            f = Flatten(p)
            m1 = MatMul(f, m)
            m2 = Add(m1, a)
            m3 = Mul(m2, two)
            q = Gather(e, i)
            t = Transpose<perm = [1, 0]>(e)
            h = MatMul(q, t)
            h1 = Mul(h, two)
            v = Slice(n, zero, last, one)
            v1 = Transpose<perm = [1, 0]>(v)
            v2 = Transpose<perm = [1, 0]>(v1)
            y = MatMul(m3, v2)
            l = LSTM<hidden_size = 32>(u, w, r)
        }
        """,
        c=numbers(32, 16, 3, 3),
        c2=numbers(32, 16, 3, 3),
        g=np.abs(numbers(32, seed=3)) + 0.5,
        b=np.abs(numbers(32, seed=4)) + 0.5,
        k=np.abs(numbers(1, 32, 1, 1, seed=5)) + 0.5,
        m=numbers(32, 64, seed=6),
        n=numbers(64, 48, seed=7),
        a=numbers(64, seed=8),
        e=numbers(40, 64, seed=9),
        w=numbers(1, 128, 24, seed=10),
        r=numbers(1, 128, 32, seed=11),
    )
    change = apply_pass(PASS, model)
    assert change.counts.total() == 7 and not change.skips
    return model


@pytest.mark.parametrize("half", [False, True], ids=["float", "float16"])
def test_basic_leaves_packed_weights_as_they_are(half: bool) -> None:
    model = packed_network()
    if half:
        weight = numbers(512, 96, dtype=np.float16)
        model = parse(
            "agraph (float16[N,512] x, float16[512,96] w, float16[96] b) => (float16[N,96] y)"
            " { p = MatMul(x, w) q = Mul(p, b) y = Add(q, b) }",
            w=weight,
            b=weight[0],
        )
        assert apply_pass(PASS, model)
    before = weights_of(model)

    run = graphopt.optimize(model, recipe="basic", random_samples=4, benchmark=False)

    assert all(step.verdict in ("kept", "unchanged", "refused") for step in run.steps)
    after = weights_of(run.model)
    assert all(any(np.array_equal(a, b) for b in before.values()) for a in after.values())
    shared = 0 if half else 1
    # The two Convs have the same numbers.
    assert len(after) == len(before) - shared
    assert run.steps[-1].bytes_after <= run.steps[0].bytes_before
    large = [v for v in run.model.graph.initializers.values() if v.const_value.size > 1000]  # type: ignore[union-attr]
    assert {v.dtype for v in large} == {ir.DataType.INT8}
    if not half:
        assert run.model.graph.initializers["c_codes"].const_value is not None
        assert "c2_codes" not in run.model.graph.initializers


def test_a_factor_before_the_reader_joins_the_scales() -> None:
    model = parse(
        """
        agraph (float[N,32] x, int8[32,64] w, float[1,64] s) => (float[N,64] y)
        <float two = {2.0}>
        { wide = Cast<to = 1>(w) m = Mul(wide, s) v = Mul(m, two) y = MatMul(x, v) }
        """,
        w=numbers(32, 64).astype(np.int8),
        s=np.abs(numbers(1, 64)) + 0.5,
    )

    run = graphopt.optimize(model, recipe="basic", random_samples=4, benchmark=False)

    assert sorted(n.op_type for n in run.model.graph) == ["Cast", "MatMul", "Mul"]
    assert is_packed(next(n for n in run.model.graph if n.op_type == "MatMul").inputs[1])
