"""Passes that are judged by the clock: what does not pay is rolled back, and the run goes on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import Change, Context, Effect, Pass, Run, Step, api
from graphopt.benchmark import latency_ratio
from graphopt.contract import Sample
from graphopt.errors import ModelError, SampleError
from graphopt.gate import Gate, interface_of
from graphopt.json_report import run_to_json
from graphopt.ledger import size_of
from graphopt.pipeline import Pipeline
from graphopt.recipes import Plan
from graphopt.recording import Feed
from graphopt.report import render_run, to_terminal_text
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse
from graphopt_passes.simplify.drop_unused import DropUnused

MODEL = """
agraph (float[2, 3] x) => (float[2, 3] y)
<float[3] w = {1.0, 2.0, 3.0}, float[3] v = {1.0, 1.0, 1.0}, float[2] dead = {0.0, 0.0}>
{
    a = Mul(x, w)
    b = Mul(a, v)
    y = Relu(b)
}
"""

SAMPLES = [{"x": np.random.default_rng(n).standard_normal((2, 3), np.float32)} for n in range(4)]


def scale(model: ir.Model, name: str, by: float) -> Change:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(by), name=name)
    change = Change()
    change.count("weight scaled")
    return change


@dataclass(frozen=True)
class Hasten(Pass):
    """Scale a weight a little, and claim that this makes the model faster."""

    name: ClassVar[str] = "hasten"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.05
    max_latency: ClassVar[float | None] = 0.9

    weight: str = "w"
    by: float = 1.01

    def apply(self, model: ir.Model, context: Context) -> Change:
        return scale(model, self.weight, self.by)


@dataclass(frozen=True)
class HastenExactly(Pass):
    """Change nothing that shows, and claim the same."""

    name: ClassVar[str] = "hasten-exactly"
    effect: ClassVar[Effect] = Effect.EXACT
    max_latency: ClassVar[float | None] = 0.9

    def apply(self, model: ir.Model, context: Context) -> Change:
        return scale(model, "w", 1.0)


@dataclass(frozen=True)
class Scale(Pass):
    """The same and no such claim: within rounding only where nothing was changed before."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.ROUNDING

    by: float = 1.0

    def apply(self, model: ir.Model, context: Context) -> Change:
        return scale(model, "v", self.by)


@dataclass(frozen=True)
class Narrowing(Hasten):
    """Over the budget at first."""

    name: ClassVar[str] = "narrowing"

    by: float = 1.5

    def narrow(self) -> Pass | None:
        return Narrowing(self.weight, (1 + self.by) / 2) if self.by > 1.01 else None


@dataclass
class Clock:
    """Says what it is told to, one ratio after the other, and notes what it was asked about."""

    ratios: list[float | Exception]
    asked: list[tuple[list[float], list[float]]] = field(default_factory=list)

    def __call__(self, first: ir.Model, second: ir.Model, **_: Any) -> float:
        self.asked.append((weights(first), weights(second)))
        ratio = self.ratios.pop(0)
        if isinstance(ratio, Exception):
            raise ratio
        return ratio


def weights(model: ir.Model) -> list[float]:
    """The middle element of each weight."""
    tensors = (model.graph.initializers[n].const_value for n in "wv")
    return [round(float(t.numpy()[1]), 4) for t in tensors if t is not None]


Optimize = Callable[..., tuple[Run, Clock]]


