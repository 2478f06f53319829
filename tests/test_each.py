"""Options that say of single weights what each gets."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from on_codes import quantize
from test_quantize_static import paying, paying_samples
from tuned import LAYERS, classifier, trial_in

from graphopt.contract import Change
from graphopt.errors import SpecError
from graphopt.registry import parse_passes
from graphopt.trial import open_trial
from graphopt_passes.quantize.each import parse_each, skip_others


def test_names_may_hold_colons() -> None:
    found = parse_each("p", ("a:4", "b::c:8", " d,e :2"), int, "of bits")

    assert found == {"a": 4, "b::c": 8, " d,e ": 2}


@pytest.mark.parametrize("text", ["a", "a:", ":4", "a:four", "a:0.5", "", ":"])
def test_what_is_not_of_the_form_is_told(text: str) -> None:
    message = r"'p' takes each=\(NAME:NUMBER,...\), the number of bits; not "
    with pytest.raises(SpecError, match=message + repr(text)):
        parse_each("p", (text,), int, "of bits")


def test_a_name_twice_is_told() -> None:
    with pytest.raises(SpecError, match="'p' is told twice what 'a' gets; say it once"):
        parse_each("p", ("a:4", "a:8"), int, "of bits")


def test_who_is_not_there_is_told() -> None:
    change = Change()

    skip_others({"w": 1, "weigth": 2}, ["w", "weight"], change)

    (skip,) = change.skips
    assert "weigth" in str(skip)
    assert "there is no such weight to change here; did you mean 'weight'?" in str(skip)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster-weights{each=(w:1)}", "gives each weight 2 to 256 clusters"),
        ("cluster-weights{each=(w:300)}", "gives each weight 2 to 256 clusters"),
        ("cluster-weights{each=(w:8),bits=4}", "takes one of clusters, bits, size and each"),
        ("quantize-weights{each=(w:9)}", "gives each weight one of"),
        ("quantize-weights{each=(w:3),form=kernel}", "in form=kernel; not 3"),
        ("prune-importance{each=(w:1.0)}", "a share of zeros from 0 to below 1"),
        ("prune-importance{each=(w:-0.1)}", "a share of zeros from 0 to below 1"),
        ("prune-importance{each=(w:nan)}", "a share of zeros from 0 to below 1"),
    ],
)
def test_what_a_pass_cannot_give_is_told(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_passes(text)


CASES = {
    "cluster-weights{each=(w1:4,w2:16)}": {"w1", "w2"},
    "quantize-weights{block=32,each=(w2:4)}": {"w2"},
    "prune-importance{each=(w1:0.5,w2:0.9)}": {"w1", "w2"},
    "quantize-static{only=(w2)}": {"w2"},
    "quantize-dynamic{minimum-gain=0.0,layer-error=1.0,only=(w1)}": {"w1"},
}


@pytest.mark.parametrize("text", CASES)
def test_all_others_stay(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    trial = open_trial(trial_in(tmp_path_factory.mktemp("each") / "trial"))

    model, (step,) = trial.rewritten(text)

    assert step.kept
    assert step.spec == text
    same = {name for name in LAYERS if weight(model, name) == weight(trial.base, name)}
    assert same == LAYERS.keys() - CASES[text]


def weight(model: ir.Model, name: str) -> bytes | None:
    value = model.graph.initializers.get(name)
    return None if value is None or value.const_value is None else value.const_value.tobytes()


def test_each_gets_what_it_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    trial = open_trial(trial_in(tmp_path_factory.mktemp("each") / "trial", classifier()))

    model, _ = trial.rewritten("prune-importance{each=(w1:0.25,w2:0.75),form=dense}")

    zeros = {}
    for name in LAYERS:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        zeros[name] = float(np.mean(tensor.numpy() == 0))
    assert zeros == {"w1": 0.25, "w2": 0.75, "w3": 0.0}


@pytest.mark.parametrize(
    ("text", "milder"),
    [
        ("cluster-weights{each=(a:8,b:200)}", "cluster-weights{each=(a:16,b:256)}"),
        ("cluster-weights{each=(a:256)}", None),
        ("quantize-weights{each=(a:4,b:8)}", "quantize-weights{each=(a:5,b:8)}"),
        ("quantize-weights{each=(a:8)}", None),
        (
            "quantize-static{error=0.08,price=0.5,keep=(a)}",
            "quantize-static{error=0.04,price=0.5,keep=(a)}",
        ),
        ("prune-importance{each=(a:0.5,b:0.1)}", "prune-importance{each=(a:0.4)}"),
    ],
)
def test_milder_forms_keep_what_else_was_said(text: str, milder: str | None) -> None:
    (one,) = parse_passes(text)

    found = one.narrow()

    assert (None if found is None else str(found)) == milder


def test_products_that_are_to_stay_float_do() -> None:
    (one,) = parse_passes("quantize-static{keep=(w,v)}")

    assert quantize(paying(), paying_samples()).counts == {"Conv on 8-bit integers": 2}
    assert not quantize(paying(), paying_samples(), one)
