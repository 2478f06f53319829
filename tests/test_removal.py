"""Removal: what is left computes what the whole does with the removed units at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from generated_structures import structure
from removed import assert_law, between_layers, groups_of, some_of, without
from test_backend_cases import cases

from graphopt.contract import Context
from graphopt.errors import ModelError, SampleError
from graphopt.operators import is_random
from graphopt.rewriting import tensor_of
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import canonical, parse
from graphopt_passes.prune.removal import remove, zeroed

# ------------------------------------------------------------------ generated networks


@pytest.mark.parametrize("seed", range(50))
def test_the_law_on_generated_networks(seed: int) -> None:
    assert_law(structure(seed))


@pytest.mark.parametrize("seed", range(20))
def test_axes_may_come_to_size_1(seed: int) -> None:
    assert_law(structure(seed), share=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(50, 350, 50))
def test_the_law_on_many_generated_networks(first: int) -> None:
    for seed in range(first, first + 50):
        assert_law(structure(seed))


def test_most_generated_networks_have_something_to_remove() -> None:
    counts = [len(groups_of(structure(seed)).prunable) for seed in range(40)]

    assert sum(count > 0 for count in counts) >= 35
    assert sum(counts) >= 150


# ------------------------------------------------------------------ the cases of ONNX's backends

Feeds = Mapping[str, Any]


def _as_constants(case: Any, kept: int) -> tuple[ir.Model, dict[str, np.ndarray]] | None:
    """The case with inputs that are floats, up to so many; the others are constants."""
    model = ir.from_proto(case.model)
    feeds: dict[str, np.ndarray] = {}
    for value, given in zip(tuple(model.graph.inputs), case.data_sets[0][0], strict=False):
        if not isinstance(given, np.ndarray | np.generic) or value.dtype == ir.DataType.STRING:
            return None
        if len(feeds) < kept and value.dtype == ir.DataType.FLOAT:
            feeds[value.name or ""] = np.asarray(given)
            continue
        model.graph.inputs.remove(value)
        value.const_value = tensor_of(np.asarray(given), value.name or "")
        model.graph.register_initializer(value)
    model.ir_version = max(model.ir_version, 4)
    return model, feeds


def _check_case(case: Any, kept: int) -> int:
    made = _as_constants(case, kept)
    if made is None or any(map(is_random, made[0].graph)):
        return 0
    groups = 0
    for turn in range(2):
        model, feeds = made[0].clone(), made[1]
        infer_shapes(model)
        if not between_layers(model, turn):
            return 0
        try:
            Session(model, Reference.AS_WRITTEN).run(feeds)
        except (ModelError, SampleError):
            return groups
        groups += assert_law(model, [feeds], seeds=(0,))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 9])
def test_the_law_on_all_operators_between_layers(kept: int) -> None:
    assert sum(_check_case(case, kept) for case in cases()) > 500


@pytest.mark.slow
def test_every_case_can_be_analyzed() -> None:
    for case in cases():
        groups_of(ir.from_proto(case.model))


# ------------------------------------------------------------------ what is written

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def _kept(model: ir.Model, *stays: bool) -> ir.Model:
    """The model with these units of its one group."""
    (group,) = groups_of(model).prunable
    return without(model, {group: np.asarray(stays)})


def _between(body: str, made: int = 4, taken: int = 4) -> ir.Model:
    text = f"""g (float[2,3] x, float[3,{made}] w, float[{taken},2] v) => (float[2,2] y) {{
        h = MatMul(x, w)
        {body}
        y = MatMul(t, v)
    }}"""
    normal = np.random.default_rng(0).standard_normal
    return parse(text, w=normal((3, made)).astype(np.float32),
                 v=normal((taken, 2)).astype(np.float32))  # fmt: skip


def test_rows_and_columns_go_and_the_order_of_the_rest_stays() -> None:
    model = parse(
        "g (float[2,3] x, float[3,4] w, float[4,2] v) => (float[2,2] y)"
        "{ h = MatMul(x, w) t = Relu(h) y = MatMul(t, v) }",
        w=ROWS, v=ROWS.reshape(4, 3)[:, :2],
    )  # fmt: skip

    smaller = _kept(model, True, False, False, True)

    assert np.array_equal(_array(smaller, "w"), ROWS[:, [0, 3]])
    assert np.array_equal(_array(smaller, "v"), ROWS.reshape(4, 3)[[0, 3], :2])
    h = next(value for node in smaller.graph for value in node.outputs if value.name == "h")
    assert h.shape == (2, 2)


def _array(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    array: np.ndarray = tensor.numpy()
    return array


def _of(model: ir.Model, operator: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == operator)


def _numbers(node: ir.Node, index: int) -> list[int]:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    numbers: list[int] = value.const_value.numpy().reshape(-1).tolist()
    return numbers


def test_the_shape_of_a_reshape_is_restated() -> None:
    model = _between("""s = Constant<value_ints = [2, 2, 2]>() r = Reshape(h, s)
        q = Constant<value_ints = [0, -1]>() t = Reshape(r, q)""")

    smaller = _kept(model, True, False)

    first, second = (node for node in smaller.graph if node.op_type == "Reshape")
    assert _numbers(first, 1) == [2, 1, 2]
    assert second.inputs[1].name == "q"  # type: ignore[union-attr]


def test_a_computed_shape_gets_a_where() -> None:
    model = _between("""s = Shape(x) b = Constant<value_ints = [0]>()
        e = Constant<value_ints = [1]>() n = Slice(s, b, e)
        k = Constant<value_ints = [2, 2]>() c = Concat<axis = 0>(n, k)
        r = Reshape(h, c) t = Flatten(r)""")  # fmt: skip
    model.graph.inputs[0].shape = ir.Shape(["N", 3])

    smaller = _kept(model, True, False)

    chosen = _of(smaller, "Where")
    assert _numbers(chosen, 0) == [False, True, False]
    assert _numbers(chosen, 1) == [0, 1, 0]
    assert_law(model)


def test_a_squeeze_without_axes_says_which_are_meant() -> None:
    model = _between("""s = Constant<value_ints = [2, 1, 4]>() r = Reshape(h, s)
        t = Squeeze(r)""")  # fmt: skip

    smaller = _kept(model, False, True, False, False)

    assert _numbers(_of(smaller, "Squeeze"), 1) == [1]
    assert_law(model, share=0.0)


def test_slices_stay_slices_where_they_can() -> None:
    body = """b = Constant<value_ints = [{}]>() e = Constant<value_ints = [{}]>()
        a = Constant<value_ints = [1]>() p = Constant<value_ints = [{}]>()
        t = Slice(h, b, e, a, p)"""
    for start, end, step in [(1, 5, 1), (0, 6, 2), (5, -9, -2)]:
        picked = len(range(6)[start:end:step])
        model = _between(body.format(start, end, step), 6, picked)

        smaller = _kept(model, True, *[False] * (picked - 2), True)

        assert "Gather" not in {node.op_type for node in smaller.graph}
        assert_law(model)


def test_a_slice_in_steps_that_become_uneven_is_gathered() -> None:
    model = parse(
        """g (float[2,3] x, float[3,6] w, float[6,2] v, float[3,2] u)
            => (float[2,2] y, float[2,2] z) {
        h = MatMul(x, w)
        b = Constant<value_ints = [0]>() e = Constant<value_ints = [6]>()
        a = Constant<value_ints = [1]>() p = Constant<value_ints = [2]>()
        t = Slice(h, b, e, a, p)
        y = MatMul(t, u) z = MatMul(h, v)
        }""",
        w=np.ones((3, 6), np.float32), v=np.ones((6, 2), np.float32), u=np.ones((3, 2), np.float32),
    )  # fmt: skip
    sliced, other = groups_of(model).prunable
    assert (sliced.units, other.units) == (3, 3)

    smaller = without(model, {other: np.asarray([True, False, False])})

    assert [n.op_type for n in smaller.graph if n.op_type in ("Gather", "Slice")] == [
        "Gather",
        "Slice",
    ]
    assert_law(model)


def test_one_weight_in_two_layers_is_cut_once() -> None:
    model = parse(
        """g (float[2,4] x, float[4,4] k, float[4,4] w, float[4,2] v) => (float[2,2] y) {
        z = MatMul(x, k) a = MatMul(z, w) b = MatMul(a, w) y = MatMul(b, v)
        }""",
        k=np.eye(4, dtype=np.float32), w=np.eye(4, dtype=np.float32) + 1,
        v=np.ones((4, 2), np.float32),
    )  # fmt: skip
    (group,) = groups_of(model).prunable

    smaller = without(model, {group: np.asarray([True, True, False, False])})

    assert smaller.graph.initializers["w"].const_value.shape == (2, 2)  # type: ignore[union-attr]
    assert_law(model)


def test_the_model_is_left_alone_by_zeroed() -> None:
    model = structure(3)
    groups = groups_of(model).prunable
    before = canonical(model)

    zeroed(model, some_of(groups, 0))

    assert canonical(model) == before


def test_what_all_stays_changes_nothing() -> None:
    model = structure(3)
    before = canonical(model)
    kept = {group: np.ones(group.units, bool) for group in groups_of(model).prunable}

    remove(model, kept, Context(lambda: model))

    assert canonical(model) == before


def test_frozen_groups_and_empty_masks_are_refused() -> None:
    model = _between("t = Relu(h)")
    groups = groups_of(model)
    (group,) = groups.prunable
    (frozen,) = groups.frozen
    context = Context(lambda: model)

    with pytest.raises(ValueError, match="is frozen: y is an output"):
        remove(model, {frozen: np.ones(2, bool)}, context)
    with pytest.raises(ValueError, match="one of them true"):
        remove(model, {group: np.zeros(4, bool)}, context)
    with pytest.raises(ValueError, match="4 units"):
        zeroed(model, {group: np.ones(3, bool)})


def test_groups_of_another_model_are_refused() -> None:
    model = _between("t = Relu(h)")
    (group,) = groups_of(model).prunable
    other, kept = model.clone(), {group: np.asarray([True, False, True, True])}

    with pytest.raises(ValueError, match="of another model"):
        remove(other, kept, Context(lambda: other))
    with pytest.raises(ValueError, match="of another model"):
        zeroed(other, kept)