@pytest.fixture
def no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the benchmark at the end of a run, which is of no interest here."""
    monkeypatch.setattr(api.Subject, "measure", lambda *_: None)
    monkeypatch.setattr(api, "_with_benchmark", lambda run, _: run)


@pytest.fixture
def optimize(no_benchmark: None, monkeypatch: pytest.MonkeyPatch) -> Optimize:
    """Run passes on the model, timed by a clock that says these ratios."""

    def run(passes: list[Pass], *ratios: float | Exception, **more: Any) -> tuple[Run, Clock]:
        clock = Clock(list(ratios))
        monkeypatch.setattr(api, "latency_ratio", clock)
        given = more.pop("model", parse(MODEL))
        found = graphopt.optimize(given, passes=passes, samples=SAMPLES, **more)
        assert not clock.ratios, "the clock was not asked so often"
        return found, clock

    return run


def verdicts(run: Run) -> list[str]:
    return [step.verdict for step in run.steps]


# ------------------------------------------------------------------ verdicts


def test_what_is_too_slow_is_rolled_back_and_the_run_goes_on(optimize: Optimize) -> None:
    run, clock = optimize([Hasten(), DropUnused()], 0.95)

    slow, following = run.steps
    assert (slow.verdict, slow.kept, slow.latency_ratio) == ("too slow", False, 0.95)
    assert slow.reason == "it takes 0.95 of the latency before, over 0.9"
    assert slow.changes == {"weight scaled": 1}
    assert slow.nodes_before == slow.nodes_after and slow.bytes_before == slow.bytes_after
    assert slow.max_error == "0.05"
    assert following.kept and following.latency_ratio is None
    assert weights(run.model) == [2, 1]
    assert clock.asked == [([2, 1], [2.02, 1])]
    assert all(e.identical for errors in run.numerics.values() for e in errors)
    assert run.failures == ("none of the lossy passes was kept",)


@pytest.mark.parametrize("ratio", [0.4, 0.9])
def test_what_pays_is_kept_with_its_ratio(ratio: float, optimize: Optimize) -> None:
    run, _ = optimize([Hasten()], ratio)

    (step,) = run.steps
    assert (step.verdict, step.reason, step.latency_ratio) == ("kept", None, ratio)
    assert weights(run.model) == [2.02, 1]
    assert run.failures == ()


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_what_cannot_be_said_to_pay_is_not_kept(ratio: float, optimize: Optimize) -> None:
    run, _ = optimize([Hasten()], ratio)

    assert verdicts(run) == ["too slow"]


def test_the_next_pass_is_judged_and_timed_against_the_model_before(optimize: Optimize) -> None:
    """And the one after a pass that paid against what that has made of the model."""
    passes = [Hasten("w", 1.01), Hasten("w", 1.02), Hasten("v", 1.015), Hasten("v", 1.025)]

    run, clock = optimize(passes, 0.95, 0.5, 2.0, 0.8)

    assert verdicts(run) == ["too slow", "kept", "too slow", "kept"]
    assert [s.latency_ratio for s in run.steps] == [0.95, 0.5, 2.0, 0.8]
    assert clock.asked == [
        ([2, 1], [2.02, 1]),
        ([2, 1], [2.04, 1]),
        ([2.04, 1], [2.04, 1.015]),
        ([2.04, 1], [2.04, 1.025]),
    ]
    assert weights(run.model) == [2.04, 1.025]
    assert run.steps[1].bytes_after == run.steps[2].bytes_after == run.steps[3].bytes_before


@pytest.mark.parametrize(("ratio", "verdict"), [(2.0, "kept"), (0.5, "rolled back")])
def test_the_gate_goes_on_from_what_was_kept(
    ratio: float, verdict: str, optimize: Optimize
) -> None:
    """A pass that undoes what the first did: right only where the first was not kept.

    Were the outputs of the candidate that was too slow the ones to compare with, it would be the
    other way round.
    """
    run, _ = optimize([Hasten("v", 1.02), Scale(1.0), Reset(1.0)], ratio)

    assert verdicts(run)[1:] == ["kept", verdict]
    assert weights(run.model) == ([2, 1] if ratio > 1 else [2, 1.02])


@dataclass(frozen=True)
class Reset(Scale):
    """Give the weight its first value."""

    name: ClassVar[str] = "reset"

    def apply(self, model: ir.Model, context: Context) -> Change:
        model.graph.initializers["v"].const_value = ir.tensor(np.full(3, self.by, np.float32))
        change = Change()
        change.count("weight reset")
        return change


def test_rounding_is_counted_from_the_original_until_a_lossy_pass_is_kept(
    optimize: Optimize,
) -> None:
    """One that was too slow changes nothing of that."""
    creeping = [Scale(1 + 8e-6), Scale(1 + 8e-6)]

    slow, _ = optimize([Hasten(), *creeping], 2.0)
    fast, _ = optimize([Hasten(), *creeping], 0.5)

    assert verdicts(slow) == ["too slow", "kept", "rolled back"]
    assert "counted from the original" in str(slow.steps[2].reason)
    assert verdicts(fast) == ["kept", "kept", "kept"]


def test_a_lossless_pass_may_be_judged_by_the_clock_too(optimize: Optimize) -> None:
    run, _ = optimize([HastenExactly(), DropUnused()], 1.0)

    assert verdicts(run) == ["too slow", "kept"]
    assert run.failures == ()


def test_what_was_too_slow_is_not_asked_again_in_later_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock([1.5])
    pipeline = pipeline_of(clock)

    pipeline.run(Plan((HastenExactly(), DropUnused()), repeat=True))

    assert [(s.spec, s.round, s.verdict) for s in pipeline.steps] == [
        ("hasten-exactly", 1, "too slow"),
        ("drop-unused", 1, "kept"),
    ]
    assert clock.ratios == []


# ------------------------------------------------------------------ who is timed


def test_what_is_over_the_budget_is_not_timed_and_its_milder_form_is(optimize: Optimize) -> None:
    run, clock = optimize([Narrowing()], 0.7)

    (step,) = run.steps
    assert step.kept and step.latency_ratio == 0.7
    assert step.spec == "narrowing{by=1.03125}"
    assert len(clock.asked) == 1


def test_a_form_that_is_too_slow_is_not_narrowed(optimize: Optimize) -> None:
    """Fewer layers would gain less."""
    run, clock = optimize([Narrowing(by=1.04)], 0.99)

    assert verdicts(run) == ["too slow"]
    assert run.steps[0].spec == "narrowing{by=1.04}"
    assert len(clock.asked) == 1


def test_passes_without_a_claim_and_passes_without_a_change_are_not_timed(
    optimize: Optimize,
) -> None:
    run, clock = optimize([Scale(), DropUnused(), DropUnused()])

    assert verdicts(run) == ["kept", "kept", "unchanged"]
    assert clock.asked == []
    assert all(s.latency_ratio is None for s in run.steps)


@pytest.mark.parametrize("options", [{"benchmark": False}, {"validate": False}])
def test_where_models_are_not_timed_no_pass_is_judged_by_it(
    options: dict[str, bool], optimize: Optimize
) -> None:
    run, clock = optimize([Hasten()], **options)

    assert (run.steps[0].verdict, run.steps[0].latency_ratio) == ("kept", None)
    assert clock.asked == []


def test_strict_is_about_what_is_wrong_and_not_about_what_is_slow(optimize: Optimize) -> None:
    run, _ = optimize([Hasten(), DropUnused()], 1.5, strict=True)

    assert verdicts(run) == ["too slow", "kept"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SampleError("no such luck"), "no such luck"),
        (RuntimeError("half-way"), "it raised RuntimeError: half-way"),
    ],
)
def test_a_model_that_cannot_be_timed_does_not_end_the_run(
    error: Exception, reason: str, optimize: Optimize
) -> None:
    run, _ = optimize([Hasten(), DropUnused()], error)

    assert verdicts(run) == ["rolled back", "kept"]
    assert run.steps[0].reason == reason
    assert run.steps[0].latency_ratio is None
    assert weights(run.model) == [2, 1]


# ------------------------------------------------------------------ what is told


def test_json_and_terminal_tell_what_the_clock_said(optimize: Optimize) -> None:
    run, _ = optimize([Hasten("w", 1.01), Hasten("v", 1.02), Scale()], 0.612345, 0.95)

    steps = run_to_json(run)["steps"]
    assert [s["latency_ratio"] for s in steps] == [0.612345, 0.95, None]
    assert [s["verdict"] for s in steps] == ["kept", "too slow", "kept"]
    text = " ".join(to_terminal_text(render_run(run), 240, False).split())
    assert "1 × weight scaled (0.612 of the latency before)" in text
    assert "1 × weight scaled: it takes 0.95 of the latency before, over 0.9" in text
    assert "TOO SLOW" in text
    assert text.count("of the latency before") == 2


def test_a_ratio_that_is_no_number_is_valid_json(optimize: Optimize) -> None:
    run, _ = optimize([Hasten()], math.inf)

    assert run_to_json(run)["steps"][0]["latency_ratio"] == "inf"


def test_who_waits_is_told_that_a_pass_is_timed(optimize: Optimize) -> None:
    words: list[str] = []

    optimize([Hasten()], 0.5, progress=words.append)

    assert words.index("hasten") < words.index("timing hasten")


# ------------------------------------------------------------------ gate


def pipeline_of(clock: Clock | None) -> Pipeline:
    model = parse(MODEL)
    inputs = signature(model)
    feed = Feed(read_samples(SAMPLES, inputs), inputs)
    gate = Gate(interface_of(model), model.clone(), feed)
    context = Context(lambda: model)
    return Pipeline(model, size_of(model, None), None, gate, context, lambda: model, clock=clock)


def candidates(gate: Gate) -> tuple[ir.Model, ir.Model]:
    """The model of the gate, and the same with another weight."""
    assert isinstance(gate.given, ir.Model)
    changed = gate.given.clone()
    scale(changed, "w", 1.02)
    return gate.given, changed


def test_the_gate_takes_a_candidate_only_when_it_is_told_to() -> None:
    gate = pipeline_of(None).gate
    model, changed = candidates(gate)
    before = gate.before

    assert gate.why_rejected(changed, Hasten()) is None
    assert gate.before is before and gate.lossless_so_far
    assert gate.why_rejected(model, HastenExactly()) is None

    assert gate.why_rejected(changed, Hasten()) is None
    gate.accept()
    assert gate.before is not before and not gate.lossless_so_far
    assert gate.why_rejected(changed, HastenExactly()) is None
    assert "is not bit-identical" in str(gate.why_rejected(model, HastenExactly()))


def test_accepting_after_a_rejection_takes_nothing() -> None:
    """Not the candidate that was rejected, nor the one judged before it; nor one twice."""
    gate = pipeline_of(None).gate
    model, changed = candidates(gate)
    before = gate.before
    broken = model.clone()
    broken.graph.outputs[0].name = "other"

    for rejected, by in ((changed, HastenExactly()), (broken, Hasten())):
        assert gate.why_rejected(changed, Hasten()) is None
        assert gate.why_rejected(rejected, by) is not None
        gate.accept()
        assert gate.before is before and gate.lossless_so_far

    assert gate.why_rejected(model, HastenExactly()) is None
    gate.accept()
    accepted = gate.before
    gate.accept()
    assert gate.before is accepted


def test_a_gate_that_does_not_run_models_has_nothing_to_take() -> None:
    model = parse(MODEL)
    gate = Gate(interface_of(model), model, None)

    assert gate.why_rejected(model, Hasten()) is None
    gate.accept()

    assert gate.before is None and gate.lossless_so_far


# ------------------------------------------------------------------ the clock itself


QUICK: dict[str, Any] = {"seconds": 0.02, "rounds": (6, 50)}


def repeated(count: int) -> ir.Model:
    """So many products of matrices, one after the other."""
    chain = "  ".join(f"v{n + 1} = MatMul(v{n}, w)" for n in range(count))
    weight = np.eye(96, dtype=np.float32)
    return parse(
        f"agraph (float[N, 96] v0, float[96, 96] w) => (float[N, 96] y)"
        f"{{ {chain}  y = Identity(v{count}) }}",
        w=weight,
    )


def test_the_ratio_is_that_of_the_second_to_the_first() -> None:
    short, long = repeated(1), repeated(30)
    samples: list[Sample] = [{"v0": np.ones((n, 96), np.float32)} for n in (200, 300)]

    ratio = latency_ratio(short, long, samples, **QUICK)
    back = latency_ratio(long, short, samples, **QUICK)

    assert ratio > 1 > back > 0


def test_the_clock_takes_turns_over_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the ratios within the rounds, and not the ratio of medians."""
    table = np.array([[1.0, 2.0], [10.0, 5.0], [4.0, 12.0]])
    seen: list[int] = []

    def take_turns(calls: list[list[Any]], budget_s: float, rounds: tuple[int, int]) -> np.ndarray:
        seen.extend(len(c) for c in calls)
        assert (budget_s, rounds) == (0.04, (6, 50))
        return table

    monkeypatch.setattr(sys.modules[latency_ratio.__module__], "take_turns", take_turns)
    samples: list[Sample] = [{"x": np.ones((2, 3), np.float32)}] * 11

    ratio = latency_ratio(parse(MODEL), parse(MODEL), iter(samples), **QUICK)

    assert ratio == 2.0
    assert seen == [8, 8]


