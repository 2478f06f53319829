"""Moments of what layers read and should give: onnxruntime's own layers are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from observed import observer
from on_codes import normal

from graphopt.contract import Sample
from graphopt.observe import Question
from graphopt.regression import Regression
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes
from graphopt.statistics import GRAM_ROWS_MAXIMUM, Patches
from graphopt.testing import parse
from graphopt_passes.quantize.layers import layer_of

CONVS = {
    "plain": ("", (6, 4, 3, 3), (4, 9, 8)),
    "strides, pads": ("<strides = [2, 1], pads = [1, 0, 2, 1]>", (6, 4, 3, 2), (4, 9, 8)),
    "dilations": ("<dilations = [2, 3]>", (5, 4, 2, 2), (4, 9, 8)),
    "groups": ("<group = 2, pads = [1, 1, 1, 1]>", (6, 2, 3, 3), (4, 6, 6)),
    "depthwise": ("<group = 4, strides = [2, 2]>", (8, 1, 3, 3), (4, 9, 9)),
    "same": ('<auto_pad = "SAME_LOWER", strides = [2, 2]>', (6, 4, 3, 2), (4, 7, 8)),
    "one axis": ("<pads = [2, 1], strides = [2]>", (3, 4, 4), (4, 11)),
}
"""Attributes, the shape of the weight, and that of one image."""


def conv_of(name: str, batch: int = 3) -> tuple[np.ndarray, list[Sample], Regression, np.ndarray]:
    """A weight, samples, what is seen of the Conv on them, and its bias."""
    attributes, shape, image = CONVS[name]
    weight, bias = normal(0, *shape), normal(1, shape[0])
    dims = ",".join(map(str, image))
    model = parse(
        f"agraph (float[N,{dims}] x, float[{','.join(map(str, shape))}] w, float[{shape[0]}] b)"
        f" => (float[{','.join('ABCD'[: len(shape)])}] y)"
        f" {{ y = Conv{attributes}(x, w, b) }}",
        w=weight,
        b=bias,
    )
    infer_shapes(model)
    (node,) = model.graph
    samples = [{"x": normal(5 + seed, batch + seed, *image) + 0.5} for seed in range(4)]
    question = Question("x", "regression", patches=layer_of(node).patches(), aim="y")
    found = observer(model, samples)(model, [question])[question]
    assert isinstance(found, Regression)
    return weight, samples, found, bias


@pytest.mark.parametrize("name", sorted(CONVS))
def test_a_conv_is_recovered_from_what_it_reads_and_gives(name: str) -> None:
    """So rows are those of the Conv, and at the same places for both."""
    weight, _, found, bias = conv_of(name)
    moments, cross, _ = found.moments(central=True)
    solved = np.linalg.solve(moments, cross.transpose(0, 2, 1)).transpose(0, 2, 1)

    np.testing.assert_allclose(solved.reshape(weight.shape), weight, rtol=1e-3, atol=1e-4)
    offset = found.aim_means - np.einsum("gnk,gk->gn", solved, found.means)
    np.testing.assert_allclose(offset.reshape(-1), bias, rtol=1e-3, atol=1e-4)


def windows_of(image: np.ndarray, kernel: int, stride: int, pad: int) -> np.ndarray:
    """All windows by loops: [rows, inputs], places of the first image first."""
    padded = np.pad(image, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    across = range(0, padded.shape[2] - kernel + 1, stride)
    return np.array(
        [
            one[:, i : i + kernel, j : j + kernel].reshape(-1)
            for one in padded
            for i in across
            for j in range(0, padded.shape[3] - kernel + 1, stride)
        ]
    )


def test_moments_of_a_conv_are_those_of_its_windows() -> None:
    """Few enough rows for all of them to count."""
    image, aim = normal(0, 2, 3, 6, 7), normal(1, 2, 5, 3, 4)
    found = Regression(Patches((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)))
    found.add(image, aim)
    read = windows_of(image, 3, 2, 1).astype(np.float64)
    given = aim.transpose(0, 2, 3, 1).reshape(-1, 5).astype(np.float64)

    assert found.rows == len(read) == len(given) == 24
    assert_moments(found, read, given)


@pytest.mark.parametrize("shape", [(40, 6), (5, 8, 6), (6,)], ids=str)
def test_moments_of_a_product_are_those_of_its_rows(shape: tuple[int, ...]) -> None:
    found, reads, gives = Regression(), [], []
    for seed in range(3):
        reads.append(normal(seed, *shape) + 1)
        gives.append(normal(seed + 9, *shape[:-1], 4) - 2)
        found.add(reads[-1], gives[-1])
    read, given = (
        np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays]).astype(np.float64)
        for arrays in (reads, gives)
    )

    assert found.rows == len(read)
    assert_moments(found, read, given)


def assert_moments(found: Regression, read: np.ndarray, given: np.ndarray) -> None:
    """Those of all rows of one group, about zero and about the means."""
    close = {"rtol": 1e-4, "atol": 1e-5}
    for central in (False, True):
        z, t = (rows - central * rows.mean(0) for rows in (read, given))
        total, cross, squares = found.moments(central)
        np.testing.assert_allclose(total[0], z.T @ z / len(z), **close)
        np.testing.assert_allclose(cross[0], t.T @ z / len(z), **close)
        np.testing.assert_allclose(squares[0], np.square(t).mean(0), **close)
    np.testing.assert_allclose(found.means[0], read.mean(0), **close)
    np.testing.assert_allclose(found.aim_means[0], given.mean(0), **close)


def test_of_many_rows_the_same_are_chosen_of_both() -> None:
    weight = normal(0, 4, 6)
    found = Regression()
    for seed in range(3):
        read = normal(seed, 50, 90, 6)
        found.add(read, read @ weight.T)
    total, cross, _ = found.moments(central=False)

    assert found.rows < 3 * GRAM_ROWS_MAXIMUM
    np.testing.assert_allclose(np.linalg.solve(total[0], cross[0].T).T, weight, rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_no_numbers_are_left_out_of_both(bad: float, side: int) -> None:
    read, given = normal(0, 20, 6), normal(1, 20, 3)
    (read, given)[side][[2, 7], 1] = bad
    found = Regression()
    found.add(read, given)
    good = np.delete(np.arange(20), [2, 7])

    assert found.rows == 18
    assert_moments(found, read[good].astype(np.float64), given[good].astype(np.float64))


def test_where_no_row_is_a_number_nothing_is_seen() -> None:
    found = Regression()
    found.add(np.full((4, 3), np.nan, np.float32), normal(0, 4, 2))
    found.add(np.zeros((0, 3), np.float32), np.zeros((0, 2), np.float32))
    assert (found.rows, found.arrays) == (0, 2)
    found.add(normal(1, 4, 3), normal(2, 4, 2))
    assert found.rows == 4


@pytest.mark.parametrize("rows", [4, 300])
def test_a_sum_that_broadcasts_says_nothing(rows: int) -> None:
    """300 rows: of so many as of 200, equally many are chosen, at other places."""
    found = Regression()
    found.add(normal(0, 200, 3), normal(1, rows, 2))
    assert not found.rows
    conv = Regression(Patches((2, 2), (1, 1), (1, 1), (0, 0, 0, 0)))
    conv.add(normal(0, 1, 3, 5, 5), normal(1, 1, 2, 4, 5))
    assert not conv.rows
    conv.add(normal(0, 1, 3, 5, 5), normal(1, 1, 2, 4, 4))
    assert conv.rows == 16


def test_memory_does_not_grow_with_arrays() -> None:
    found = Regression()
    found.add(normal(0, 30, 6), normal(1, 30, 3))
    before = {name: array.nbytes for name, array in vars(found).items() if hasattr(array, "nbytes")}
    for seed in range(5):
        found.add(normal(seed, 30 + seed, 6), normal(9 + seed, 30 + seed, 3))
    after = {name: array.nbytes for name, array in vars(found).items() if hasattr(array, "nbytes")}
    assert before == after and found.rows == 30 + sum(range(30, 35))


def test_arrays_stay_as_they_are() -> None:
    read, given = normal(0, 30, 6), normal(1, 30, 3)
    kept = read.copy(), given.copy()
    found = Regression()
    found.add(read, given)
    found.add(read, given)
    np.testing.assert_array_equal(read, kept[0])
    np.testing.assert_array_equal(given, kept[1])


@pytest.mark.parametrize("about, aim", [("gram", "y"), ("regression", None)])
def test_a_regression_has_an_aim_and_nothing_else_has(about: str, aim: str | None) -> None:
    with pytest.raises(ValueError, match="a regression has an aim, and nothing else has"):
        Question("x", about, aim=aim)


def test_nodes_that_no_question_needs_do_not_run() -> None:
    """One behind the values fails on every sample; inputs that only it reads can still be fed."""
    model = parse(
        "agraph (float[N,4] x, float[M] z, int64[1] to) => (float[A] y)"
        "{ a = Relu(x) b = Reshape(z, to) y = Add(b, b) }",
    )
    infer_shapes(model)
    to = {"to": np.array([3], np.int64), "z": np.zeros(4, np.float32)}
    samples = [{"x": normal(0, 5, 4), **to}]
    with pytest.raises(Exception, match="annot be reshaped"):
        Session(model).run(samples[0])
    question = Question("x", "regression", aim="a")
    found = observer(model, samples)(model, [question])[question]

    assert isinstance(found, Regression) and found.rows == 5
