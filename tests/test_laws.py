"""What holds for every registered pass, on generated graphs.

The outputs stay within the tolerance of the effect, a second application finds nothing, the result
is valid, and the interface stays.
"""

from __future__ import annotations

import generated_chains
import generated_fusions
import generated_halves
import generated_layers
import generated_packed
import generated_transformers
import generated_views
import numpy as np
import onnx_ir as ir
import pytest
from generated import Step, generate, runs_as_written

import graphopt
from graphopt.contract import Change, Context, Effect, Pass, Sample
from graphopt.gate import interface_of, why_other_interface
from graphopt.observe import Observer
from graphopt.operators import all_graphs, node_count
from graphopt.recording import Feed
from graphopt.registry import parse_passes, pass_class, pass_names
from graphopt.runtime import Reference, Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import assert_equivalent, canonical
from graphopt.validation import Comparison, why_over

LOSSLESS = [n for n in pass_names() if pass_class(n).effect is not Effect.LOSSY]
QUICK, QUICK_ACTIONS_MINIMUM = range(24), 1
MANY, MANY_ACTIONS_MINIMUM = range(24, 460), 10
RECIPE = range(12, 2012)

FOCUS: dict[str, tuple[Step, ...]] = {
    **generated_chains.FOCUS,
    **generated_fusions.FOCUS,
    **generated_halves.FOCUS,
    **generated_layers.FOCUS,
    **generated_transformers.FOCUS,
    **generated_views.FOCUS,
}
"""Steps that a pass needs to find something to do, where the general mix seldom has any.

`basic` is held to its laws on graphs of all of these.
"""

OWN_FOCUS: dict[str, tuple[Step, ...]] = {
    **FOCUS,
    **generated_packed.FOCUS,
    "pool-means": generated_layers.MEANS,
    "scale-channels": generated_layers.SCALED,
}
"""Also for passes that `basic` does not run."""


def samples(model: ir.Model, effect: Effect = Effect.ROUNDING) -> list[Sample]:
    """Normal numbers; for what claims to be exact also those that break careless algebra.

    Two at a time, and where the model takes any number also three.

    Sums of large numbers that cancel are no test of rounding: there the original is noise itself.
    """
    normal = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    signs = np.resize(np.float32([0.0, -0.0, 1.0, -1.0, 0.5]), (2, 4, 6, 6))
    wild = np.resize(np.float32([-0.0, 1e-40, 1e30, -1e38, np.inf, np.nan, 7.0]), (2, 4, 6, 6))
    exact = [{"x": wild}] if effect is Effect.EXACT else []
    free = not isinstance(model.graph.inputs[0].shape[0], int)  # type: ignore[index]
    three = [{"x": np.concatenate([normal, signs[:1]])}] if free else []
    return [{"x": normal}, {"x": signs}, *three, *exact]


def applied(one: Pass, model: ir.Model) -> Change:
    infer_shapes(model)
    observer = None
    if one.needs_samples:
        inputs = signature(model)
        observer = Observer(Feed(read_samples(samples(model), inputs), inputs))
    context = Context(lambda: model, observer=observer)
    return Change() if one.refuse(model, context) else one.apply(model, context)


def assert_equal_as_deployed(before: ir.Model, after: ir.Model, text: str) -> None:
    first, second = Session(before), Session(after)
    comparison = Comparison()
    for sample in samples(before):
        comparison.add(first.run(sample), second.run(sample))
    assert why_over(Effect.ROUNDING, comparison.outputs()) is None, text


def check_law(one: Pass, seed: int) -> bool:
    """Whether the pass changed the model of the seed; asserts all laws."""
    model = generate(seed, OWN_FOCUS.get(one.name, ()))
    if not runs_as_written(model, samples(model)[0]):
        return False
    before = model.clone()
    change = applied(one, model)
    text = f"seed {seed}\n{canonical(before)}\n->\n{canonical(model)}"
    if not change:
        assert canonical(model) == canonical(before), f"unreported change, {text}"
        return False
    operators = {n.op_type for graph in all_graphs(before) for n in graph}
    assert one.operators is None or not one.operators.isdisjoint(operators), text
    assert why_invalid(model) is None, f"{why_invalid(model)}, {text}"
    assert why_other_interface(interface_of(before), interface_of(model)) is None, text
    if runs_as_written(model, samples(model)[0]):
        assert_equivalent(before, model, one.effect, samples(model, one.effect))
    else:
        assert_equal_as_deployed(before, model, text)
    again = applied(one, model)
    assert not again, f"a second time {dict(again.counts)}, {text}"
    return True


@pytest.mark.parametrize("name", LOSSLESS)
def test_laws_of_every_pass(name: str) -> None:
    (one,) = parse_passes(name)

    acted = sum(check_law(one, seed) for seed in QUICK)

    assert acted >= QUICK_ACTIONS_MINIMUM


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSLESS)
def test_laws_of_every_pass_on_many_graphs(name: str) -> None:
    (one,) = parse_passes(name)

    acted = sum(check_law(one, seed) for seed in MANY)

    assert acted >= MANY_ACTIONS_MINIMUM


def check_basic(seed: int) -> None:
    model = generate(seed)
    run = graphopt.optimize(model, recipe="basic", samples=samples(model), benchmark=False)
    assert [s for s in run.steps if s.verdict == "rolled back"] == [], f"seed {seed}"
    assert node_count(run.model) <= node_count(model), f"seed {seed}"
    deployed = Session(run.model, Reference.AS_DEPLOYED).run(samples(model)[0])
    assert deployed.keys() == {o.name for o in model.graph.outputs}


def test_basic_rolls_nothing_back() -> None:
    for seed in range(12):
        check_basic(seed)


def check_recipe(seed: int) -> bool:
    """Hold the whole recipe, with no gate that could hide something, to the laws of a pass."""
    steps = [*FOCUS.values(), ()]
    model = generate(seed, steps[seed % len(steps)])
    if not runs_as_written(model, samples(model)[0]):
        return False
    run = graphopt.optimize(model, recipe="basic", validate=False, benchmark=False)
    text = f"seed {seed}\n{canonical(model)}\n->\n{canonical(run.model)}"
    assert [s.spec for s in run.steps if s.verdict == "rolled back"] == [], text
    assert why_invalid(run.model) is None, f"{why_invalid(run.model)}, {text}"
    assert why_other_interface(interface_of(model), interface_of(run.model)) is None, text
    # A view of a large weight is worth a node.
    views = sum(sum(s.changes.values()) for s in run.steps if s.spec == "merge-views")
    assert node_count(run.model) <= node_count(model) + views, text
    if runs_as_written(run.model, samples(model)[0]):
        assert_equivalent(model, run.model, Effect.ROUNDING, samples(model))
    else:
        assert_equal_as_deployed(model, run.model, text)
    again = graphopt.optimize(run.model, recipe="basic", validate=False, benchmark=False)
    assert [s.spec for s in again.steps if s.kept] == [], text
    return True


def test_basic_holds_the_laws() -> None:
    assert sum(map(check_recipe, range(12))) > 6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_basic_holds_the_laws_on_many_graphs(part: int) -> None:
    seeds = RECIPE[part::8]

    assert sum(map(check_recipe, seeds)) > len(seeds) / 2


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_basic_rolls_nothing_back_on_many_graphs(part: int) -> None:
    for seed in range(12 + part, 212, 4):
        check_basic(seed)
