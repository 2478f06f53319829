"""The budget of prune-structures in measured time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from test_prune_structures import CNN, applied, built, cnn, macs, normal, samples

from graphopt.benchmark import latency_ratio
from graphopt.errors import SpecError
from graphopt.groups import analyze
from graphopt.node_times import node_times
from graphopt.skeleton import infer_shapes
from graphopt_passes.prune import lanes, unit_budgets
from graphopt_passes.prune.lanes import measured_lanes
from graphopt_passes.prune.prune_structures import PruneStructures
from graphopt_passes.prune.unit_choice import Choosing, UnitOptions
from graphopt_passes.prune.unit_costs import Costs, latency_terms, macs_terms


def test_the_time_of_a_model_is_that_of_its_nodes() -> None:
    model = cnn()
    times_us = node_times(model, samples(model))

    assert set(times_us) == set(model.graph)
    by_operator = {node.op_type: time for node, time in times_us.items()}
    assert by_operator["Conv"] > 0
    # It is part of the Conv before it.
    assert by_operator["Relu"] == 0


@pytest.mark.parametrize(("of_kernels", "found"), [(32, 32), (16, 16), (8, 8), (4, 4), (1, 1)])
def test_lanes_are_seen_by_the_clock(
    of_kernels: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(first: ir.Model, second: ir.Model, *_: object, **__: object) -> float:
        sizes = [int(m.graph.initializers["w0"].shape[0]) for m in (first, second)]  # type: ignore[index,arg-type]
        whole, fewer = (-(-size // of_kernels) for size in sizes)
        return fewer / whole

    monkeypatch.setattr(lanes, "latency_ratio", clock)
    assert measured_lanes("cpu") == found


def test_channels_cost_by_whole_lanes() -> None:
    model = cnn()
    infer_shapes(model)
    groups = [g for g in analyze(model).all if g.frozen is None]
    smooth, stepped = Costs(groups, macs_terms(model, {})), Costs(groups, macs_terms(model, {}), 8)

    assert stepped.total == smooth.total
    for counts in [(16, 16), (16, 8), (8, 8)]:
        assert stepped.of(counts) == pytest.approx(smooth.of(counts))
    assert stepped.of((9, 16)) == pytest.approx(smooth.of((16, 16)))
    assert stepped.along(0, np.array([1, 8, 9, 16]), (16, 16)) == pytest.approx(
        smooth.along(0, np.array([8, 8, 16, 16]), (16, 16))
    )


def test_time_goes_with_channels_whatever_a_node_does() -> None:
    model = cnn()
    infer_shapes(model)
    groups = [g for g in analyze(model).all if g.frozen is None]
    times_us = {node: 10.0 if node.op_type == "Relu" else 0.0 for node in model.graph}
    costs = Costs(groups, latency_terms(model, times_us, {}))

    assert costs.total == pytest.approx(20)
    assert costs.of((8, 16)) == pytest.approx(15)
    assert costs.of((8, 4)) == pytest.approx(7.5)


def test_what_is_pruned_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate by node is corrected by what the whole model takes."""
    fixed = 0.2
    measured = []

    def clock(first: ir.Model, second: ir.Model, *_: object, **__: object) -> float:
        measured.append(fixed + (1 - fixed) * macs(second) / macs(first))
        return measured[-1]

    def times(model: ir.Model, *_: object) -> Mapping[ir.Node, float]:
        return {node: 10.0 if node.op_type == "Conv" else 0.0 for node in model.graph}

    monkeypatch.setattr(unit_budgets, "latency_ratio", clock)
    monkeypatch.setattr(unit_budgets, "node_times", times)
    monkeypatch.setattr(lanes, "latency_ratio", lambda *_, **__: 0.5)
    model = cnn()
    infer_shapes(model)
    before = model.clone()
    change = applied(PruneStructures(latency=0.6, multiple=2, places=False), model)

    assert change.counts["unit removed"]
    assert len(measured) > 1
    assert 0.4 <= fixed + (1 - fixed) * macs(model) / macs(before) <= 0.6


def test_half_as_much_time_is_saved_where_it_was_too_much() -> None:
    assert PruneStructures(latency=0.6).narrow() == PruneStructures(latency=0.8)


def test_one_budget_is_enough() -> None:
    with pytest.raises(SpecError, match="macs and latency are two budgets"):
        PruneStructures(latency=0.6, macs=0.5)
    with pytest.raises(SpecError, match="parameters and latency are two budgets"):
        PruneStructures(latency=0.6, parameters=0.5)


def test_units_that_share_lanes_with_others_stay() -> None:
    """Where all numbers of channels up to 16 take the same time, none of 16 goes."""
    model = cnn()
    infer_shapes(model)
    groups = [g for g in analyze(model).all if g.frozen is None]
    options = [UnitOptions(np.array([4, 8, 16]), np.array([2.0, 1.0, 0.0])) for _ in groups]
    choosing = Choosing(Costs(groups, macs_terms(model, {}), 16), options, [])

    assert choosing.within(0.5 * choosing.costs.total) == choosing.everything


def test_a_model_becomes_faster() -> None:
    """By the clock itself, on a model that is slow enough for it."""
    model = built(CNN.replace("8, 8]", "24, 24]"), **wide())
    infer_shapes(model)
    before, given = model.clone(), samples(model, 8)
    change = applied(PruneStructures(latency=0.6, multiple=32, places=False), model, given)
    assert change.counts["unit removed"]
    assert latency_ratio(before, model, given) < 0.8


def wide() -> dict[str, np.ndarray]:
    return {
        "w1": normal(128, 3, 3, 3),
        "b1": normal(128, scale=0.1),
        "w2": normal(128, 128, 3, 3, seed=1),
        "b2": normal(128, scale=0.1),
        "w3": normal(4, 128, seed=2),
        "b3": normal(4, scale=0.1),
    }