def test_the_clock_runs_at_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    session = Session.__init__

    def watched(self: Session, *arguments: Any, **more: Any) -> None:
        options.append(more)
        session(self, *arguments, **more)

    monkeypatch.setattr(Session, "__init__", watched)

    latency_ratio(parse(MODEL), parse(MODEL), SAMPLES, **QUICK)

    assert [o["threads"] for o in options] == [1, 1]


def test_the_clock_feeds_zeros_for_state_and_no_more_than_a_model_takes() -> None:
    first = parse(
        "agraph (float[N] x, float[N] state, float[1] d) => (float[N] y, float[N] stateN)"
        "<float[1] d = {1.0}> { y = Add(x, d)  stateN = Add(state, y) }"
    )
    second = parse(
        "agraph (float[N] x, float[N] state) => (float[N] y, float[N] stateN)"
        "<float[1] d = {1.0}> { y = Add(x, d)  stateN = Add(state, y) }"
    )
    samples: list[Sample] = [
        {"x": np.ones(n, np.float32), "d": np.zeros(1, np.float32)} for n in (2, 5)
    ]

    assert latency_ratio(first, second, samples, **QUICK) > 0


def test_what_the_clock_cannot_run_is_an_error_in_words() -> None:
    fixed = parse("agraph (float[N] x) => (float[4] y) <int64[1] s = {4}> { y = Reshape(x, s) }")
    model = parse("agraph (float[N] x) => (float[N] y) { y = Neg(x) }")
    unknown = model.clone()
    unknown.graph[0].op_type = "NoSuchOperator"
    samples: list[Sample] = [{"x": np.ones(4, np.float32)}, {"x": np.ones(3, np.float32)}]

    with pytest.raises(SampleError, match="cannot be reshaped"):
        latency_ratio(model, fixed, samples, **QUICK)
    with pytest.raises(ModelError, match="NoSuchOperator"):
        latency_ratio(model, unknown, samples, **QUICK)
    with pytest.raises(SampleError, match="timed on samples, and there are none"):
        latency_ratio(model, model, [], **QUICK)


def test_a_run_times_what_it_keeps_for_real(no_benchmark: None) -> None:
    """No fake: whatever the clock says here, it is in the ledger and the verdict follows it."""
    run = graphopt.optimize(parse(MODEL), passes=[Hasten()], samples=SAMPLES)

    (step,) = run.steps
    assert isinstance(step, Step) and step.latency_ratio is not None
    assert step.kept is (step.latency_ratio <= 0.9)
