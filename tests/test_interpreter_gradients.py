"""Gradients of the operators in torch against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch_cases import CODES, FUSIONS, Single, backend_cases, tensor  # noqa: E402

from graphopt.errors import ModelError  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.operators import OPERATORS  # noqa: E402

CASES_EACH = 3
ELEMENTS_MAXIMUM = 130
"""Of all inputs of a case that gradients are asked for."""

JITTER = 0.02
"""Added to inputs, so that none lies at a kink or equals another."""

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

ARGUMENTS = {
    "Dropout": (1,),
    "Range": (0, 1, 2),
    "Resize": (1, 2),
    "Upsample": (1,),
}
"""Indices of floating-point inputs that are read as plain numbers."""

OF_FLOAT32 = {
    "attention_3d_softmax_precision": "states a type to compute in",
}


def differentiable() -> set[tuple[str, str]]:
    without = {
        (domain, op_type)
        for domain, kinds in WITHOUT_GRADIENT.items()
        for names in kinds.values()
        for op_type in names.split()
    }
    assert without <= OPERATORS.keys()
    return set(OPERATORS) - without


def why_wrong(interpreter: Interpreter, feeds: dict[str, Any], constants: Sequence[str]) -> str | None:
    """How the gradients differ from finite differences, or None."""
    moved = [n for n, x in feeds.items() if x.is_floating_point() and n not in constants]
    fixed = {n: x.double() if x.is_floating_point() else x for n, x in feeds.items()}
    generator = torch.Generator().manual_seed(1)
    inputs = [
        (fixed[n] + JITTER * torch.rand(fixed[n].shape, generator=generator)).requires_grad_()
        for n in moved
    ]

    def compute(*given: Any) -> tuple[Any, ...]:
        results = interpreter.run({**fixed, **dict(zip(moved, given, strict=True))})
        return tuple(y for y in results.values() if y.is_floating_point() and y.requires_grad)

    try:
        torch.autograd.gradcheck(compute, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def test_gradients_of_backend_cases_are_finite_differences() -> None:
    cases: dict[str, list[tuple[int, Any, dict[str, Any], list[str]]]] = {}
    for case in backend_cases():
        graph = case.model.graph
        if len(graph.node) != 1 or ("", graph.node[0].op_type) not in differentiable():
            continue
        op_type, (inputs, _) = graph.node[0].op_type, case.data_sets[0]
        if any(not isinstance(x, np.ndarray | np.generic) for x in inputs):
            continue
        names = [info.name for info in graph.input]
        feeds = {n: tensor(x) for n, x in zip(names, inputs, strict=False)}
        places = [n for i, n in enumerate(graph.node[0].input) if i in ARGUMENTS.get(op_type, ())]
        moved = [x for n, x in feeds.items() if x.is_floating_point() and n not in places]
        size = sum(x.numel() for x in moved)
        is_plain = all(x.dtype in (torch.float32, torch.float64) for x in moved)
        if 0 < size <= ELEMENTS_MAXIMUM and is_plain:
            cases.setdefault(op_type, []).append((size, case, feeds, places))
    wrong, done = [], set()
    for op_type, found in cases.items():
        for _, case, feeds, places in sorted(found, key=lambda c: c[0])[:CASES_EACH]:
            try: reason = why_wrong(Interpreter(ir.from_proto(case.model)), feeds, places)
            except Exception as e: reason = 'EXC ' + repr(e)[:200]
            wrong += [f"{case.name}: {reason}"] if reason else []
            done.add(op_type)
    print('\n'.join(wrong))
    print(sorted(o for d,o in differentiable() if d=='' and o not in done))
