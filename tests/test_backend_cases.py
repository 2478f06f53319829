"""The cases by which ONNX tests its backends, through the recipe `basic`: nobody here wrote them.

Every case is a model of one operator (or of the function that the operator stands for) with inputs.
It comes in three forms: as it is; every input but the first a constant; all inputs constants. What
onnxruntime runs before must run after, with the same outputs. Outputs are not validated on the way,
so that the gate cannot hide a wrong rewrite.

Inputs that are sequences or optional stay inputs in every form. Left out is what onnxruntime does
not run as it is: types, operators and opsets that it does not have.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.contract import Effect
from graphopt.errors import ModelError, SampleError
from graphopt.gate import computed_in_half, interface_of, why_other_interface
from graphopt.operators import graphs_and_functions, is_random
from graphopt.rewriting import tensor_of
from graphopt.runtime import Reference, Session
from graphopt.skeleton import why_invalid
from graphopt.validation import Comparison, why_over

FORMS = {"as they are": None, "first input kept": 1, "all constant": 0}
"""How many inputs stay inputs; None for all."""

CHUNKS = 8
QUICK = ("constantofshape", "gather", "if_", "loop", "pad", "sequenceinsert", "slice", "split")
"""Files of cases for the default run: to make all cases alone takes 10 seconds."""

RUN_SHARE_MINIMUM = 0.85
"""Of the cases; with onnx 1.23 and onnxruntime 1.32 it is 0.92."""

QUICK_MAXIMUM = 30

Feeds = Mapping[str, Any]


@cache
def cases() -> Sequence[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        # The cases overflow and divide by 0 on purpose.
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return tuple(c for c in found if c.model is not None)


@cache
def some_cases() -> Sequence[Any]:
    package = importlib.import_module("onnx.backend.test.case.node")
    for name in QUICK:
        importlib.import_module(f"{package.__name__}.{name}")
    # A file fills this list when it is imported; `collect_testcases` imports them all.
    return tuple(c for c in package._NodeTestCases if c.model is not None)[::2][:QUICK_MAXIMUM]


def inputs_of(case: Any, inputs: Sequence[Any]) -> Feeds:
    """Arrays by name; lists of them for sequences, and None where an optional input is empty."""
    names = [info.name for info in case.model.graph.input]
    return {name: _plain(content) for name, content in zip(names, inputs, strict=False)}


def _plain(content: Any) -> Any:
    """What numpy has no type of comes as a proto."""
    if isinstance(content, onnx.TensorProto):
        return ir.TensorProtoTensor(content).numpy()
    return np.asarray(content) if isinstance(content, np.generic) else content


def frozen(proto: onnx.ModelProto, feeds: Feeds, kept: int | None) -> onnx.ModelProto:
    """The model with its inputs but the first few as initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    if kept is None:
        return model
    # Before, every initializer had to be an input too.
    model.ir_version = max(model.ir_version, 4)
    for info in list(model.graph.input)[kept:]:
        if isinstance(feeds[info.name], np.ndarray):
            model.graph.input.remove(info)
            tensor = ir.to_proto(tensor_of(feeds[info.name], info.name))
            model.graph.initializer.append(tensor)
    return model


def outputs(model: Any, feeds: Feeds, reference: Reference) -> dict[str, np.ndarray] | None:
    """What onnxruntime computes; None where it does not load or run the model."""
    try:
        return Session(model, reference).run(feeds)
    except (ModelError, SampleError):
        return None


def why_wrong(proto: onnx.ModelProto, feeds: Feeds) -> tuple[bool, str | None]:
    """Whether onnxruntime runs the model at all, and what is wrong after `basic`."""
    try:
        model = graphopt.load(proto)
    except ModelError:
        return False, None
    feeds = {info.name: feeds[info.name] for info in proto.graph.input}
    before = {reference: outputs(model, feeds, reference) for reference in Reference}
    if before[Reference.AS_DEPLOYED] is None:
        return False, None
    run = graphopt.optimize(proto, recipe="basic", validate=False, benchmark=False)
    rolled = [f"{s.spec}: {s.reason}" for s in run.steps if s.verdict == "rolled back"]
    if rolled:
        return True, f"rolled back {rolled}"
    structure = why_other_interface(interface_of(model), interface_of(run.model))
    if structure is None and why_invalid(model) is None:
        structure = why_invalid(run.model)
    if structure is not None:
        return True, structure
    random = any(is_random(node) for graph in graphs_and_functions(model) for node in graph)
    for reference, expected in before.items():
        got = outputs(run.model, feeds, reference)
        if expected is None:
            continue
        if got is None:
            return True, f"{reference.value}, it does not run any more"
        comparison = Comparison()
        comparison.add(expected, got)
        errors = comparison.outputs()
        reason = why_over(Effect.ROUNDING, errors, computed_in=computed_in_half(run.model))
        if reason is not None and not random:
            return True, f"{reference.value}, {reason}"
    return True, None


def check(chosen: Sequence[Any], kept: int | None) -> None:
    ran, wrong = 0, []
    for case in chosen:
        for inputs, _ in case.data_sets:
            feeds = inputs_of(case, inputs)
            ran_here, reason = why_wrong(frozen(case.model, feeds, kept), feeds)
            ran += ran_here
            wrong += [f"{case.name}: {reason}"] if reason is not None else []
    assert wrong == []
    assert ran >= RUN_SHARE_MINIMUM * len(chosen)


@pytest.mark.parametrize("kept", FORMS.values(), ids=FORMS)
def test_some_cases_compute_the_same_after_basic(kept: int | None) -> None:
    check(some_cases(), kept)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("kept", FORMS.values(), ids=FORMS)
def test_every_case_computes_the_same_after_basic(kept: int | None, chunk: int) -> None:
    assert len(cases()) > 1500

    check(cases()[chunk::CHUNKS], kept)
