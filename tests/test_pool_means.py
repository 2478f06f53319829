from __future__ import annotations

import numpy as np
import pytest

from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.fuse.pool_means import PoolMeans


def test_a_mean_over_places_is_a_pool() -> None:
    assert_rewrites(
        PoolMeans(),
        """
        <ir_version: 8, opset_import: ["" : 18]>
        agraph (float[N,3,4,5] x) => (float[N,3,1,1] y) <int64[2] axes = {-1, 2}>
        { m = ReduceMean (x, axes) y = Relu (m) }
        """,
        """
        <ir_version: 8, opset_import: ["" : 18]>
        agraph (float[N,3,4,5] x) => (float[N,3,1,1] y) <int64[2] unread = {-1, 2}>
        { m = GlobalAveragePool (x) y = Relu (m) }
        """,
    )


def test_one_that_drops_the_places_is_flattened() -> None:
    assert_rewrites(
        PoolMeans(),
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2,3,4,5] x) => (float[2,3] y)
        { y = ReduceMean <axes = [2, 3], keepdims = 0> (x) }
        """,
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2,3,4,5] x) => (float[2,3] y)
        { m = GlobalAveragePool (x) y = Flatten <axis = 1> (m) }
        """,
    )


@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize("places", [(7, 6), (4, 3, 5)])
def test_the_means_are_those_of_before(places: tuple[int, ...], keeps: int) -> None:
    axes = list(range(2, 2 + len(places)))
    dims = ",".join(map(str, (2, 5, *places)))
    made_dims = ",".join("NCDHW"[: 2 + keeps * len(places)])
    made = parse(f"""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[{dims}] x) => (float[{made_dims}] y)
    {{ m = ReduceMean <axes = {axes}, keepdims = {keeps}> (x) y = Relu (m) }}
    """)
    before = made.clone()

    change = apply_pass(PoolMeans(), made)

    assert change.counts == {"mean written as a pool": 1}
    assert_equivalent(before, made)


@pytest.mark.parametrize(
    ("dims", "attributes", "reason"),
    [
        ("2,3,4", "axes = [2]", "images"),
        ("2,3,4,5", "axes = [1, 2]", "other axes"),
        ("2,3,4,5", "axes = [3]", "other axes"),
        ("2,3,4,5", "keepdims = 1", "other axes"),
    ],
)
def test_other_means_stay(dims: str, attributes: str, reason: str) -> None:
    made = ",".join("ABCD"[: len(dims.split(","))])
    model = parse(f"""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[{dims}] x) => (float[{made}] y)
    {{ m = ReduceMean <{attributes}> (x) y = Relu (m) }}
    """)

    (skip,) = assert_unchanged(PoolMeans(), model).skips

    assert reason in skip.reason


def test_means_of_other_types_stay() -> None:
    made = parse("""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (double[2,3,4,5] x) => (double[A,B,C,D] y)
    { m = ReduceMean <axes = [2, 3]> (x) y = Relu (m) }
    """)

    assert_unchanged(PoolMeans(), made)


def test_a_mean_that_is_an_output_keeps_its_name() -> None:
    made = parse("""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2,3,4,5] x) => (float[2,3,1,1] y) { y = ReduceMean <axes = [2, 3]> (x) }
    """)
    before = made.clone()

    apply_pass(PoolMeans(), made)

    assert [value.name for value in made.graph.outputs] == ["y"]
    assert_equivalent(before, made)
    assert np.shape(made.graph[0].inputs) == (1,)
