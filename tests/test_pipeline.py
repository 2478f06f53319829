"""The gate at work: what breaks a model is rolled back, and the run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from generated import generate, runs_as_written

import graphopt
from graphopt import Change, CheckFailed, Context, Effect, Pass
from graphopt.errors import SpecError
from graphopt.gate import Gate, computed_in_half, interface_of
from graphopt.ledger import size_of
from graphopt.pipeline import Pipeline
from graphopt.recipes import plan
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse
from graphopt_passes.simplify.drop_unused import DropUnused

MODEL = """
agraph (float[2, 3] x) => (float[2, 3] y)
<float[3] w = {1.0, 2.0, 3.0}, float[2] dead = {0.0, 0.0}>
{
    a = Mul(x, w)
    y = Relu(a)
}
"""


def model() -> ir.Model:
    return parse(MODEL)


def node(model: ir.Model, op_type: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op_type)


@dataclass(frozen=True)
class BreakNumerics(Pass):
    """Multiply by other weights than the model's."""

    name: ClassVar[str] = "break-numerics"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def apply(self, model: ir.Model, context: Context) -> Change:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name="w")
        change = Change()
        change.count("weight changed")
        return change


@dataclass(frozen=True)
class RoundWeights(BreakNumerics):
    """The same, declared to be lossy, so that a budget decides."""

    name: ClassVar[str] = "round-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.05


@dataclass(frozen=True)
class EmitInvalid(Pass):
    """Leave a node that reads nothing although its operator needs an input."""

    name: ClassVar[str] = "emit-invalid"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        node(model, "Relu").op_type = "NoSuchOperator"
        change = Change()
        change.count("operator renamed")
        return change


@dataclass(frozen=True)
class RaiseError(Pass):
    """Fail half-way, after it has changed the model."""

    name: ClassVar[str] = "raise-error"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        node(model, "Relu").op_type = "Neg"
        raise ZeroDivisionError("half-way")


@dataclass(frozen=True)
class RenameOutput(Pass):
    """Give the output another name."""

    name: ClassVar[str] = "rename-output"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        model.graph.outputs[0].name = "renamed"
        change = Change()
        change.count("output renamed")
        return change


@dataclass(frozen=True)
class DoSilently(Pass):
    """Break the model and report no change."""

    name: ClassVar[str] = "do-silently"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        node(model, "Relu").op_type = "Neg"
        return Change()


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """Scale the weights by 1 + `by`; half of it when that is too much."""

    name: ClassVar[str] = "scale-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.011

    by: float = 0.04

    def apply(self, model: ir.Model, context: Context) -> Change:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        factor = np.float32(1 + self.by)
        value.const_value = ir.tensor(value.const_value.numpy() * factor, name="w")
        change = Change()
        change.count("weight scaled")
        return change

    def narrow(self) -> Pass | None:
        return ScaleWeights(self.by / 2) if self.by > 0.001 else None


@dataclass(frozen=True)
class BreakFunction(Pass):
    """Change what a function computes, and fail."""

    name: ClassVar[str] = "break-function"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        for function in model.functions.values():
            function.graph[0].op_type = "Neg"
        raise ZeroDivisionError("half-way")


BREAKERS = [
    (BreakNumerics(), "output 'y' has relative L2 error"),
    (EmitInvalid(), "the checker rejects it: No Op registered for NoSuchOperator"),
    (RaiseError(), "it raised ZeroDivisionError: half-way"),
    (RenameOutput(), "the outputs are now renamed; they were y"),
]


@pytest.mark.parametrize(("breaker", "reason"), BREAKERS, ids=[b.name for b, _ in BREAKERS])
def test_what_breaks_is_rolled_back_and_the_run_goes_on(
    breaker: Pass, reason: str, tmp_path: object
) -> None:
    run = graphopt.optimize(model(), passes=[breaker, DropUnused()], benchmark=False)

    rejected, following = run.steps
    assert rejected.verdict == "rolled back"
    assert rejected.reason is not None and rejected.reason.startswith(reason)
    assert following.kept and following.changes == {"initializer removed": 1}
    assert all(e.identical for errors in run.numerics.values() for e in errors)
    path = f"{tmp_path}/out.onnx"
    run.save(path)
    x = np.float32([[1, -1, 2], [-2, 3, -3]])
    assert np.array_equal(
        Session(graphopt.load(path)).run({"x": x})["y"], np.maximum(x * np.float32([1, 2, 3]), 0)
    )


