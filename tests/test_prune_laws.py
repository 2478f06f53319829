"""What holds for pruning on generated graphs: valid, of the same interface, and told."""

from __future__ import annotations

import numpy as np
import pytest
from generated import generate, runs_as_written
from observed import observer
from test_laws import OWN_FOCUS, samples

from graphopt.contract import Context, Pass
from graphopt.gate import interface_of, why_other_interface
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import canonical
from graphopt_passes.prune.prune_importance import PruneImportance
from graphopt_passes.prune.prune_magnitude import PruneMagnitude
from graphopt_passes.prune.prune_stability import PruneStability

PASSES: tuple[Pass, ...] = (
    PruneMagnitude(min_elements=1, form="dense"),
    PruneMagnitude(min_elements=1, refit=False, pattern="2x2"),
    PruneImportance(min_elements=1),
    PruneImportance(min_elements=1, error=0.3, form="dense"),
    PruneImportance(min_elements=1, layers="uniform", criterion="activations", pattern="1:2"),
    PruneStability(min_elements=1, sparsity=0.8, mode="selection"),
)


def check(seed: int) -> bool:
    """Whether the pass changed the model of the seed; asserts all laws."""
    steps = [(), *OWN_FOCUS.values()]
    model = generate(seed, steps[seed % len(steps)])
    if not runs_as_written(model, samples(model)[0]):
        return False
    infer_shapes(model)
    one, text, after = PASSES[seed % len(PASSES)], canonical(model), model.clone()
    context = Context(lambda: model, observer=observer(model, samples(model)))
    if one.refuse(after, context):
        return False
    change = one.apply(after, context)
    assert canonical(model) == text, "the original was written over"
    if not change:
        assert canonical(after) == text, f"unreported change, seed {seed}"
        return False
    infer_shapes(after)
    assert why_invalid(after) is None, f"{why_invalid(after)}, seed {seed}"
    assert why_other_interface(interface_of(model), interface_of(after)) is None
    Session(after).run(samples(model)[0])
    for name, value in after.graph.initializers.items():
        old, new = model.graph.initializers.get(name), value.const_value
        if old is None or old.const_value is None or new is None or new.numpy().dtype.kind != "f":
            continue
        if np.isfinite(old.const_value.numpy()).all():
            assert np.isfinite(new.numpy()).all(), f"{name}, seed {seed}"
    return True


def test_laws_of_pruning() -> None:
    assert sum(map(check, range(6))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_laws_of_pruning_on_many_graphs(part: int) -> None:
    seeds = range(6 + part, 86, 4)

    assert sum(map(check, seeds)) > len(seeds) / 5
