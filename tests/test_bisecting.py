"""Seeded faults, found by name; onnxruntime itself runs what is written, apart from graphopt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import Bisection, Change, Context, Effect, Pass
from graphopt.errors import GraphoptError, ModelError, SpecError
from graphopt.rewriting import Names, replace_value
from graphopt.testing import parse

ort = pytest.importorskip("onnxruntime")

NETWORK = """
agraph (float[N, 3, 6, 6] image, float[4, 3, 3, 3] w1, float[4] scale, float[4] shift,
        float[4] mean, float[4] variance, float[4, 4, 3, 3] w2, float[4] b2, float[36, 36] w3,
        float[36, 5] w4, float[5] b4) => (float[N, 4, 5] scores, int64[N, 4] classes)
{
    conv1 = Conv <pads = [1, 1, 1, 1]> (image, w1)
    norm1 = BatchNormalization <epsilon = 0.001> (conv1, scale, shift, mean, variance)
    relu1 = Relu (norm1)
    conv2 = Conv <pads = [1, 1, 1, 1]> (relu1, w2, b2)
    sum2 = Add (conv2, relu1)
    relu2 = Relu (sum2)
    turned = Transpose <perm = [0, 2, 3, 1]> (relu2)
    again = Transpose <perm = [0, 2, 3, 1]> (turned)
    back = Transpose <perm = [0, 2, 3, 1]> (again)
    flat_shape = Constant <value = int64[3] {0, 4, 36}> ()
    flat = Reshape (back, flat_shape)
    half = Constant <value = float {0.5}> ()
    quarter = Mul (half, half)
    damped = Mul (flat, quarter)
    mixed = MatMul (damped, w3)
    curved = Tanh (mixed)
    read = MatMul (curved, w4)
    scores = Add (read, b4)
    classes = ArgMax <axis = 2, keepdims = 0> (scores)
}
"""


def network(seed: int = 0) -> ir.Model:
    generator = np.random.default_rng(seed)

    def normal(*shape: int, by: float = 0.3) -> np.ndarray:
        return (by * generator.standard_normal(shape)).astype(np.float32)

    return parse(
        NETWORK,
        w1=normal(4, 3, 3, 3),
        scale=1 + normal(4),
        shift=normal(4),
        mean=normal(4),
        variance=(0.5 + generator.random(4)).astype(np.float32),
        w2=normal(4, 4, 3, 3),
        b2=1 + normal(4),
        w3=normal(36, 36),
        w4=normal(36, 5),
        b4=normal(5),
    )


def images(count: int = 6) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [
        {"image": generator.standard_normal((2, 3, 6, 6)).astype(np.float32)} for _ in range(count)
    ]


def node(model: ir.Model, name: str) -> ir.Node:
    """The node that makes a value."""
    return next(n for n in model.graph if any(o.name == name for o in n.outputs))


def done(what: str) -> Change:
    change = Change()
    change.count(what)
    return change


def array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


# ------------------------------------------------------------------ five passes with a fault


@dataclass(frozen=True)
class WrongBatchnorm(Pass):
    """Fold a BatchNormalization into its Conv, and forget the root of the variance."""

    name: ClassVar[str] = "wrong-batchnorm"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        for norm in [n for n in model.graph if n.op_type == "BatchNormalization"]:
            conv = norm.inputs[0].producer() if norm.inputs[0] is not None else None
            if conv is None or conv.op_type != "Conv":
                continue
            scale, shift, mean, variance = map(array, norm.inputs[1:])
            factor = scale / (variance + np.float32(0.001))
            names = Names(model)
            weight = array(conv.inputs[1]) * factor.reshape(-1, 1, 1, 1)
            folded = context.initializer(model.graph, weight, names.new("folded"))
            bias = context.initializer(model.graph, shift - mean * factor, names.new("bias"))
            conv.replace_input_with(1, folded)
            conv.resize_inputs(3)
            conv.replace_input_with(2, bias)
            replace_value(norm.outputs[0], conv.outputs[0])
            model.graph.remove(norm, safe=True)
            change.count("BatchNormalization folded")
        return change


@dataclass(frozen=True)
class DropBias(Pass):
    """Drop biases that are not zero."""

    name: ClassVar[str] = "drop-bias"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        for conv in [n for n in model.graph if n.op_type == "Conv" and len(n.inputs) == 3]:
            conv.replace_input_with(2, None)
            conv.resize_inputs(2)
            change.count("bias dropped")
        return change


@dataclass(frozen=True)
class WrongTransposes(Pass):
    """Make two Transposes one, of the first permutation."""

    name: ClassVar[str] = "wrong-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        for second in [n for n in model.graph if n.op_type == "Transpose"]:
            first = second.inputs[0].producer() if second.inputs[0] is not None else None
            if first is None or first.op_type != "Transpose" or change:
                continue
            second.replace_input_with(0, first.inputs[0])
            wrong = ir.AttrInt64s("perm", [0, 2, 1, 3])
            second.attributes["perm"] = wrong
            model.graph.remove(first, safe=True)
            change.count("Transposes merged")
        return change


@dataclass(frozen=True)
class WrongFold(Pass):
    """Fold a Mul of constants into their sum."""

    name: ClassVar[str] = "wrong-fold"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def apply(self, model: ir.Model, context: Context) -> Change:
        product = node(model, "quarter")
        folded = context.initializer(
            model.graph, np.asarray(1.0, np.float32), Names(model).new("folded")
        )
        replace_value(product.outputs[0], folded)
        model.graph.remove(product, safe=True)
        return done("node folded")


@dataclass(frozen=True)
class WrongScale(Pass):
    """Round what a node makes to 8-bit integers of a scale that is far too small."""

    value: str = "curved"
    scale: float = 0.001

    name: ClassVar[str] = "wrong-scale"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.05

    def apply(self, model: ir.Model, context: Context) -> Change:
        made = node(model, self.value)
        value = made.outputs[0]
        readers = list(value.uses())
        names = Names(model)
        scale = context.initializer(
            model.graph, np.asarray(self.scale, np.float32), names.new("scale")
        )
        zero = context.initializer(model.graph, np.asarray(0, np.int8), names.new("zero"))
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name="quantize")
        quantize.outputs[0].name = names.new("codes")
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        dequantize.outputs[0].name = names.new("widened")
        model.graph.insert_after(made, [quantize, dequantize])
        for use in readers:
            use.node.replace_input_with(use.idx, dequantize.outputs[0])
        return done("value rounded")


@dataclass(frozen=True)
class Harmless(Pass):
    """Add a doc string."""

    name: ClassVar[str] = "harmless"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        model.doc_string = "seen"
        return done("doc string added")


def run_files(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """What both written models give, by onnxruntime alone, and what is written as expected."""
    inputs = dict(np.load(folder / "inputs.npz"))
    found = []
    for name in ("before.onnx", "after.onnx"):
        onnx.checker.check_model(onnx.load(folder / name))
        session = ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        assert {i.name for i in session.get_inputs()} == set(inputs)
        found.append(session.run(None, inputs))
    return found[0], found[1], list(dict(np.load(folder / "expected.npz")).values())


def assert_reproduced(found: Bisection, folder: Path, least: float) -> None:
    """The reproducer has at most 10 nodes and is wrong by at least so much (relative L2)."""
    assert found.reproducer is not None, found.notes
    found.save(folder)
    right, wrong, expected = run_files(folder)
    for name in ("before.onnx", "after.onnx"):
        assert len(onnx.load(folder / name).graph.node) <= 10
    for one, other in zip(right, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(right, wrong, strict=True)]
    assert max(errors) >= least
    again = graphopt.validate(
        folder / "before.onnx",
        folder / "after.onnx",
        samples=folder / "inputs.npz",
        max_error=found.reproducer.max_error,
    )
    assert again.failure is not None


@pytest.mark.parametrize(
    ("faulty", "operator", "value"),
    [
        (WrongBatchnorm(), "Conv", "norm1"),
        (DropBias(), "Conv", "conv2"),
        (WrongTransposes(), "Transpose", "again"),
        (WrongFold(), "Mul", "damped"),
        (WrongScale(), "DequantizeLinear", "curved"),
    ],
    ids=lambda one: one.name if isinstance(one, Pass) else str(one),
)
def test_a_fault_is_found_by_pass_and_node(
    faulty: Pass, operator: str, value: str, tmp_path: Path
) -> None:
    passes = [Harmless(), "drop-identity", faulty, "drop-unused"]

    found = graphopt.bisect(network(), passes=passes, samples=images())

    assert found.guilty == str(faulty)
    assert found.reason is not None
    assert [trial.verdict for trial in found.trials] == ["within", "unchanged", "over"]
    assert found.origin is not None
    assert (found.origin.operator, found.origin.value_before) == (operator, value)
    assert found.origin.begins
    assert_reproduced(found, tmp_path / "reproducer", 0.02)


def test_the_same_fault_is_found_between_two_models(tmp_path: Path) -> None:
    wrong = network()
    DropBias().apply(wrong, Context(network))

    found = graphopt.bisect(network(), wrong, samples=images())

    assert found.guilty is None and not found.trials
    assert found.origin is not None and found.origin.value == "conv2"
    assert found.origin.causes == ("input 2 (b2) is gone",)
    assert_reproduced(found, tmp_path / "reproducer", 0.05)
    errors = {one.pair.before: (one.total, one.own) for one in found.deviations}
    assert errors["relu1"][0].identical
    assert not errors["mixed"][0].identical and errors["mixed"][1].identical


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    found = graphopt.bisect(network(), recipe="basic", samples=images())

    assert not found.found and found.reproducer is None
    assert {trial.verdict for trial in found.trials} == {"within", "unchanged"}
    assert not graphopt.bisect(network(), network(), samples=images()).found


def test_the_fault_of_a_registered_pass_shows_on_its_part_alone(tmp_path: Path) -> None:
    found = graphopt.bisect(
        network(), passes="prune-magnitude{sparsity=0.9}", samples=images(), max_error=0.01
    )

    assert found.guilty == "prune-magnitude{sparsity=0.9}"
    made = found.reproducer
    assert made is not None and made.passes == found.guilty
    found.save(tmp_path)
    again = graphopt.bisect(
        tmp_path / "before.onnx",
        passes=made.passes,
        samples=tmp_path / "inputs.npz",
        max_error=made.budget,
    )
    assert again.guilty == found.guilty


# ------------------------------------------------------------------ numeric trouble

OVERFLOWING = """
agraph (float[N, 8] x, float[8, 8] w) => (float[N, 8] large, float[N, 8] y)
{
    mixed = MatMul (x, w)
    large = Mul (mixed, mixed)
    mean = ReduceMean <keepdims = 1> (large)
    root = Sqrt (mean)
    y = Div (mixed, root)
}
"""

HALVED = """
agraph (float[N, 8] x, float16[8, 8] w) => (float16[N, 8] large, float[N, 8] y)
{
    x_half = Cast <to = 10> (x)
    mixed = MatMul (x_half, w)
    large = Mul (mixed, mixed)
    mean = ReduceMean <keepdims = 1> (large)
    root = Sqrt (mean)
    y_half = Div (mixed, root)
    y = Cast <to = 1> (y_half)
}
"""


def test_overflow_of_float16_is_named_with_the_range_of_the_original(tmp_path: Path) -> None:
    weight = np.diag(np.linspace(50, 300, 8)).astype(np.float32)
    first, second = parse(OVERFLOWING, w=weight), parse(HALVED, w=weight.astype(np.float16))
    samples = [{"x": np.full((1, 8), 1.2, np.float32)}]

    found = graphopt.bisect(first, second, samples=samples, max_error=0.01)

    assert found.origin is not None
    assert (found.origin.operator, found.origin.value) == ("Mul", "large")
    (cause,) = found.origin.causes
    assert "infinity appears in 3 of 8 elements" in cause
    assert "largest magnitude is 129,600, over 65,504, the largest of float16" in cause
    made = found.reproducer
    assert made is not None and made.nodes <= 2
    found.save(tmp_path)
    session = ort.InferenceSession(tmp_path / "after.onnx", providers=["CPUExecutionProvider"])
    inputs = {n: a.astype(np.float16) for n, a in np.load(tmp_path / "inputs.npz").items()}
    assert np.isinf(session.run(None, inputs)[0]).any()


def test_a_range_that_clips_is_named_with_what_it_clips() -> None:
    wrong = network()
    WrongScale().apply(wrong, Context(network))

    found = graphopt.bisect(network(), wrong, samples=images(), max_error=0.05)

    assert found.origin is not None
    assert found.origin.nodes[0] == "QuantizeLinear 'quantize'"
    (cause,) = found.origin.causes
    assert "scale 0.001 of int8 gives the range [-0.128, 0.127]" in cause
    assert "of them are clipped" in cause


def test_a_range_that_is_far_too_wide_is_named() -> None:
    wrong = network()
    WrongScale(scale=50.0).apply(wrong, Context(network))

    found = graphopt.bisect(network(), wrong, samples=images(), max_error=0.05)

    assert found.origin is not None
    assert "of its codes" in found.origin.causes[0]


# ------------------------------------------------------------------ what passes do besides


@dataclass(frozen=True)
class Raise(Pass):
    """Raise an error where there is a Tanh."""

    name: ClassVar[str] = "raise-error"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        if any(n.op_type == "Tanh" for n in model.graph):
            raise ZeroDivisionError("no curve")
        return Change()


@dataclass(frozen=True)
class Misname(Pass):
    """Make a Tanh an operator that does not exist."""

    name: ClassVar[str] = "misname"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        for one in [n for n in model.graph if n.op_type == "Tanh"]:
            one.op_type = "Curve"
            change.count("operator changed")
        return change


@dataclass(frozen=True)
class RenameOutput(Pass):
    """Give the first output another name."""

    name: ClassVar[str] = "rename-output"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        model.graph.outputs[0].name = "renamed"
        return done("output renamed")


@pytest.mark.parametrize(
    ("faulty", "why"),
    [
        (Raise(), "it raised ZeroDivisionError: no curve"),
        (Misname(), "the checker rejects it"),
        (RenameOutput(), "the outputs are now renamed"),
    ],
)
def test_a_pass_that_breaks_the_model_is_found(faulty: Pass, why: str, tmp_path: Path) -> None:
    found = graphopt.bisect(network(), passes=[Harmless(), faulty], samples=images(2))

    assert found.guilty == faulty.name
    assert found.reason is not None and why in found.reason
    assert found.origin is None
    made = found.reproducer
    assert made is not None and made.after is None
    found.save(tmp_path)
    assert len(onnx.load(tmp_path / "before.onnx").graph.node) == 1
    assert not (tmp_path / "after.onnx").exists()


@dataclass(frozen=True)
class Nudge(Pass):
    """Change a weight by a little less than rounding may."""

    weight: str = "w3"

    name: ClassVar[str] = "nudge"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.05

    def apply(self, model: ir.Model, context: Context) -> Change:
        value = model.graph.initializers[self.weight]
        value.const_value = ir.tensor(array(value) * np.float32(1.04), name=self.weight)
        return done("weight changed")


def test_errors_that_only_add_up_are_told_from_a_guilty_pass() -> None:
    passes = [Nudge("w4"), Nudge("w3"), Nudge("w4"), Nudge("w3")]

    alone = [graphopt.bisect(network(), passes=[one], samples=images()) for one in passes[:2]]
    found = graphopt.bisect(network(), passes=passes, samples=images())

    assert not any(one.found for one in alone)
    assert found.guilty is None and found.reason is not None
    assert "no pass is over its tolerance by itself" in found.reason
    assert "adds up" in [trial.verdict for trial in found.trials]
    assert "over" not in [trial.verdict for trial in found.trials]
    assert found.origin is not None


# ------------------------------------------------------------------ other kinds of models

BRANCHES = """
agraph (float[2] x, bool c) => (float[2] y, int64[1] place)
{
    a = Abs (x)
    b = If (c) <
        then_branch = yes () => (float[2] p) { p = Exp (a) },
        else_branch = no () => (float[2] q) { q = Neg (a) }
    >
    d = Identity (b)
    y = Mul (d, a)
    place = ArgMax <axis = 0> (y)
}
"""


def test_a_fault_in_a_body_is_found_at_the_node_that_has_it(tmp_path: Path) -> None:
    wrong = parse(BRANCHES.replace("Exp", "Sin"))
    samples = [
        {"x": np.asarray([1, -2], np.float32), "c": np.asarray(taken)} for taken in (True, False)
    ]

    found = graphopt.bisect(parse(BRANCHES), wrong, samples=samples)

    assert found.origin is not None
    assert (found.origin.operator, found.origin.value) == ("If", "b")
    assert_reproduced(found, tmp_path / "reproducer", 0.05)


LOOP = """
agraph (float[2] x) => (float[2] y)
{
    count = Constant <value = int64 {3}> ()
    go = Constant <value = bool {1}> ()
    a = Abs (x)
    b = Loop (count, go, a) <
        body = step (int64 i, bool going, float[2] held) => (bool still, float[2] next)
        { still = Identity (going)  sum = Add (held, x)  next = Sqrt (sum) }
    >
    y = Neg (b)
}
"""


def test_a_loop_that_reads_outer_values_is_cut_out_with_them(tmp_path: Path) -> None:
    wrong = parse(LOOP.replace("Add (held, x)", "Add (held, held)"))
    samples = [{"x": np.asarray([1, 2], np.float32)}]

    found = graphopt.bisect(parse(LOOP), wrong, samples=samples)

    assert found.origin is not None and found.origin.operator == "Loop"
    assert set(found.origin.reads) == {"a", "x"}
    assert_reproduced(found, tmp_path / "reproducer", 0.05)


def test_an_output_of_integers_that_is_wrong_is_enough() -> None:
    wrong = parse(BRANCHES.replace("ArgMax", "ArgMin"))
    samples = [{"x": np.asarray([1, -2], np.float32), "c": np.asarray(True)}]

    found = graphopt.bisect(parse(BRANCHES), wrong, samples=samples)

    assert found.reason == "output 'place' has other values"
    assert found.origin is not None and found.origin.operator == "ArgMin"


STATEFUL = """
agraph (float[2] x, float[2] hidden_in) => (float[2] y, float[2] hidden_out)
{
    sum = Add (x, hidden_in)
    hidden_out = Tanh (sum)
    y = Exp (hidden_out)
}
"""


def test_a_stateful_model_is_looked_at_with_the_state_of_the_original() -> None:
    state = [("hidden_out", "hidden_in")]
    generator = np.random.default_rng(0)
    samples = [{"x": generator.standard_normal(2).astype(np.float32)} for _ in range(5)]

    wrong = parse(STATEFUL.replace("Tanh", "Sin"))
    found = graphopt.bisect(parse(STATEFUL), wrong, samples=samples, state=state)

    assert found.origin is not None
    assert (found.origin.operator, found.origin.value) == ("Sin", "hidden_out")
    assert found.reproducer is not None and found.reproducer.nodes == 1


def test_a_random_model_is_refused() -> None:
    model = parse(
        "agraph (float[2] x) => (float[2] y) { r = RandomNormalLike (x)  y = Add (x, r) }"
    )

    with pytest.raises(ModelError, match=r"is random \(RandomNormalLike\).*chance"):
        graphopt.bisect(model, passes="drop-unused", random_samples=2)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "give either a second model, or the passes"),
        ({"passes": "drop-unused", "optimized": network()}, "give either a second model"),
        ({"passes": "drop-unsed"}, "did you mean"),
        ({"passes": "drop-unused", "recipe": "basic"}, "not both"),
        ({"passes": "drop-unused", "max_error": "nope:0.1"}, "no output 'nope'"),
    ],
)
def test_what_is_asked_wrongly_is_said(arguments: Mapping[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        graphopt.bisect(network(), random_samples=1, **arguments)


def test_models_of_other_inputs_are_refused() -> None:
    other = parse("agraph (float[2] z) => (float[2] y) { y = Neg (z) }")

    with pytest.raises(GraphoptError, match="must take the same inputs"):
        graphopt.bisect(network(), other, samples=images())


def test_an_output_that_is_missing_is_harm() -> None:
    wrong = network()
    del wrong.graph.outputs[1]

    found = graphopt.bisect(network(), wrong, samples=images(2))

    assert found.reason == "output 'classes' is missing"


def test_a_budget_of_one_output_is_not_asked_of_parts(tmp_path: Path) -> None:
    found = graphopt.bisect(
        network(), passes=[WrongScale()], samples=images(), max_error=["scores:0.01", "classes:1"]
    )

    assert found.guilty == str(WrongScale())
    assert found.reproducer is not None and found.reproducer.budget == "0.01"
    assert_reproduced(found, tmp_path / "reproducer", 0.01)


def test_weights_in_external_data_go_into_the_reproducer(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    graphopt.save(network(), source, external_data=True)

    found = graphopt.bisect(source, passes=[DropBias()], samples=images())

    assert found.origin is not None and found.origin.value == "conv2"
    assert_reproduced(found, tmp_path / "reproducer", 0.1)
