"""Second moments by chunk against numpy on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
from observed import observer

from graphopt.chunked import CHUNKS, Chunks
from graphopt.contract import Sample
from graphopt.observe import Question
from graphopt.statistics import Patches, rows_of
from graphopt.testing import parse

GROUPED = Patches((3, 3), (2, 1), (1, 2), (1, 1, 1, 1), group=2)


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((2, 4, 6, 7)).astype(np.float32) for _ in range(count)]


def chunks_of(arrays: list[np.ndarray], patches: Patches | None = None) -> Chunks:
    chunks = Chunks(patches)
    for array in arrays:
        chunks.add(array)
    return chunks


def moments_of(arrays: list[np.ndarray], patches: Patches | None, chunk: int) -> np.ndarray:
    """Of the rows of a chunk, all at once: of shape [group, inputs]."""
    rows = [rows_of(a, patches, i // CHUNKS) for i, a in enumerate(arrays) if i % CHUNKS == chunk]
    squares = np.square(np.concatenate(rows, axis=1), dtype=np.float64)
    return np.asarray(squares.mean(axis=1))


@pytest.mark.parametrize("patches", [None, GROUPED, Patches((1, 1), (1, 1), (1, 1), (0,) * 4)])
def test_moments_are_those_of_the_rows_of_each_chunk(patches: Patches | None) -> None:
    arrays = images(2 * CHUNKS + 3)

    chunks = chunks_of(arrays, patches)

    assert chunks.arrays == len(arrays)
    assert chunks.moments.dtype == np.float64 and len(chunks.moments) == CHUNKS
    for chunk in range(CHUNKS):
        wanted = moments_of(arrays, patches, chunk)
        np.testing.assert_allclose(chunks.moments[chunk], wanted, rtol=1e-12)


def test_chunks_without_rows_have_no_moments() -> None:
    huge = np.full((3, 2), 1e30, np.float32)
    arrays = [np.ones((3, 2), np.float32), huge, np.zeros((0, 2), np.float32), huge / 1e30 * 2]

    chunks = chunks_of(arrays)

    assert chunks.arrays == 4
    assert chunks.rows.tolist() == [3, 0, 0, 3] + [0] * (CHUNKS - 4)
    assert chunks.moments.tolist() == [[[1, 1]], [[4, 4]]]


def test_rows_come_after_arrays_without_any() -> None:
    chunks = chunks_of([np.zeros((0, 2), np.float32), np.ones((1, 2), np.float32)])

    assert chunks.moments.tolist() == [[[1, 1]]]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1)])
def test_empty_arrays_and_scalars(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 2.5, np.float16)

    chunks = chunks_of([array, array])

    assert chunks.arrays == 2
    assert chunks.moments.tolist() == ([[[6.25]]] * 2 if array.size else [])


def test_nothing_seen_is_no_moments() -> None:
    assert Chunks().moments.shape == (0, 0, 0)


@pytest.mark.parametrize("patches", [None, GROUPED])
def test_chunks_of_equal_arrays_are_equal_to_the_last_bit(patches: Patches | None) -> None:
    few = images(3)
    arrays = [array for array in few for _ in range(CHUNKS)]

    moments = chunks_of(arrays, patches).moments

    assert len(moments) == CHUNKS
    assert (moments[1:] == moments[0]).all()


def test_chunks_of_more_and_of_fewer_arrays_that_are_all_the_same_are_equal() -> None:
    array = images(1)[0][:, :, :2, :2]

    moments = chunks_of([array] * (3 * CHUNKS + 5)).moments

    assert (moments[1:] == moments[0]).all()


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = chunks_of(images(1), GROUPED), chunks_of(images(40), GROUPED)

    assert few.means.nbytes == many.means.nbytes == CHUNKS * 2 * 18 * 8


def test_chunks_are_asked_for_like_other_statistics() -> None:
    model = parse("agraph (float[N, 2] x) => (float[N, 2] y) { a = Neg(x)  y = Exp(a) }")
    samples: list[Sample] = [
        {"x": np.full((n + 1, 2), [n, 1], np.float32)} for n in range(CHUNKS + 1)
    ]
    question = Question("a", about="chunks")

    found = observer(model, samples)(model, [question])[question]

    assert isinstance(found, Chunks)
    assert found.rows.sum() == sum(range(1, CHUNKS + 2))
    assert found.moments[:, 0, 1].tolist() == [1.0] * CHUNKS