@pytest.mark.parametrize("breaker", [b for b, _ in BREAKERS], ids=lambda b: b.name)
def test_strict_stops_at_what_breaks(breaker: Pass) -> None:
    with pytest.raises(CheckFailed, match=f"{breaker.name} was rejected"):
        graphopt.optimize(model(), passes=[breaker], benchmark=False, strict=True)


def test_without_validation_the_structure_is_still_judged() -> None:
    run = graphopt.optimize(
        model(), passes=[EmitInvalid(), RenameOutput()], validate=False, benchmark=False
    )

    assert [s.verdict for s in run.steps] == ["rolled back", "rolled back"]
    assert run.numerics == {}
    assert any(n.startswith("not validated") for n in run.notes)


@dataclass(frozen=True)
class CountOriginal(Pass):
    """Tell how many initializers the model had, and change something so that it is listed."""

    name: ClassVar[str] = "count-original"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        model.graph.doc_string = "seen"
        change.count("initializer of the original", len(context.original.graph.initializers))
        return change


@pytest.mark.parametrize("form", ["file", "bytes", "proto", "model"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_pass_may_look_at_the_original(form: str, validate: bool, tmp_path: Path) -> None:
    """Also where there is no second copy of the graph until a pass asks for it."""
    proto = ir.to_proto(model())
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    forms = {"file": path, "bytes": path.read_bytes(), "proto": proto, "model": model()}
    given = forms[form]

    run = graphopt.optimize(
        given, passes=[DropUnused(), CountOriginal()], validate=validate, benchmark=False
    )

    assert [dict(s.changes) for s in run.steps] == [
        {"initializer removed": 1},
        {"initializer of the original": 2},
    ]
    assert list(run.model.graph.initializers) == ["w"]
    if isinstance(given, ir.Model):
        assert list(given.graph.initializers) == ["w", "dead"]


@pytest.mark.parametrize("in_file", [True, False])
def test_without_validation_a_run_that_fails_starts_anew(in_file: bool, tmp_path: Path) -> None:
    """From the model as it was, not as the passes had left it; nodes in order again."""
    given = model()
    given.graph.sort()
    first, second = given.graph
    given.graph.remove(first)
    given.graph.insert_after(second, first)
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(given).SerializeToString())

    run = graphopt.optimize(
        path if in_file else path.read_bytes(),
        passes=[DropUnused(), EmitInvalid()],
        validate=False,
        benchmark=False,
    )

    assert [s.verdict for s in run.steps] == ["kept", "rolled back"]
    assert [n.op_type for n in run.model.graph] == ["Mul", "Relu"]
    assert list(run.model.graph.initializers) == ["w"]


def test_who_found_nothing_is_asked_again_where_more_is_known() -> None:
    """The rank of the Reshape is known only after its shape was folded and inferred again."""
    given = parse(
        """
        <ir_version: 10, opset_import: ["" : 13]>
        agraph (float[2, 4, 6, 6] x) => (float[2, 144] y)
        <int64[1] first = {0}, float e = {0.5}>
        {
            s = Shape(x)
            rest = Constant <value = int64[1] {144}> ()
            n = Gather <axis = 0> (s, first)
            t = Concat <axis = 0> (n, rest)
            r = Reshape(x, t)
            m = ReduceMean <axes = [-1]> (r)
            c = Sub(r, m)
            q = Mul(c, c)
            v = ReduceMean <axes = [-1]> (q)
            a = Add(v, e)
            d = Sqrt(a)
            y = Div(c, d)
        }
        """
    )

    run = graphopt.optimize(given, validate=False, benchmark=False)

    assert [n.op_type for n in run.model.graph] == ["Reshape", "LayerNormalization"]


def test_a_change_that_is_not_reported_is_not_kept() -> None:
    run = graphopt.optimize(model(), passes=[DoSilently(), DropUnused()], benchmark=False)

    assert [s.verdict for s in run.steps] == ["unchanged", "kept"]
    assert [n.op_type for n in run.model.graph] == ["Mul", "Relu"]


@pytest.mark.parametrize(("kind", "told"), [("float16", True), ("float", False)])
def test_that_exact_is_judged_within_rounding_in_half_precision_is_told(
    kind: str, told: bool
) -> None:
    given = parse(
        f"agraph ({kind}[2] x) => ({kind}[2] y) {{ a = Identity(x)  b = Exp(a)  y = Neg(b) }}"
    )

    run = graphopt.optimize(given, passes="drop-identity", benchmark=False)

    assert run.steps[0].kept
    assert any(note.startswith("half precision on the CPU") for note in run.notes) is told


HALF_INSIDE = """
agraph (float[2, 8] x, float16[8, 8] w, float16[8] k) => (float[2, 8] y, float[2, 8] z)
{
    h = Cast <to = 10> (x)  m = MatMul(h, w)  s = Mul(m, k)  r = Relu(s)
    y = Cast <to = 1> (r)  z = Exp(x)
}
"""


def test_a_float32_output_that_is_computed_in_float16_has_its_tolerance() -> None:
    """As converters leave it that keep the types of inputs and outputs."""
    generator = np.random.default_rng(0)
    w, k = (generator.uniform(0.5, 1.5, n).astype(np.float16) for n in ((8, 8), 8))
    given = parse(HALF_INSIDE, w=w, k=k)
    samples = [{"x": generator.standard_normal((2, 8), np.float32)} for _ in range(4)]

    run = graphopt.optimize(given, samples=samples, benchmark=False)

    assert [s.spec for s in run.steps if s.verdict == "rolled back"] == []
    assert "Mul" not in [n.op_type for n in run.model.graph]
    assert max(e.rel_l2 for e in run.numerics["as written"]) > 1e-5
    assert computed_in_half(run.model) == {"y": "float16"}


def test_what_a_rejected_pass_did_does_not_reach_the_next() -> None:
    given = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        agraph (float[2] x) => (float[2] y) <float[1] idle = {1.0}> { y = local.f (x) }
        <domain: "local", opset_import: ["" : 20]> f (a) => (b) { b = Abs (a) }
        """
    )

    run = graphopt.optimize(given, passes=[BreakFunction(), DropUnused()], benchmark=False)

    assert [s.verdict for s in run.steps] == ["rolled back", "kept"]
    (function,) = run.model.functions.values()
    assert [n.op_type for n in function] == ["Abs"]


def test_what_a_pass_replaced_is_not_stored() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 8, 3, 3), np.float32)
    given = parse(
        """
        agraph (float[1, 8, 5, 5] x, float[64, 8, 3, 3] w) => (float[1, 64, 3, 3] y)
        <float two = {2.0}, float[1] idle = {1.0}> { c = Conv(x, w)  y = Mul(c, two) }
        """,
        w=weight,
    )

    run = graphopt.optimize(given, passes="fuse-scale", benchmark=False)

    assert run.steps[0].kept
    assert run.steps[0].bytes_after <= run.steps[0].bytes_before
    # What nothing read before is for drop-unused to remove.
    assert [v for v in run.model.graph.initializers if v == "idle"] == ["idle"]
    assert len(run.model.graph.initializers) == 2


def test_a_lossy_pass_is_judged_by_its_own_budget_and_by_the_users() -> None:
    own = graphopt.optimize(model(), passes=[RoundWeights()], benchmark=False)
    users = graphopt.optimize(model(), passes=[RoundWeights()], max_error="0.001", benchmark=False)

    assert own.steps[0].kept and own.steps[0].max_error == "0.05"
    assert "budget not verified on real data" in " ".join(own.notes)
    assert users.steps[0].verdict == "rolled back"
    assert "over the budget 0.001" in str(users.steps[0].reason)
    assert users.failures == ("none of the lossy passes was kept",)


def test_a_lossy_pass_over_budget_narrows_itself_first() -> None:
    run = graphopt.optimize(model(), passes=[ScaleWeights()], benchmark=False)

    assert run.steps[0].kept
    assert run.steps[0].spec == "scale-weights{by=0.01}"


def test_where_milder_forms_are_not_wanted_none_is_tried() -> None:
    given = model()
    inputs = signature(given)
    feed = Feed(read_samples([{"x": np.ones((2, 3), np.float32)}], inputs), inputs)
    gate = Gate(interface_of(given), given.clone(), feed)
    context = Context(lambda: given)
    size = size_of(given, None)
    pipeline = Pipeline(given, size, None, gate, context, model, narrows=False)

    pipeline.run(plan(None, [ScaleWeights()], None))

    (step,) = pipeline.steps
    assert (step.spec, step.verdict) == ("scale-weights", "rolled back")


def test_an_exact_pass_may_not_round() -> None:
    @dataclass(frozen=True)
    class Reassociate(Pass):
        name: ClassVar[str] = "reassociate"
        effect: ClassVar[Effect] = Effect.EXACT

        def apply(self, model: ir.Model, context: Context) -> Change:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            nudged = np.nextafter(value.const_value.numpy(), np.float32(9))
            value.const_value = ir.tensor(nudged, name="w")
            change = Change()
            change.count("weight nudged")
            return change

    run = graphopt.optimize(model(), passes=[Reassociate()], benchmark=False)

    assert "is not bit-identical" in str(run.steps[0].reason)


def test_the_argument_is_never_modified() -> None:
    given = model()
    before = ir.to_proto(given).SerializeToString()

    graphopt.optimize(given, passes=[BreakNumerics(), DropUnused()], benchmark=False)

    assert ir.to_proto(given).SerializeToString() == before


def test_samples_of_the_gate_are_not_given_to_passes() -> None:
    seen: list[float] = []

    @dataclass(frozen=True)
    class Watch(Pass):
        name: ClassVar[str] = "watch"
        effect: ClassVar[Effect] = Effect.EXACT
        needs_samples: ClassVar[bool] = True

        def apply(self, model: ir.Model, context: Context) -> Change:
            seen.extend(float(s["x"][0, 0]) for s in context.samples)
            return Change()

    samples = [{"x": np.full((2, 3), i, np.float32)} for i in range(20)]
    graphopt.optimize(model(), passes=[Watch()], samples=samples, benchmark=False)

    assert len(seen) == 16
    assert set(seen) < set(range(20))


def test_a_pass_that_needs_samples_without_any_is_the_users_fault() -> None:
    @dataclass(frozen=True)
    class Calibrate(DropUnused):
        name: ClassVar[str] = "calibrate"
        needs_samples: ClassVar[bool] = True

    with pytest.raises(graphopt.SampleError, match="calibrate needs samples; give --samples"):
        graphopt.optimize(model(), passes=[Calibrate()], benchmark=False)


def test_a_random_model_is_judged_on_structure_alone() -> None:
    run = graphopt.optimize(
        parse(
            """
            agraph (float[2] x) => (float[2] y)
            { r = RandomNormalLike(x)  unused = Neg(x)  y = Add(x, r) }
            """
        ),
        passes=[DropUnused()],
        benchmark=False,
    )

    assert run.steps[0].kept
    assert run.numerics == {}
    assert any("the model is random (RandomNormalLike)" in n for n in run.notes)


def test_state_is_carried_through_a_roll_out() -> None:
    counter = """
    agraph (float[1] x, float[1] state) => (float[1] y, float[1] stateN)
    <float[1] two = {2.0}, float[1] dead = {0.0}>
    { d = Mul(state, two)  stateN = Add(d, x)  y = Neg(stateN) }
    """

    @dataclass(frozen=True)
    class Forget(Pass):
        """Wrong only once the state is not zero."""

        name: ClassVar[str] = "forget"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def apply(self, model: ir.Model, context: Context) -> Change:
            value = model.graph.initializers["two"]
            value.const_value = ir.tensor(np.float32([3]), name="two")
            change = Change()
            change.count("constant changed")
            return change

    samples = [{"x": np.float32([i + 1])} for i in range(5)]
    carried = graphopt.optimize(
        parse(counter),
        passes=[Forget(), DropUnused()],
        samples=samples,
        state=[("stateN", "state")],
        benchmark=False,
    )

    guessed = graphopt.optimize(
        parse(counter), passes=[Forget(), DropUnused()], samples=samples, benchmark=False
    )

    assert [s.verdict for s in carried.steps] == ["rolled back", "kept"]
    assert [s.verdict for s in guessed.steps] == ["rolled back", "kept"]
    assert any("roll-outs in name order: --state stateN=state" in n for n in guessed.notes)


def test_rounding_does_not_add_up_from_pass_to_pass() -> None:
    @dataclass(frozen=True)
    class Creep(Pass):
        """Within rounding each time, and not after many times."""

        name: ClassVar[str] = "creep"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def apply(self, model: ir.Model, context: Context) -> Change:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            crept = value.const_value.numpy() * np.float32(1 + 8e-6)
            value.const_value = ir.tensor(crept, name="w")
            change = Change()
            change.count("weight crept")
            return change

    run = graphopt.optimize(model(), passes=[Creep(), Creep(), Creep()], benchmark=False)

    assert [s.verdict for s in run.steps] == ["kept", "rolled back", "rolled back"]
    assert "counted from the original" in str(run.steps[1].reason)


def test_what_onnxruntime_runs_only_as_deployed_is_judged_as_deployed() -> None:
    """With optimizations off, onnxruntime frees a value that only a branch and a reshape read."""
    branch = generate(2578)
    samples = [{"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6), np.float32)}]
    if runs_as_written(branch, samples[0]):
        pytest.skip("this onnxruntime runs it")

    run = graphopt.optimize(branch, samples=samples, benchmark=False)

    assert any("does not run the model as written" in note for note in run.notes)
    assert list(run.numerics) == ["as deployed"]
    assert [s for s in run.steps if s.verdict == "rolled back"] == []


def test_provenance_is_written_and_two_runs_are_identical() -> None:
    first, second = (graphopt.optimize(model(), benchmark=False) for _ in range(2))

    assert first.model.metadata_props["graphopt.pipeline"] == "basic"
    assert first.model.metadata_props["graphopt.input_sha256"] == first.input_sha256
    one, two = (ir.to_proto(r.model).SerializeToString() for r in (first, second))
    assert one == two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; it must be from 1 to"),
        ({"threads": 1 << 40}, "threads is 1099511627776; it must be"),
        ({"random_samples": 2.5}, "random_samples is 2.5; it must be a whole number"),
        ({"gate_samples": -1}, "gate_samples is -1"),
        ({"passes": [1]}, "a pass is an object or its text, not a int"),
        ({"passes": "raise-opset{opset=21}", "opset": 19}, "opset 19 is asked for beside"),
    ],
)
def test_arguments_out_of_bounds_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        graphopt.optimize(model(), benchmark=False, **options)


def test_passes_may_be_a_list_of_texts_and_objects() -> None:
    run = graphopt.optimize(model(), passes=["drop-unused,lift-constants", DropUnused()])

    assert [s.spec for s in run.steps] == ["drop-unused", "lift-constants", "drop-unused"]


def test_no_dimension_gets_a_name_that_onnx_invented() -> None:
    given = parse(
        """
        agraph (float[N, 4] x) => (int64[R, C] y, float[N, 4] z)
        { n = NonZero(x)  y = Identity(n)  z = Neg(x) }
        """
    )
    given.graph.outputs[0].shape = None

    run = graphopt.optimize(given, benchmark=False)

    assert [n.op_type for n in run.model.graph] == ["NonZero", "Neg"]
    assert "unk__" not in str(run.model.graph.outputs[0].shape)
