"""Images that are mirrored and magnified."""

from __future__ import annotations

import numpy as np
import pytest
from test_observe import feed

from graphopt.observe import Observer
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse
from graphopt.variations import VARIED_MAXIMUM, varied

IMAGE = "agraph (float[1, 3, 32, 24] x, int64[2] n) => (float[1, 3, 32, 24] y) { y = Neg(x) }"


def images(count: int, *shape: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [
        {"x": generator.standard_normal(shape).astype(np.float32), "n": np.array([number, 2])}
        for number in range(count)
    ]


def test_an_image_counts_for_four() -> None:
    samples = read_samples(images(2, 1, 3, 32, 24), signature(parse(IMAGE)))
    found = varied(samples)
    assert found is not None and len(found) == 8
    first, mirrored, nearer, other = list(found)[::2]
    np.testing.assert_array_equal(mirrored["x"], first["x"][..., ::-1])
    for one in (nearer, other):
        assert one["x"].shape == first["x"].shape and np.isin(one["x"], first["x"]).all()
        assert not np.array_equal(one["x"], first["x"])
    np.testing.assert_array_equal(nearer["n"], first["n"])
    again = varied(samples)
    assert again is not None
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one["x"], two["x"])


@pytest.mark.parametrize("shape", [(1, 8, 32, 24), (1, 1, 32, 24), (1, 3, 32, 10)])
def test_what_is_no_image_is_left_alone(shape: tuple[int, ...]) -> None:
    text = IMAGE.replace("[1, 3, 32, 24]", str(list(shape)))
    assert varied(read_samples(images(2, *shape), signature(parse(text)))) is None


def test_many_images_are_enough() -> None:
    samples = read_samples(images(VARIED_MAXIMUM // 2 + 1, 1, 3, 32, 24), signature(parse(IMAGE)))
    assert varied(samples) is None


def test_samples_that_carry_state_are_not_varied() -> None:
    model = parse(
        """agraph (float[1, 3, 32, 24] x, float[1] h) => (float[1, 3, 32, 24] y, float[1] g)
        { y = Add(x, h)  g = Neg(h) }"""
    )
    samples = [{"x": image["x"]} for image in images(3, 1, 3, 32, 24)]
    assert Observer(feed(model, samples, [("g", "h")])).varied() is None
    seen = Observer(
        feed(model, [{**one, "h": np.zeros(1, np.float32)} for one in samples])
    ).varied()
    assert seen is not None and len(seen.feed.samples) == 12
