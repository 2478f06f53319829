"""Which layers bear what, from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuned import Counting, classifier, vectors, written

from graphopt.errors import SpecError
from graphopt.sensitivity import Sensitivity, sensitivity
from graphopt.testing import parse
from graphopt.treatments import treatment, treatment_names


def probed(model: object, cache: Path, **options: object) -> Sensitivity:
    settings: dict[str, object] = {"samples": vectors(24), "executor": Counting()}
    return sensitivity(model, cache=cache, **{**settings, **options})  # type: ignore[arg-type]


def test_every_treatment_is_tried_on_every_layer_that_it_is_for(tmp_path: Path) -> None:
    found = probed(classifier(), tmp_path)

    assert set(found.treatments) == set(treatment_names())
    assert {probe.treatment for probe in found.probes} == set(treatment_names())
    assert found.samples == (19, 5)
    assert sorted(found.layers) == ["w1", "w2", "w3"] or sorted(found.layers) == ["w1", "w2"]
    worst = [max(p.divergence for p in found.probes if p.layer == n) for n in found.layers]
    assert worst == sorted(worst, reverse=True)


@pytest.mark.parametrize("external_data", [False, True])
def test_the_bytes_are_those_of_all_files(tmp_path: Path, external_data: bool) -> None:
    path = written(tmp_path / "model.onnx", external_data=external_data)

    found = probed(path, tmp_path / "cache", treatments=["bits"])

    files = sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file())
    assert found.stored_bytes == pytest.approx(files, rel=0.05)


def test_all_options_are_measured_where_that_is_asked_for(tmp_path: Path) -> None:
    found = probed(classifier(), tmp_path, treatments=["bits"], every=True)

    assert all(probe.measured for probe in found.probes)
    assert {probe.option for probe in found.probes} == set(treatment("bits").options)


def test_one_sample_and_random_ones(tmp_path: Path) -> None:
    one = probed(classifier(), tmp_path, treatments=["bits"], samples=vectors(1))
    drawn = probed(classifier(), tmp_path, treatments=["bits"], samples=None, random_samples=9)

    assert one.samples == (1, 1)
    assert sum(drawn.samples) == 9


def test_a_model_without_layers(tmp_path: Path) -> None:
    model = parse("agraph (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }")

    found = probed(model, tmp_path)

    assert (found.probes, found.treatments, found.layers) == ((), {}, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treatments": ["bit"]}, "there is no treatment 'bit'; did you mean 'bits'"),
        (
            {"treatments": ["int8-dynamic"], "provider": "cuda"},
            "the treatment 'int8-dynamic' is for cpu, and not for cuda",
        ),
        ({"executor": "x"}, "'x' is no executor"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        probed(classifier(), tmp_path, **options)
