"""The interpreter in torch on the cases by which ONNX tests its backends, operator by operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch_cases import (  # noqa: E402
    CODES,
    FUSIONS,
    LEFT_OUT,
    STANDARD,
    Single,
    backend_cases,
    is_left_out,
    numbers,
    tensor,
)

from graphopt.errors import ModelError, SampleError  # noqa: E402
from graphopt.runtime import Reference, Session  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.operators import OPERATORS  # noqa: E402

OTHER_IN_ONNXRUNTIME = {
    "attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": "masks by a finite number",
    "attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": "masks by a finite number",
    "maxunpool_export_with_output_shape": "takes places to be those of the larger output",
}
"""By the name of a case, without `test_`: what onnxruntime does that ONNX does not."""

TOLERANCES = {
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-7,
}
"""Relative to the largest number, or to 1 where that is less; other types are equal."""

WRITTEN = 1e-4
"""Tolerance of float32 numbers that stand in a case with few digits."""

NOT_OF_NUMPY = {
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}


@cache
def runnable() -> list[tuple[Any, Interpreter]]:
    """The cases of which every operator is known, but for those that are left out."""
    found = []
    for case in backend_cases():
        try:
            interpreter = Interpreter(ir.from_proto(case.model))
        except ModelError:
            continue
        if not is_left_out(case):
            found.append((case, interpreter))
    return found


def runs() -> Iterator[tuple[Any, dict[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """A case, its inputs, what it expects and what the interpreter computes."""
    for case, interpreter in runnable():
        graph = case.model.graph
        for inputs, outputs in case.data_sets:
            given = zip(graph.input, inputs, strict=False)
            feeds = {info.name: tensor(x) for info, x in given if x is not None}
            made = zip(graph.output, outputs, strict=True)
            expected = {info.name: tensor(y) for info, y in made}
            with torch.no_grad():
                yield case, feeds, expected, interpreter.run(feeds)


def why_other(expected: Any, got: Any, least: float = 0.0) -> str | None:
    """How a tensor differs from what is expected, or None."""
    if (expected.dtype, expected.shape) != (got.dtype, got.shape):
        return f"{got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    tolerance = TOLERANCES.get(expected.dtype, 0.0)
    tolerance = max(tolerance, least) if tolerance else tolerance
    want, have = numbers(expected), numbers(got)
    largest = np.max(np.abs(want), initial=1, where=np.isfinite(want))
    if np.allclose(have, want, rtol=tolerance, atol=tolerance * largest, equal_nan=True):
        return None
    return f"off by up to {np.nanmax(np.abs(have - want))}"


def test_every_case_gives_what_onnx_expects() -> None:
    wrong, count = [], 0
    for case, _, expected, got in runs():
        count += 1
        reasons = {name: why_other(y, got[name], WRITTEN) for name, y in expected.items()}
        wrong += [f"{case.name}: {name} is {why}" for name, why in reasons.items() if why]

    assert wrong == []
    assert count > 1500


def test_every_case_gives_what_onnxruntime_computes() -> None:
    wrong, count = [], 0
    for case, feeds, _, got in runs():
        name = case.name.removeprefix("test_")
        is_known = all(x.dtype not in NOT_OF_NUMPY for x in feeds.values())
        if name in OTHER_IN_ONNXRUNTIME or not is_known:
            continue
        try:
            session = Session(ir.from_proto(case.model), Reference.AS_WRITTEN)
            expected = session.run({name: x.numpy() for name, x in feeds.items()})
        except (ModelError, SampleError):
            # onnxruntime lacks the operator, the type or the opset.
            continue
        count += 1
        reasons = {name: why_other(tensor(y), got[name]) for name, y in expected.items()}
        wrong += [f"{case.name}: {name} is {why}" for name, why in reasons.items() if why]

    assert wrong == []
    assert count > 1000


def test_what_is_left_out_is_there() -> None:
    names = [case.name.removeprefix("test_") for case in backend_cases()]

    assert OTHER_IN_ONNXRUNTIME.keys() - set(names) == set()
    assert [p for p in LEFT_OUT if not any(name.startswith(p) for name in names)] == []


SEEN_ELSEWHERE = {
    "Bernoulli": "test_random_operators_draw_from_their_distributions",
    "Multinomial": "test_random_operators_draw_from_their_distributions",
    "RandomNormal": "test_random_operators_draw_from_their_distributions",
    "RandomNormalLike": "test_random_operators_draw_from_their_distributions",
    "RandomUniformLike": "test_random_operators_draw_from_their_distributions",
    "RandomUniform": "test_random_operators_draw_from_their_distributions",
}
"""Operators that neither a case nor a model here has, and the test that runs them."""


def test_every_operator_has_a_case_or_a_test() -> None:
    nodes = [node for case, _ in runnable() for node in case.model.graph.node]
    covered = {(node.domain, node.op_type) for node in nodes}
    covered |= {(single.domain, single.op_type) for single in (*STANDARD, *FUSIONS, *CODES)}
    covered |= {("", op_type) for op_type in SEEN_ELSEWHERE}

    assert OPERATORS.keys() - covered == set()
    assert set(SEEN_ELSEWHERE.values()) <= set(globals())


@pytest.mark.parametrize("single", [*STANDARD, *FUSIONS, *CODES], ids=lambda single: single.op_type)
def test_single_nodes_give_what_onnxruntime_computes(single: Single) -> None:
    model = ir.from_proto(single.model)
    expected = Session(model, Reference.AS_WRITTEN).run(single.feeds)

    got = Interpreter(model).run({name: torch.tensor(x) for name, x in single.feeds.items()})
    wrong = [f"{name} is {why_other(tensor(y), got[name])}" for name, y in expected.items()]

    assert wrong == [f"{name} is None" for name in expected]


def draw(op_type: str, *inputs: np.ndarray, **attributes: Any) -> Any:
    single = Single(op_type, inputs, attributes, domain="")
    feeds = {name: torch.tensor(x) for name, x in single.feeds.items()}
    return Interpreter(ir.from_proto(single.model)).run(feeds)["y0"]


def test_random_operators_draw_from_their_distributions() -> None:
    shape = [64, 64]
    like = np.zeros(shape, np.float32)
    normal = draw("RandomNormal", shape=shape, mean=2.0, scale=3.0, seed=1.0)
    normal_like = draw("RandomNormalLike", like, mean=2.0, scale=3.0, seed=2.0)
    uniform = draw("RandomUniform", shape=shape, low=-1.0, high=3.0, seed=3.0)
    uniform_like = draw("RandomUniformLike", like, low=-1.0, high=3.0, seed=4.0)
    coins = draw("Bernoulli", like + 0.25, seed=5.0)
    drawn = draw(
        "Multinomial", np.log([[0.25, 0.75]]).astype(np.float32), sample_size=4000, seed=6.0
    )

    for numbers_ in (normal, normal_like):
        assert abs(numbers_.mean() - 2) < 0.2 and abs(numbers_.std() - 3) < 0.2
    for numbers_ in (uniform, uniform_like):
        assert -1 <= numbers_.min() < -0.9 and 2.9 < numbers_.max() <= 3
    assert set(coins.unique().tolist()) == {0.0, 1.0} and abs(coins.mean() - 0.25) < 0.05
    assert drawn.dtype == torch.int32 and abs(drawn.double().mean() - 0.75) < 0.05
    assert torch.equal(normal, draw("RandomNormal", shape=shape, mean=2.0, scale=3.0, seed=1.0))
