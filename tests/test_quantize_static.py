"""quantize-static: onnxruntime's quantizer and plain numpy as oracles; the choice; bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from on_codes import (
    CONV,
    ENDS,
    FINE,
    Sample,
    all_units,
    code_all,
    context_of,
    difference,
    normal,
    quantize,
    reasons,
    samples_of,
    sandwich,
    scale_of,
    steps_from_written,
    work,
)

import graphopt
from graphopt import cli
from graphopt.contract import Context
from graphopt.errors import SampleError
from graphopt.observe import Question
from graphopt.rewriting import constant_tensor
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.statistics import Spread
from graphopt.testing import assert_unchanged, canonical, parse
from graphopt_passes.quantize.affine import affine_of
from graphopt_passes.quantize.choice import Choice
from graphopt_passes.quantize.layers import layer_of
from graphopt_passes.quantize.quantize_static import ERROR_MINIMUM, QuantizeStatic
from graphopt_passes.quantize.rounding import round_nearest, scales_of

# ------------------------------------------------------------------ any graph

STEPS = (
    "{v} = Conv <pads = [1, 1, 1, 1]> ({a}, w)",
    "{v} = Conv <pads = [1, 1, 1, 1]> ({a}, w, b)",
    "{v} = Relu({a})",
    "{v} = Clip({a}, low, high)",
    "{v} = Tanh({a})",
    "{v} = Sigmoid({a})",
    "{v} = LeakyRelu({a})",
    "{v} = Add({a}, {b})",
    "{v} = Mul({a}, {b})",
    "{v} = Add({a}, high)",
    "{v} = Transpose <perm = [0, 1, 3, 2]> ({a})",
    "{v} = Identity({a})",
    "{v} = Reshape({a}, shape)",
    "{v} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({a})",
    "c{v} = Concat <axis = 1> ({a}, {b}) {v} = Slice(c{v}, two, six, one)",
    "p{v}, q{v} = Split <axis = 1, num_outputs = 2> ({a}) {v} = Concat <axis = 1> (q{v}, p{v})",
    "p{v} = Pad({a}, pads) {v} = Slice(p{v}, one, five, two)",
)


def any_graph(generator: np.random.Generator) -> str:
    """A dozen steps at most, each of values made shortly before, with several outputs."""
    names, nodes = ["x"], []
    for number in range(generator.integers(3, 12)):
        a, b = generator.choice(names[-4:], 2)
        names.append(f"v{number}")
        nodes.append(str(generator.choice(STEPS)).format(v=names[-1], a=a, b=b))
    outputs = sorted({names[-1], *generator.choice(names[1:], 3)})
    return f"""
    agraph (float[1, 4, 4, 4] x, float[4, 4, 3, 3] w, float[4] b)
        => ({", ".join(f"float[N, C, H, W] {name}" for name in outputs)})
    <float low = {{-0.5}}, float high = {{1.0}}, int64[4] shape = {{1, 4, 4, 4}},
     int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] five = {{5}}, int64[1] six = {{6}},
     int64[8] pads = {{0, 0, 1, 0, 0, 0, 1, 0}}>
    {{ {" ".join(nodes)} }}
    """


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 100))]
)
def test_any_units_of_any_graph_may_work_on_codes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    model = parse(
        any_graph(generator), w=normal(seed, 4, 4, 3, 3, scale=0.25), b=normal(seed + 1, 4)
    )
    samples = samples_of(1, 4, 4, 4)
    units, _ = all_units(model)
    choice = Choice(model, context_of(model, samples), units)
    for share in (1.0, 0.6, 0.3):
        written = model.clone()
        choice.write(written, [unit for unit in units if generator.random() < share])

        assert why_invalid(written) is None
        assert [o.name for o in written.graph.outputs] == [o.name for o in model.graph.outputs]
        assert difference(model, written, samples[0]) < 0.08
        assert steps_from_written(written, samples[0]) < 4


# ------------------------------------------------------------------ oracles

CNN = """
agraph (float[N, 3, 8, 8] x, float[8, 3, 3, 3] w, float[8] b, float[8, 8, 3, 3] v, float[8] a,
        float[5, 8] g, float[5] h) => (float[N, 5] y)
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu(c)
    d = Conv <pads = [1, 1, 1, 1]> (r, v, a)
    s = Add(d, r)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm <transB = 1> (f, g, h)
}
"""


def cnn() -> ir.Model:
    return parse(
        CNN,
        w=normal(1, 8, 3, 3, 3),
        b=normal(2, 8),
        v=normal(3, 8, 8, 3, 3, scale=0.2),
        a=normal(4, 8),
        g=normal(5, 5, 8),
        h=normal(6, 5),
    )


def test_plain_rounding_is_that_of_onnxruntimes_quantizer(tmp_path: Path) -> None:
    """Nearest codes for weights and ranges from minimum to maximum, as quantize_static has them."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    model, samples = cnn(), samples_of(2, 3, 8, 8, count=4)
    infer_shapes(model)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.waiting = iter(samples)

        def get_next(self) -> Sample | None:
            return next(self.waiting, None)

    onnx.save(ir.to_proto(model), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "codes.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    graph = onnx.load(tmp_path / "codes.onnx").graph
    theirs = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}

    layers = [layer_of(node) for node in model.graph if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 3
    for layer in layers:
        rows = layer.matrix()[0]
        scales = scales_of(rows)
        codes = layer.stored(round_nearest(rows, scales)[np.newaxis])
        np.testing.assert_array_equal(np.float32(scales), theirs[f"{layer.weight.name}_scale"])
        np.testing.assert_array_equal(codes, theirs[f"{layer.weight.name}_quantized"])
    values = ["x", "r", "d", "s", "p", "y"]
    answers = context_of(model, samples).observe(model, map(Question, values))
    for name in values:
        spread = answers[Question(name)]
        assert isinstance(spread, Spread)
        affine = affine_of(spread.low, spread.high)
        # onnxruntime divides in float32.
        np.testing.assert_array_max_ulp(affine.scale, theirs[f"{name}_scale"], 1)
        assert affine.zero_point == theirs[f"{name}_zero_point"]


class Interpreter:
    """A quantized model computed in float64, where sums of codes have no rounding errors.

    Attributes:
        values: by name, what has been computed.
    """

    def __init__(self, model: ir.Model, sample: Sample) -> None:
        self.values = {name: np.asarray(array) for name, array in sample.items()}
        for node in model.graph:
            inputs = [self._read(value) for value in node.inputs if value is not None]
            name = node.outputs[0].name
            assert name is not None
            self.values[name] = getattr(self, node.op_type)(node, *inputs)

    def _read(self, value: ir.Value) -> np.ndarray:
        tensor = constant_tensor(value)
        return self.values[value.name or ""] if tensor is None else tensor.numpy()

    def QuantizeLinear(
        self, node: ir.Node, x: np.ndarray, scale: np.ndarray, zero: np.ndarray
    ) -> np.ndarray:
        codes = np.rint(x / np.float64(scale)) + zero
        return np.asarray(codes.clip(0, 255), np.uint8)

    def DequantizeLinear(
        self, node: ir.Node, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray
    ) -> np.ndarray:
        shape = [1] * codes.ndim
        if scale.ndim:
            shape[node.attributes["axis"].as_int()] = -1
        centred = codes.astype(np.float64) - zero.reshape(shape)
        return np.asarray(centred * np.float64(scale.reshape(shape)))

    def Conv(
        self, node: ir.Node, x: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> np.ndarray:
        padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        return np.asarray(
            np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, np.newaxis, np.newaxis]
        )

    def Add(self, node: ir.Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(a + b)

    def GlobalAveragePool(self, node: ir.Node, x: np.ndarray) -> np.ndarray:
        return np.asarray(x.mean((2, 3), keepdims=True))

    def Flatten(self, node: ir.Node, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1)

    def Gemm(
        self, node: ir.Node, x: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> np.ndarray:
        assert node.attributes["transB"].as_int() == 1
        return np.asarray(x @ weight.T + bias)


def test_a_network_computes_what_its_codes_scales_and_zero_points_say(tmp_path: Path) -> None:
    model, samples = cnn(), samples_of(2, 3, 8, 8, count=4)
    before = model.clone()
    assert len(code_all(model, samples)) == 6
    codes = [o for node in model.graph for o in node.outputs if o.dtype == ir.DataType.UINT8]
    shown = model.clone()
    shown.graph.outputs.extend(
        o for node in shown.graph for o in node.outputs if o.dtype == ir.DataType.UINT8
    )
    step = max(scale_of(v) for node in model.graph for v in node.outputs if scale_of(v) < 1)

    for sample in samples:
        expected = Interpreter(model, sample).values
        written = Session(shown, Reference.AS_WRITTEN).run(sample)
        for value in codes:
            assert value.name is not None
            wanted, got = np.int64(expected[value.name]), np.int64(written[value.name])
            # A sum in float32 may fall on the other side of a tie, but not farther.
            assert np.abs(wanted - got).max() <= 1
            assert (wanted != got).mean() <= 0.01
        np.testing.assert_allclose(written["y"], expected["y"], rtol=0, atol=step)
        deployed = Session(model).run(sample)["y"]
        np.testing.assert_allclose(deployed, expected["y"], rtol=0, atol=2 * step)
        assert difference(before, model, sample) < FINE
    assert work(model, tmp_path) == {
        "QuantizeLinear": 1,
        "QLinearConv": 2,
        "QLinearAdd": 1,
        "QLinearGlobalAveragePool": 1,
        "Flatten": 1,
        "QGemm": 1,
    }


# ------------------------------------------------------------------ the interface

INTERFACES = [
    (f"c = {CONV} (x, w, b) y = {CONV} (c, v)", ["c", "y"]),
    (f"c = {CONV} (x, w, b) r = Relu(c) y = {CONV} (r, v)", ["r", "y"]),
    (f"c = {CONV} (x, w, b) r = Relu(c)", ["c", "r"]),
    (f"y = {CONV} (x, w, b) z = Tanh(x)", ["y", "z"]),
    (f"y = {CONV} (x, w, b) z = {CONV} (x, v)", ["z", "y"]),
    (f"c = {CONV} (x, w, b) y = {CONV} (c, w) z = {CONV} (c, v) t = Tanh(c)", ["y", "z", "t"]),
    (f"c = {CONV} (x, w, b) y = Transpose <perm = [0, 1, 3, 2]> (c)", ["y", "c"]),
    (f"c = {CONV} (x, w, b) y = Identity(c)", ["c", "y"]),
    (f"y = {CONV} (x, w, b) z = Identity(x)", ["y", "z"]),
    (f"c = {CONV} (x, w, b) d = {CONV} (x, v) y = Add(c, d) z = Relu(y)", ["c", "z", "y", "d"]),
    (f"c = {CONV} (x, w, b) y, z = Split <axis = 1, num_outputs = 2> (c)", ["y", "z"]),
    (f"c = {CONV} (x, w, b) y, z = Split <axis = 1, num_outputs = 2> (c)", ["z"]),
]


@pytest.mark.parametrize(("nodes", "outputs"), INTERFACES)
def test_outputs_keep_their_names(nodes: str, outputs: list[str]) -> None:
    shape = "float[1, C, 6, 6]"
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v, float[8] b)
            => ({", ".join(f"{shape} {name}" for name in outputs)}) {{ {nodes} }}
        """,
        w=normal(1, 8, 8, 3, 3),
        v=normal(3, 8, 8, 3, 3),
        b=normal(2, 8),
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)

    code_all(model, samples)

    assert [o.name for o in model.graph.outputs] == outputs
    assert [o.dtype for o in model.graph.outputs] == [ir.DataType.FLOAT] * len(outputs)
    assert [i.name for i in model.graph.inputs] == ["x"]
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 2.5


def test_a_value_is_quantized_once_for_all_that_read_it(tmp_path: Path) -> None:
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 8, 3, 3] v)
            => (float[1, 8, 6, 6] y, float[1, 8, 6, 6] z, float[1, 8, 6, 6] t)
        {{ t = Tanh(x) y = {CONV} (t, w) z = {CONV} (t, v) }}
        """,
        w=normal(1, 8, 8, 3, 3),
        v=normal(3, 8, 8, 3, 3),
    )
    code_all(model, samples_of(1, 8, 6, 6))

    assert work(model, tmp_path) == {
        "Tanh": 1,
        "QuantizeLinear": 1,
        "QLinearConv": 2,
        "DequantizeLinear": 2,
    }


def test_several_inputs_and_outputs() -> None:
    model = parse(
        """
        agraph (float[2, 8] x, float[N, 8] u, int64[3] k, float[8, 6] w, float[8, 6] v)
            => (float[2, 6] y, float[N, 6] z, float[3, 6] g)
        { y = MatMul(x, w) z = MatMul(u, v) g = Gather(z, k) }
        """,
        w=normal(1, 8, 6),
        v=normal(2, 8, 6),
    )
    before = model.clone()
    samples = [
        {"x": normal(n, 2, 8), "u": normal(n + 9, 4, 8), "k": np.array([0, 3, 1])} for n in range(3)
    ]

    code_all(model, samples)

    assert difference(before, model, samples[1]) < FINE


# ------------------------------------------------------------------ the pass as a whole

PAYING = """
agraph (float[{n}, 128, {size}, {size}] x, float[128, 128, 1, 1] w, float[128] b,
        float[128, 128, 1, 1] v) => (float[{n}, 128, {size}, {size}] y)
{{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}
"""
"""Two layers that are large enough for integers to pay."""

BOTH = {"Conv on 8-bit integers": 2}


def paying(n: str = "1", size: str = "6", **replaced: np.ndarray) -> ir.Model:
    weights = {
        "w": normal(1, 128, 128, 1, 1, scale=0.09),
        "v": normal(3, 128, 128, 1, 1, scale=0.09),
        "b": normal(2, 128),
    }
    return parse(PAYING.format(n=n, size=size), **{**weights, **replaced})


def paying_samples(count: int = 3, scale: float = 1.0) -> list[Sample]:
    return [{"x": normal(50 + n, 1, 128, 6, 6, scale=scale)} for n in range(count)]


def test_layers_that_pay_become_integers_and_a_second_application_finds_nothing(
    tmp_path: Path,
) -> None:
    model, samples = paying(), paying_samples()
    before = model.clone()

    assert quantize(model, samples).counts == BOTH
    assert work(model, tmp_path) == {**ENDS, "QLinearConv": 2}
    assert difference(before, model, samples[0]) < FINE

    change = assert_unchanged_with_samples(model, samples)
    assert change == {"its weight is computed at run time"}


def assert_unchanged_with_samples(model: ir.Model, samples: list[Sample]) -> set[str]:
    """The reasons why the pass changes nothing."""
    before = canonical(model)
    change = quantize(model, samples)
    assert not change
    assert canonical(model) == before
    return reasons(change)


def test_small_layers_stay_in_float() -> None:
    why = assert_unchanged_with_samples(cnn(), samples_of(2, 3, 8, 8))

    assert why == {"integers would be slower: its kernel, or the changes of form around it"}


def test_nothing_to_do_needs_no_samples() -> None:
    assert_unchanged(QuantizeStatic(), "agraph (float[2] x) => (float[2] y) { y = Relu(x) }")


@pytest.mark.parametrize(("n", "size"), [("N", "6"), ("N", "S")])
def test_dynamic_dimensions(n: str, size: str) -> None:
    model = paying(n, size)
    samples = paying_samples()
    if size == "S":
        samples = [*samples, {"x": normal(7, 1, 128, 5, 5)}]
    before = model.clone()

    assert quantize(model, samples).counts == BOTH

    assert difference(before, model, samples[-1]) < FINE
    if n == "N":
        empty = np.zeros((0, 128, 6, 6), np.float32)
        assert Session(model).run({"x": empty})["y"].shape == (0, 128, 6, 6)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    """In another process too, where sets have another order."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import onnx_ir as ir
from test_quantize_static import paying, paying_samples, quantize
model = paying()
quantize(model, paying_samples())
sys.stdout.buffer.write(ir.to_proto(model).SerializeToString())
"""
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    model = paying()
    quantize(model, paying_samples())

    assert ir.to_proto(model).SerializeToString() == other.stdout


def test_the_error_allowed_decides_how_many_layers_become_integers() -> None:
    assert quantize(paying(), paying_samples(), QuantizeStatic(error=1.0)).counts == BOTH

    change = quantize(paying(), paying_samples(), QuantizeStatic(error=ERROR_MINIMUM))
    assert not change
    assert all("makes changes the outputs by 0.0" in why for why in reasons(change))


@pytest.mark.parametrize("place", [0, 7, 14, 21, 28, 35])
def test_the_largest_numbers_are_held_also_where_few_samples_have_them(place: int) -> None:
    """One place in forty samples: hardly ever is it among the rows on which ranges are tried."""
    model, samples = paying(), paying_samples(40)
    loud = {"x": samples[20]["x"].copy()}
    loud["x"][0, :, place // 6, place % 6] *= 30
    samples[20] = loud
    before = model.clone()

    assert quantize(model, samples, QuantizeStatic(error=1.0)).counts == BOTH
    # 256 codes for thirty times the range; a range that clips leaves 0.86.
    assert difference(before, model, loud) < 0.06


def test_of_two_layers_the_one_that_harms_stays_in_float() -> None:
    """The output of a huge channel takes all codes, and another output is what counts."""
    model = parse(
        """
        agraph (float[1, 32, 10, 10] x, float[32, 32, 3, 3] w, float[32, 32, 3, 3] v,
                float[1, 32, 1, 1] k)
            => (float[1, 32, 10, 10] y, float[1, 32, 10, 10] z)
        {
            y = Conv <pads = [1, 1, 1, 1]> (x, w)
            u = Div(x, k)
            z = Conv <pads = [1, 1, 1, 1]> (u, v)
        }
        """,
        # The first channel of u is a thousand times the others, and no output reads it.
        w=normal(1, 32, 32, 3, 3, scale=0.06),
        v=normal(3, 32, 32, 3, 3, scale=0.06) * np.float32(np.arange(32) > 0)[:, None, None],
        k=np.float32(np.where(np.arange(32) == 0, 1e-3, 1.0)).reshape(1, 32, 1, 1),
    )
    before, samples = model.clone(), samples_of(1, 32, 10, 10)

    change = quantize(model, samples)

    assert change.counts == {"Conv on 8-bit integers": 1}
    assert [why for why in reasons(change) if "makes changes the outputs by" in why]
    assert difference(before, model, samples[0]) < FINE


def test_milder_forms_halve_the_error_and_end() -> None:
    one: QuantizeStatic | None = QuantizeStatic(error=0.05)
    errors = []
    while one is not None:
        errors.append(one.error)
        one = one.narrow()

    assert errors == [0.05 / 2**n for n in range(len(errors))]
    assert ERROR_MINIMUM <= errors[-1] < 2 * ERROR_MINIMUM
    assert QuantizeStatic(ERROR_MINIMUM).narrow() is None


# ------------------------------------------------------------------ bad input


def test_no_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "quantize-static needs samples; give --samples, or --random-samples N"
    with pytest.raises(SampleError, match=message):
        graphopt.optimize(ir.to_proto(paying()), passes="quantize-static", benchmark=False)

    graphopt.save(paying(), tmp_path / "m.onnx")
    arguments = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx")]
    monkeypatch.setattr(
        sys, "argv", ["graphopt", "optimize", *arguments, "--passes", "quantize-static"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"graphopt: error: {message}\n"
    assert not (tmp_path / "o.onnx").exists()


def test_the_pass_alone_says_it_too() -> None:
    model = paying()
    infer_shapes(model)

    with pytest.raises(SampleError, match="there are no samples"):
        QuantizeStatic().apply(model, Context(lambda: model))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_in_a_sample_that_is_none_keeps_all_in_float(number: float) -> None:
    bad = normal(0, 1, 128, 6, 6)
    bad[0, 3, 4, 5] = number

    why = assert_unchanged_with_samples(paying(), [*paying_samples(1), {"x": bad}])

    assert why == {
        "rounding what it reads or makes changes the outputs by inf, for little time saved"
    }


@pytest.mark.parametrize("number", [0.0, 3.0, -3.0, 1e-42])
def test_samples_of_one_number(number: float) -> None:
    model = sandwich("e = Relu(c)")
    samples = [{"x": np.full((1, 8, 6, 6), number, np.float32)}]
    before = model.clone()
    code_all(model, samples)

    for reference in Reference:
        assert np.isfinite(Session(model, reference).run(samples[0])["y"]).all()
    assert difference(before, model, samples[0]) < FINE


def test_samples_without_numbers_say_nothing() -> None:
    empty = np.zeros((0, 128, 6, 6), np.float32)

    why = assert_unchanged_with_samples(paying("N"), [{"x": empty}])
    assert why == {"no sample has numbers where it reads or writes"}

    assert quantize(paying("N"), [{"x": empty}, *paying_samples()]).counts == BOTH


def dead(weight: np.ndarray) -> np.ndarray:
    """The weight with an output that is 0 and an input that nothing reads."""
    weight = weight.copy()
    weight[3], weight[:, 5] = 0.0, 0.0
    return weight


W = normal(1, 8, 8, 3, 3, scale=0.1)
B = normal(2, 8)


@pytest.mark.parametrize(
    ("w", "b"),
    [
        (np.zeros_like(W), B),
        (np.zeros_like(W), np.zeros_like(B)),
        (dead(W), B),
        (dead(W), np.zeros_like(B)),
        (W * np.float32(1e30), B),
        (W * np.float32(1e30), B * np.float32(1e30)),
        (W * np.float32(1e-30), B),
        # Subnormal.
        (W * np.float32(1e-41), B),
        # Beyond int32 in units of input scale times weight scale.
        (W, B * np.float32(1e9)),
        (W * np.float32(1e-5), B * np.float32(1e5)),
        (W, np.float32([1e12, 0, 0, 0, 0, 0, 0, -1e12])),
    ],
)
def test_weights_and_biases_of_any_size(w: np.ndarray, b: np.ndarray) -> None:
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8] b) => (float[1, 8, 6, 6] y)
        {{ y = {CONV} (x, w, b) }}
        """,
        w=w,
        b=b,
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)

    code_all(model, samples)

    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 1.5


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_activations_whose_squares_overflow() -> None:
    model, samples = paying(b=np.zeros(128, np.float32)), paying_samples(scale=1e30)
    before = model.clone()

    assert quantize(model, samples).counts == BOTH

    assert difference(before, model, samples[0]) < FINE


def test_a_single_sample() -> None:
    model, samples = paying(), paying_samples(1)
    before = model.clone()

    assert quantize(model, samples).counts == BOTH
    assert difference(before, model, samples[0]) < FINE


@pytest.mark.parametrize(("place", "number"), [("w", np.nan), ("b", np.inf)])
def test_a_weight_or_bias_that_is_not_finite(place: str, number: float) -> None:
    array = {"w": normal(1, 128, 128, 1, 1, scale=0.09), "b": normal(2, 128)}[place]
    array.reshape(-1)[7] = number
    samples = [{"x": np.abs(normal(0, 1, 128, 6, 6))}]

    why = assert_unchanged_with_samples(paying(**{place: array}), samples)

    assert "its weight or bias is not finite" in why


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_operand_that_is_not_finite_keeps_its_node_in_float(number: float) -> None:
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w, float k)
            => (float[1, 8, 6, 6] c, float[1, 8, 6, 6] y) {{ c = {CONV} (x, w) y = Mul(c, k) }}
        """,
        w=W,
        k=np.float32(number),
    )

    assert code_all(model, samples_of(1, 8, 6, 6)) == ["Conv"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("float16", "it computes in FLOAT16, not in float32"),
        ("double", "it computes in DOUBLE, not in float32"),
        ("int32", "it computes in INT32, not in float32"),
    ],
)
def test_other_element_types(kind: str, reason: str) -> None:
    dtype = {"float16": np.float16, "double": np.float64, "int32": np.int32}[kind]
    text = f"agraph ({kind}[5, 8] x, {kind}[8, 6] w) => ({kind}[5, 6] y) {{ y = MatMul(x, w) }}"
    model = parse(text, w=(4 * normal(1, 8, 6)).astype(dtype))
    samples: list[Sample] = [{"x": (4 * normal(2, 5, 8)).astype(dtype)}]

    assert assert_unchanged_with_samples(model, samples) == {reason}


