"""Laws of every treatment that is registered, and of every scenario."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx_ir as ir
import pytest
from tuned import DIGITS, classifier, images, trial_in

from graphopt.errors import SpecError
from graphopt.registry import parse_passes
from graphopt.scenarios import (
    OBJECTIVES,
    scenario,
    scenario_for,
    scenario_names,
)
from graphopt.testing import parse
from graphopt.treatments import treatment, treatment_names
from graphopt.trial import Trial, open_trial

HOSTILE = ("a,b", "c:d", "it's", 'say "x"', "back\\slash", " spaces ", "ä/ü::0", "(1)", "{a=b}", "")


@cache
def digits() -> Trial:
    return open_trial(trial_in(Path(mkdtemp()) / "trial", DIGITS, samples=images(80)))


def cases() -> list[tuple[str, str]]:
    return [(name, option) for name in treatment_names() for option in treatment(name).options]


@pytest.mark.parametrize("name", treatment_names())
def test_what_it_says_of_itself_fits(name: str) -> None:
    one = treatment(name)

    assert set(one.probed) <= set(one.options)
    assert len(set(one.options)) == len(one.options)
    assert one.summary and "\n" not in one.summary
    assert one.provider in (None, "cpu", "cuda")


@pytest.mark.parametrize(("name", "option"), cases())
def test_its_passes_are_text_that_parses_back(name: str, option: str) -> None:
    chosen = {layer: option for layer in HOSTILE if layer}

    text = treatment(name).passes(chosen)

    assert ",".join(map(str, parse_passes(text))) == text


@pytest.mark.parametrize("name", treatment_names())
def test_its_layers_are_weights_of_the_model_and_the_model_stays(name: str) -> None:
    base = digits().base
    before = weights_of(base)

    layers = treatment(name).layers(base)

    assert len({layer.name for layer in layers}) == len(layers) > 0
    for layer in layers:
        value = base.graph.initializers[layer.name]
        assert value.const_value is not None
        assert (layer.elements, layer.stored_bytes) == (
            value.const_value.size,
            value.const_value.nbytes,
        )
    assert weights_of(base) == before


@pytest.mark.parametrize("name", treatment_names())
def test_given_one_layer_no_other_changes(name: str) -> None:
    trial, one = digits(), treatment(name)
    layers = [layer.name for layer in one.layers(trial.base)]
    for layer in {layers[0], layers[-1]}:
        before = weights_of(trial.base)

        model, steps = trial.rewritten(one.passes({layer: one.options[-1]}))

        assert any(step.kept for step in steps) or name == "zeros"
        after = weights_of(model)
        for other in {*layers} - {layer}:
            assert after[other] == before[other]
        assert weights_of(trial.base) == before


def weights_of(model: ir.Model) -> dict[str, bytes]:
    return {
        name: value.const_value.numpy().tobytes()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


@pytest.mark.parametrize("name", treatment_names())
def test_estimates_are_of_options_and_the_mildest_first(name: str) -> None:
    trial, one = digits(), treatment(name)
    layers = [layer.name for layer in one.layers(trial.base)]

    found = one.estimates(trial.base, layers[:2], trial.context)

    assert set(found) <= set(layers[:2])
    for estimates in found.values():
        assert tuple(estimates) == one.options
        sizes = [estimate.stored_bytes for estimate in estimates.values()]
        squares = [estimate.square for estimate in estimates.values()]
        # On a weight of few numbers what tells of the codes counts as much as they do.
        assert sizes[0] > sizes[-1] > 0
        assert squares == sorted(squares)
        assert min(squares) >= 0


@pytest.mark.parametrize("name", treatment_names())
def test_a_model_without_layers_has_none(name: str) -> None:
    model = parse("agraph (float[N] x) => (float[N] y) { y = Relu(x) }")

    assert treatment(name).layers(model) == []


@pytest.mark.parametrize("name", treatment_names())
def test_bodies_are_left_alone_or_named_apart(name: str) -> None:
    """The same name inside and outside of an If would be one layer for two weights."""
    model = parse(
        """
        agraph (bool c, float[N, 64] x, float[64, 64] w) => (float[N, 64] y) {
            h = MatMul(x, w)
            y = If(c) <
                then_branch = t () => (float[N, 64] a) { a = MatMul(h, w) },
                else_branch = e () => (float[N, 64] b) { b = Identity(h) }
            >
        }""",
        w=np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32),
    )

    names = [layer.name for layer in treatment(name).layers(model)]

    assert names in ([], ["w"])


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(SpecError, match="there is no treatment 'cluster'; did you mean 'clusters'"):
        treatment("cluster")
    with pytest.raises(SpecError, match="there is no scenario 'egde'; did you mean 'edge'"):
        scenario("egde")
    with pytest.raises(SpecError, match="there is no objective 'speed'"):
        scenario_for("speed", "cpu")
    with pytest.raises(SpecError, match="no scenario for memory on cuda; name one by --scenario"):
        scenario_for("memory", "cuda")


@pytest.mark.parametrize("name", scenario_names())
def test_a_scenario_fits_together(name: str) -> None:
    one = scenario(name)
    names = [trunk.name for trunk in one.trunks]

    assert one.objective in OBJECTIVES
    assert len(set(names)) == len(names) > 0
    assert one.trunks[0].after is None and one.trunks[0].unless is None
    for trunk in one.trunks:
        if trunk.passes:
            assert ",".join(map(str, parse_passes(trunk.passes)))
        for other in (trunk.after, trunk.unless):
            # A trunk that waits for one after it would be tried by luck, or never.
            assert other is None or names.index(other) < names.index(trunk.name)
    for other in one.treatments:
        assert treatment(other).provider in (None, one.provider)


@pytest.mark.parametrize("name", [n for n in scenario_names() if scenario(n).provider == "cpu"])
def test_its_first_trunk_is_kept_whole(name: str, tmp_path: Path) -> None:
    trial = open_trial(trial_in(tmp_path / "trial", classifier()))

    model, steps = trial.rewritten(scenario(name).trunks[0].passes, loads=True)

    assert {step.verdict for step in steps} <= {"kept", "unchanged"}
    assert trial.scores(model).value == pytest.approx(100)
