"""Which outputs answer by the largest of a row, as the graph and the shape tell."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.class_outputs import has_classes, is_score, rows_of, why_no_classes
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse

HEADS = {
    "y = Softmax(x)": None,
    "y = Identity(x)": None,
    "a = Sigmoid(x) y = Identity(a)": "an answer of its own",
    "y = HardSigmoid(x)": "an answer of its own",
    "a = Sigmoid(x) b, c = Split <axis = 1, num_outputs = 2> (a) y = Identity(b)": "of its own",
    "y = Concat <axis = -1> (x, x)": "joins several",
    "y = Concat <axis = 2> (x, x)": "joins several",
    "a = Concat <axis = 2> (x, x) y = Cast <to = 10> (a)": "joins several",
    "y = Concat <axis = 1> (x, x)": None,
    "a = Concat <axis = 1> (x, x) y = Transpose <perm = [0, 2, 1]> (a)": "joins several",
    "a = Concat <axis = 2> (x, x) y = Transpose <perm = [0, 2, 1]> (a)": None,
    "a = Concat <axis = 1> (x, x) y = Transpose (a)": None,
    "a = Concat <axis = 2> (x, x) y = Reshape (a, whole)": "joins several",
    "a = Concat <axis = 1> (x, x) y = Reshape (a, whole)": None,
    "a = Concat <axis = 2> (x, x) y = Flatten (a)": None,
    "a = Concat <axis = 2> (x, x) b = Unsqueeze (a, one) c = Squeeze (b, one) y = Identity (c)": (
        "joins several"
    ),
    "a = Concat <axis = 2> (x, x) y = Relu (a)": None,
}
"""Of x [2, 4, 6]: the nodes that make y, and what is said against classes."""


@pytest.mark.parametrize("nodes", HEADS)
def test_the_graph_tells_what_a_last_axis_is(nodes: str) -> None:
    constants = "int64[2] whole = {8, 12}, int64[1] one = {1}"
    model = parse(f"g (float[2, 4, 6] x) => (z) <{constants}> {{{nodes} z = Identity(y)}}")
    infer_shapes(model)

    reason = why_no_classes(model.graph.outputs[0])

    expected = HEADS[nodes]
    assert (reason is None) == (expected is None), reason
    assert (expected or "") in (reason or "")
    assert is_score(model.graph.outputs[0]) == ("Sigmoid" in nodes)


def test_an_output_that_is_an_input_says_nothing() -> None:
    model = parse("g (float[2, 3] x) => (float[2, 3] x) {}")

    assert why_no_classes(model.graph.outputs[0]) is None


@pytest.mark.parametrize(
    "shape, rows",
    [
        ((1, 10), (1, 10)),
        ((2, 5, 10), (10, 10)),
        ((1, 1000, 1, 1), (1, 1000)),
        ((3, 7, 1), (3, 7)),
    ],
)
def test_classes_lie_on_the_last_axis_that_is_longer_than_1(
    shape: tuple[int, ...], rows: tuple[int, int]
) -> None:
    array = np.zeros(shape)

    assert has_classes(array)
    assert rows_of(array).shape == rows


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (4, 1, 1), (1, 3, 8, 8), (1, 3, 8, 8, 8)])
def test_numbers_of_samples_and_sides_of_images_are_no_classes(shape: tuple[int, ...]) -> None:
    assert not has_classes(np.zeros(shape))
