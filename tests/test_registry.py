"""Passes by name, from any distribution."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.contract import Pass
from graphopt.errors import SpecError
from graphopt.registry import parse_passes, pass_class, pass_names

PASSES = Path(__file__).parent.parent / "passes" / "graphopt_passes"
TESTS = Path(__file__).parent
NOT_PASSES = {
    "__init__.py",
    "activations.py",
    "affine.py",
    "aims.py",
    "balanced_rounding.py",
    "balancing.py",
    "bases.py",
    "blocks.py",
    "chains.py",
    "choice.py",
    "codebooks.py",
    "coding.py",
    "columns.py",
    "decisions.py",
    "dynamic_costs.py",
    "dynamic_layers.py",
    "dynamic_writing.py",
    "each.py",
    "entries.py",
    "flows.py",
    "folding.py",
    "fusing.py",
    "granularity.py",
    "half_places.py",
    "half_ranges.py",
    "half_reasons.py",
    "half_regions.py",
    "halves.py",
    "halving.py",
    "hqq.py",
    "integer_weights.py",
    "kernel_nodes.py",
    "kernel_tables.py",
    "kernel_weights.py",
    "kmeans.py",
    "lanes.py",
    "latency.py",
    "layers.py",
    "lost_fusions.py",
    "masks.py",
    "misfit.py",
    "narrow_weights.py",
    "narrowing.py",
    "near_rows.py",
    "no_change.py",
    "normalization.py",
    "number_formats.py",
    "number_weights.py",
    "parameters.py",
    "partly.py",
    "pattern.py",
    "plain_operands.py",
    "pruning.py",
    "ranges.py",
    "ranks.py",
    "recipes.py",
    "reductions.py",
    "refitting.py",
    "regions.py",
    "removal.py",
    "rescaling.py",
    "resizing.py",
    "retyping.py",
    "rounding.py",
    "scenarios.py",
    "sinks.py",
    "sources.py",
    "sparsities.py",
    "stability.py",
    "storing.py",
    "stretches.py",
    "structures.py",
    "sureness.py",
    "tail_choice.py",
    "tails.py",
    "trained_grids.py",
    "treatments.py",
    "twins.py",
    "unit_budgets.py",
    "unit_choice.py",
    "unit_costs.py",
    "unit_refitting.py",
    "unit_scores.py",
    "units.py",
    "views.py",
    "weights.py",
    "zeros.py",
}


def files_of_passes() -> dict[str, Path]:
    return {
        path.stem.replace("_", "-"): path
        for path in PASSES.rglob("*.py")
        if path.name not in NOT_PASSES
    }


def test_every_file_of_a_pass_is_registered_and_every_registered_pass_has_its_file() -> None:
    built_in = {n for n in pass_names() if pass_class(n).__module__.startswith("graphopt_passes")}

    assert built_in == set(files_of_passes())


@pytest.mark.parametrize("name", pass_names())
def test_name_file_class_and_test_agree(name: str) -> None:
    cls = pass_class(name)

    assert issubclass(cls, Pass)
    assert cls.__module__.rsplit(".", 1)[-1] == name.replace("-", "_")
    assert cls.__name__ == "".join(part.capitalize() for part in name.split("-"))
    assert (TESTS / f"test_{name.replace('-', '_')}.py").exists()
    assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(")


@pytest.mark.parametrize("name", pass_names())
def test_text_form_of_every_pass_round_trips(name: str) -> None:
    (one,) = parse_passes(name)

    assert str(one) == name
    assert parse_passes(f"{one}") == (one,)


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="no pass 'fold-constant'; did you mean 'fold-constants'"):
        parse_passes("fold-constant")


def test_a_pass_of_another_distribution_works_the_same(tmp_path: Path) -> None:
    """Installed as pip would lay it out: a module and its dist-info with entry points."""
    (tmp_path / "shout.py").write_text(
        """
from dataclasses import dataclass
from typing import ClassVar
from graphopt import Change, Context, Effect, Pass

@dataclass(frozen=True)
class NegateTwice(Pass):
    '''Does nothing, loudly.'''
    name: ClassVar[str] = "negate-twice"
    effect: ClassVar[Effect] = Effect.EXACT
    volume: int = 3
    def apply(self, model, context: Context) -> Change:
        change = Change()
        change.skip("everything", f"volume {self.volume}")
        return change
"""
    )
    info = tmp_path / "shout-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shout\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.passes]\nnegate-twice = shout:NegateTwice\n")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import graphopt
from graphopt.testing import parse
model = parse("agraph (float[2] x) => (float[2] y) { y = Neg(x) }")
run = graphopt.optimize(model, passes="negate-twice{volume=7}", benchmark=False)
print(run.steps[0].spec, run.steps[0].skips[0].reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "negate-twice{volume=7} volume 7"


def test_two_distributions_that_claim_one_name_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.passes]\ndrop-unused = rival:DropUnused\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(SpecError, match=r"'drop-unused' is claimed in graphopt\.passes by both"):
        pass_names()
