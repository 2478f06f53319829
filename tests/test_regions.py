"""The minimum cut that decides which units work on codes, against all choices that there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from on_codes import all_units

from graphopt.testing import parse
from graphopt_passes.quantize.latency import DEQUANTIZE_NS, QUANTIZE_NS, Cost
from graphopt_passes.quantize.regions import SameScale, chosen_units
from graphopt_passes.quantize.units import Unit

ONE_INPUT = ("Relu", "Sigmoid", "Transpose", "Tanh", "Identity", "MatMul")
"""Tanh can only work on floats."""

ELEMENTS = 20
"""Times which the costs of changing form are whole numbers of nanoseconds, as are all others."""


def random_model(generator: np.random.Generator, nodes: int) -> ir.Model:
    """Nodes on values of one shape, with any of them as outputs."""
    names, lines = ["x", "u"], []
    for number in range(nodes):
        first, second = generator.choice(names[-4:], 2)
        if generator.random() < 0.3:
            lines.append(f"v{number} = Add({first}, {second})")
        else:
            op_type = generator.choice(ONE_INPUT)
            weight = ", w" if op_type == "MatMul" else ""
            lines.append(f"v{number} = {op_type}({first}{weight})")
        names.append(f"v{number}")
    made = names[2:]
    outputs = {made[-1], *generator.choice(made, generator.integers(1, 3))}
    return parse(
        f"""
        agraph (float[4, 5] x, float[4, 5] u, float[5, 5] w)
            => ({", ".join(f"float[R, C] {name}" for name in sorted(outputs))})
        {{ {" ".join(lines)} }}
        """,
        w=np.eye(5, dtype=np.float32),
    )


def cost_of(
    chosen: set[Unit], units: list[Unit], costs: dict[Unit, Cost], elements: dict[ir.Value, float]
) -> float:
    """What a choice costs: of each unit, and of each value that is read in its other form."""
    total = sum(costs[u].codes_ns if u in chosen else costs[u].floats_ns for u in units)
    by_node = {unit.node: unit for unit in units}
    makers = {output: unit for unit in units for output in unit.outputs}
    for value in elements:
        readers = [by_node.get(use.node) for use in value.uses()]
        as_codes = any(unit in chosen for unit in readers)
        as_floats = any(unit not in chosen for unit in readers) or value.is_graph_output()
        maker = makers.get(value)
        if maker in chosen:
            # The integer kernel of a MatMul makes floats as well.
            free = maker.node.op_type == "MatMul" and not maker.saturated and not any(readers)
            total += DEQUANTIZE_NS * elements[value] if as_floats and not free else 0.0
        elif as_codes:
            total += QUANTIZE_NS * elements[value]
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(462).via("a MatMul with a Relu makes floats at the cost of others")
def test_no_choice_is_cheaper_than_the_one_that_is_found(seed: int) -> None:
    generator = np.random.default_rng(seed)
    model = random_model(generator, int(generator.integers(2, 9)))
    units, _ = all_units(model)
    values = dict.fromkeys(v for unit in units for v in (*unit.sources, *unit.outputs))
    elements = {value: float(ELEMENTS * generator.integers(1, 6)) for value in values}
    costs = {
        unit: Cost(*map(float, generator.integers(0, 150, 2)))
        for unit in units
    }  # fmt: skip
    if not units:
        return

    found = chosen_units(units, costs, elements.__getitem__)

    assert found == [unit for unit in units if unit in found]
    subsets = itertools.product([False, True], repeat=len(units))
    least = min(
        cost_of({u for u, on in zip(units, subset, strict=True) if on}, units, costs, elements)
        for subset in subsets
    )
    assert cost_of(set(found), units, costs, elements) == pytest.approx(least, abs=1e-6)


CHAIN = """
agraph (float[4, 5] x, float[5, 5] w) => (float[4, 5] y)
{ a = MatMul(x, w) b = Sigmoid(a) c = MatMul(b, w) y = Tanh(c) }
"""


def chain(*gains_ns: float) -> list[str]:
    """What is chosen of MatMul, Sigmoid and MatMul if codes gain so much in each."""
    model = parse(CHAIN, w=np.eye(5, dtype=np.float32))
    units, _ = all_units(model)
    assert [unit.node.op_type for unit in units] == ["MatMul", "Sigmoid", "MatMul"]
    costs = {
        unit: Cost(max(gain, 0.0), max(-gain, 0.0))
        for unit, gain in zip(units, gains_ns, strict=True)
    }
    found = chosen_units(units, costs, lambda _: 20.0)
    return [unit.node.outputs[0].name or "" for unit in found]


def test_a_region_grows_over_what_loses_less_than_the_changes_of_form() -> None:
    to_codes, back = 20 * QUANTIZE_NS, 20 * DEQUANTIZE_NS
    assert chain(100, -(to_codes + back - 1), 100) == ["a", "b", "c"]
    assert chain(100, -(to_codes + back + 1), 100) == ["a", "c"]
    # The last MatMul makes floats by itself, so that nothing changes back behind it.
    assert chain(to_codes - 1, 0, 0) == []
    assert chain(to_codes + 1, 0, 0) == ["a", "b", "c"]
    assert chain(100, -(back - 1), 0) == ["a", "b", "c"]
    assert chain(100, -(back + 1), 0) == ["a"]


@pytest.mark.parametrize("scale", [1.0, 1e9, 1e15])
def test_costs_of_any_size(scale: float) -> None:
    model = parse(CHAIN, w=np.eye(5, dtype=np.float32))
    units, _ = all_units(model)
    costs = {unit: Cost(100 * scale, 1 * scale) for unit in units}

    assert chosen_units(units, costs, lambda _: scale) == units
    assert chosen_units(units, costs, lambda _: 1000 * scale) == []


def test_of_nothing_nothing_is_chosen() -> None:
    assert chosen_units([], {}, lambda _: 1.0) == []


def test_what_must_not_work_on_codes_does_not() -> None:
    model = parse(CHAIN, w=np.eye(5, dtype=np.float32))
    units, _ = all_units(model)
    costs = {unit: Cost(1e6, math.inf if unit is units[1] else 0.0) for unit in units}

    assert chosen_units(units, costs, lambda _: 20.0) == [units[0], units[2]]


def test_values_that_are_joined_have_one_that_stands_for_them() -> None:
    values = [ir.Value(name=f"v{n}") for n in range(7)]
    same = SameScale()
    same.join(values[0], values[1:3])
    same.join(values[3], [values[4]])
    assert len({same.of(v) for v in values}) == 4

    same.join(values[4], [values[2]])
    same.join(values[1], [values[3], values[1]])

    assert len({same.of(v) for v in values[:5]}) == 1
    assert len({same.of(v) for v in values}) == 3
