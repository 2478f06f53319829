"""The graphs of `benchmarks/scaling.py` are real models, and basic finds work in them."""

from __future__ import annotations

import onnx
from mixed_graph import mixed_graph

import graphopt


def test_basic_shrinks_a_mixed_graph_and_keeps_its_outputs() -> None:
    proto = mixed_graph(120)
    onnx.checker.check_model(proto, full_check=True)

    run = graphopt.optimize(proto, recipe="basic", benchmark=False)

    assert [step for step in run.steps if step.verdict == "rolled back"] == []
    assert run.optimized.nodes < 0.7 * run.original.nodes
    acted = {step.spec for step in run.steps if step.kept}
    assert {"fold-constants", "fuse-batchnorm", "merge-common-subexpressions"} <= acted
