"""Gradients of the operators in torch against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch_cases import (  # noqa: E402
    CODES,
    FUSIONS,
    STANDARD,
    Single,
    backend_cases,
    is_left_out,
    tensor,
)

from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.operators import OPERATORS  # noqa: E402

ELEMENTS_MAXIMUM = 130
"""Of all inputs of a case that gradients are asked for."""

JITTER = 0.02
"""How far inputs move, so that none lies at a kink or equals another."""

WITHOUT_GRADIENT = {
    "": {
        "steps": "Ceil Floor Round Sign",
        "places or counts": "ArgMax ArgMin EyeLike Hardmax NonZero OneHot Shape Size",
        "truth": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor",
        "integers": "BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor",
        "codes": "ConvInteger DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul"
        " QuantizeLinear",
        "of sizes alone": "BlackmanWindow ConstantOfShape HammingWindow HannWindow Range",
        "random": "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform"
        " RandomUniformLike",
    },
    "com.microsoft": {
        "codes": "DynamicQuantizeLSTM DynamicQuantizeMatMul QGemm QLinearAdd QLinearAveragePool"
        " QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid"
        " QLinearSoftmax QuantizeLinear",
    },
}
"""By domain, what operators give that has no gradient. Those of codes have one straight through."""

READ_AS_NUMBERS = {"Dropout": (1,), "Pad": (2,), "Resize": (1, 2), "Upsample": (1,)}
"""Indices of floating-point inputs that stay what they are."""

BELOW_ONE = frozenset({"Acos", "Asin", "Atanh"})
"""Operators whose inputs move towards 0."""

NOT_NUMBERS = ("attention_causal_boolmask_nan", "mod_float_edge_cases")
"""By how the names of cases begin, without `test_`: inputs without number or end."""


def differentiable() -> set[tuple[str, str]]:
    without = {
        (domain, op_type)
        for domain, kinds in WITHOUT_GRADIENT.items()
        for names in kinds.values()
        for op_type in names.split()
    }
    assert without <= OPERATORS.keys()
    return set(OPERATORS) - without


def why_wrong(
    model: Any, feeds: Mapping[str, Any], constants: Sequence[str], is_fast: bool
) -> str | None:
    """How gradients differ from finite differences, or None.

    Args:
        model: of one node.
        feeds: its inputs.
        constants: those that no gradient is asked for.
        is_fast: look along one direction; else along every axis.
    """
    interpreter = Interpreter(ir.from_proto(model))
    generator = torch.Generator().manual_seed(1)
    fixed = {n: x.double() if x.is_floating_point() else x for n, x in feeds.items()}
    sign = -1 if model.graph.node[0].op_type in BELOW_ONE else 1
    moved = [n for n, x in fixed.items() if x.is_floating_point() and n not in constants]
    inputs = []
    for name in moved:
        step = JITTER * torch.rand(fixed[name].shape, generator=generator)
        towards = fixed[name].sign() if sign < 0 else 1
        inputs.append((fixed[name] + sign * towards * step).requires_grad_())

    def compute(*given: Any) -> tuple[Any, ...]:
        results = interpreter.run({**fixed, **dict(zip(moved, given, strict=True))})
        return tuple(y for y in results.values() if y.is_floating_point() and y.requires_grad)

    try:
        torch.autograd.gradcheck(compute, inputs, atol=1e-5, rtol=1e-4, fast_mode=is_fast)
    except RuntimeError as error:
        return f"{error}".strip().splitlines()[0]
    return None


def small_cases() -> Iterator[tuple[int, str, Any, Mapping[str, Any], list[str]]]:
    """Cases of one node: how large, of which operator, the model, its inputs, and constants."""
    wanted = {op_type for domain, op_type in differentiable() if domain == ""}
    for case in backend_cases():
        graph, (inputs, _) = case.model.graph, case.data_sets[0]
        op_type = graph.node[0].op_type
        is_strange = case.name.removeprefix("test_").startswith(NOT_NUMBERS) or is_left_out(case)
        if len(graph.node) != 1 or op_type not in wanted or is_strange:
            continue
        if any(not isinstance(x, np.ndarray | np.generic) for x in inputs):
            # Text, sequences, and types that numpy has not.
            continue
        feeds = {info.name: tensor(x) for info, x in zip(graph.input, inputs, strict=False)}
        read = READ_AS_NUMBERS.get(op_type, ())
        constants = [name for i, name in enumerate(graph.node[0].input) if i in read]
        moved = [x for n, x in feeds.items() if x.is_floating_point() and n not in constants]
        size = sum(x.numel() for x in moved)
        is_wide = all(x.dtype in (torch.float32, torch.float64) for x in moved)
        if is_wide and 0 < size <= ELEMENTS_MAXIMUM:
            yield size, op_type, case.model, feeds, constants


def why_wrong_by_case(cases_each: int | None, is_fast: bool) -> tuple[set[str], list[str]]:
    """The operators that were looked at in the smallest cases, and what is wrong."""
    found: dict[str, list[tuple[int, Any, Mapping[str, Any], list[str]]]] = {}
    for size, op_type, *case in small_cases():
        found.setdefault(op_type, []).append((size, *case))
    wrong = []
    for op_type, cases in found.items():
        for _, *case in sorted(cases, key=lambda c: c[0])[:cases_each]:
            reason = why_wrong(*case, is_fast)
            wrong += [f"{op_type}: {reason}"] if reason else []
    return set(found), wrong


def test_gradients_of_backend_cases_are_finite_differences() -> None:
    seen, wrong = why_wrong_by_case(cases_each=2, is_fast=True)

    assert wrong == []
    assert len(seen) > 100


@pytest.mark.slow
def test_gradients_of_all_small_backend_cases_are_finite_differences() -> None:
    _, wrong = why_wrong_by_case(cases_each=None, is_fast=False)

    assert wrong == []


SMOOTH = [
    single
    for single in (*STANDARD, *FUSIONS, *CODES)
    if (single.domain, single.op_type) in differentiable()
]


@pytest.mark.parametrize("single", SMOOTH, ids=lambda single: single.op_type)
def test_gradients_of_single_nodes_are_finite_differences(single: Single) -> None:
    feeds = {name: tensor(x) for name, x in single.feeds.items()}
    read = (*single.constants, *READ_AS_NUMBERS.get(single.op_type, ()))
    constants = [f"x{index}" for index in read]

    assert why_wrong(single.model, feeds, constants, is_fast=True) is None


def test_every_operator_with_a_gradient_is_seen() -> None:
    seen = {("", op_type) for _, op_type, *_ in small_cases()}
    seen |= {(single.domain, single.op_type) for single in SMOOTH}

    # The branches of the backend's If read nothing.
    assert differentiable() - seen == {("", "If")}