def test_integer_inputs_that_pick_rows(tmp_path: Path) -> None:
    model = parse(
        """
        agraph (int64[5] x, float[9, 8] t, float[8, 6] w) => (float[5, 6] y)
        { e = Gather(t, x) y = MatMul(e, w) }
        """,
        t=normal(1, 9, 8),
        w=normal(2, 8, 6),
    )
    before, samples = model.clone(), [{"x": np.arange(5) + n} for n in range(4)]
    code_all(model, samples)

    assert work(model, tmp_path) == {"Gather": 1, "QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert difference(before, model, samples[0]) < FINE


def test_layers_that_share_a_weight(tmp_path: Path) -> None:
    model = parse(
        f"""
        agraph (float[1, 8, 6, 6] x, float[8, 8, 3, 3] w) => (float[1, 8, 6, 6] y)
        {{ c = {CONV} (x, w) y = {CONV} (c, w) }}
        """,
        w=W,
    )
    before, samples = model.clone(), samples_of(1, 8, 6, 6)
    code_all(model, samples)

    assert work(model, tmp_path) == {**ENDS, "QLinearConv": 2}
    assert difference(before, model, samples[0]) < FINE


def test_a_quantized_model_passes_through() -> None:
    model = parse(
        """
        agraph (float[5, 8] x, int8[8, 6] q, float s, float[6, 6] v) => (float[5, 6] y)
        <float t = {0.02}, uint8 z = {128}>
        {
            c = QuantizeLinear(x, t, z) n = DequantizeLinear(c, t, z)
            w = DequantizeLinear(q, s) m = MatMul(n, w) y = MatMul(m, v)
        }
        """,
        q=np.int8(40 * normal(1, 8, 6)),
        s=np.float32(0.01),
        v=normal(2, 6, 6),
    )
    before, samples = model.clone(), samples_of(5, 8)

    assert code_all(model, samples) == ["MatMul"]

    assert difference(before, model, samples[0]) < FINE


def test_an_old_opset_is_refused() -> None:
    model = paying()
    model.opset_imports[""] = 12
    context = Context(lambda: model)

    assert QuantizeStatic().refuse(model, context) == (
        "opset 12 has no scales by channel; raise it to 13 or more"
    )
    model.opset_imports[""] = 13
    assert QuantizeStatic().refuse(model, context) is None


def test_values_without_names_and_with_odd_ones() -> None:
    for names in (None, None), ("scale_0", "a/b: é\"'\n%s{}"):
        model = paying()
        for node, name in zip(model.graph, (*names, "y"), strict=True):
            node.name, node.outputs[0].name = None, name

        run = graphopt.optimize(
            model, passes="quantize-static", samples=paying_samples(2), benchmark=False
        )

        assert run.steps[0].verdict == "kept"
        assert [o.name for o in run.model.graph.outputs] == ["y"]


def test_a_run_leaves_the_old_weights_behind_and_onnx_reads_the_file(tmp_path: Path) -> None:
    run = graphopt.optimize(
        paying(), passes="quantize-static", samples=paying_samples(), benchmark=False
    )
    run.save(tmp_path / "o.onnx")

    onnx.checker.check_model(tmp_path / "o.onnx", full_check=True)
    assert run.steps[0].bytes_after < 0.35 * run.steps[0].bytes_before
