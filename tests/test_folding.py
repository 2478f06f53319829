"""Conv nodes whose columns are folded into channels: the sums are those of before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from on_codes import FINE, code_all, difference, normal, samples_of, steps_from_written, work

from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_passes.quantize.folding import Fold, folds_of
from graphopt_passes.quantize.latency import best_fold
from graphopt_passes.quantize.layers import Layer, layer_of

WINDOWS = [
    # Kernel, attributes of the Conv, rows and columns of the input.
    ("3, 3", "pads = [1, 1, 1, 1]", "6, 16"),
    ("3, 3", "pads = [0, 0, 1, 1], strides = [2, 2]", "8, 32"),
    ("3, 3", "pads = [1, 1, 1, 1], strides = [2, 2]", "8, 32"),
    ("7, 7", "pads = [3, 3, 3, 3], strides = [2, 2]", "8, 32"),
    ("3, 9", "pads = [0, 0, 1, 3], strides = [2, 6]", "8, 96"),
    ("1, 1", "strides = [1, 1]", "4, 16"),
    ("1, 1", "strides = [2, 2]", "4, 16"),
    ("5, 2", "dilations = [2, 1], pads = [4, 0, 4, 1]", "6, 8"),
    ("2, 12", "pads = [0, 9, 0, 2]", "4, 8"),
    ("3, 3", 'auto_pad = "SAME_UPPER", strides = [2, 2]', "8, 16"),
    ("3, 3", 'auto_pad = "SAME_LOWER", strides = [2, 2]', "8, 16"),
]


def conv(kernel: str, attributes: str, places: str) -> tuple[Layer, np.ndarray]:
    """A Conv of 3 channels to 4 with whole numbers for weights, and an image of whole numbers."""
    random = np.random.default_rng(0)
    shape = tuple(map(int, kernel.split(",")))
    weight = np.float32(random.integers(-9, 10, (4, 3, *shape)))
    model = parse(
        f"agraph (float[2, 3, {places}] x, float[4, 3, {kernel}] w) => (float[N, C, H, W] y)"
        f"{{ c = Conv <{attributes}> (x, w) y = Identity(c) }}",
        w=weight,
    )
    infer_shapes(model)
    image = random.integers(-9, 10, (2, 3, *map(int, places.split(","))))
    return layer_of(model.graph[0]), np.float32(image)


def run(text: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    dims = [", ".join(map(str, array.shape)) for array in (x, w)]
    header = f"agraph (float[{dims[0]}] x, float[{dims[1]}] w) => (float[N, C, H, W] y)"
    return Session(parse(header + text, w=w), Reference.AS_WRITTEN).run({"x": x})["y"]


def folded_run(fold: Fold, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    attributes = ", ".join(f"{a.name} = {list(a.as_ints())}" for a in fold.attributes())
    read = x.transpose(0, 2, 3, 1).reshape(fold.shape_read).transpose(0, 3, 1, 2)
    made = run(f"{{ y = Conv <{attributes}> (x, w) }}", np.ascontiguousarray(read), fold.weight(w))
    return made.transpose(0, 2, 3, 1).reshape(fold.shape_made).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("window", WINDOWS, ids=" | ".join)
def test_the_sums_are_those_of_before(window: tuple[str, str, str]) -> None:
    layer, image = conv(*window)
    weight = layer.matrix().reshape(4, 3, *map(int, window[0].split(","))).astype(np.float32)
    expected = run(f"{{ y = Conv <{window[1]}> (x, w) }}", image, weight)

    folds = folds_of(layer)

    assert folds
    for fold in folds:
        np.testing.assert_array_equal(folded_run(fold, image, weight), expected)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ("2, 3, 6, 15", "4, 3, 3, 3", "pads = [1, 1, 1, 1]"),  # no even number of columns
        ("2, 3, 6, 16", "4, 3, 3, 4", "strides = [1, 1]"),  # 13 columns are made of 16
        ("2, 3, 6, 16", "4, 3, 3, 3", "pads = [1, 2, 1, 2], dilations = [1, 2]"),
        ("2, 4, 6, 16", "4, 1, 3, 3", "pads = [1, 1, 1, 1], group = 4"),
        ("2, 3, 16", "4, 3, 3", "pads = [1, 1]"),
        ("2, 3, 6, W", "4, 3, 3, 3", "pads = [1, 1, 1, 1]"),
    ],
)
def test_others_stay_as_they_are(x: str, w: str, attributes: str) -> None:
    model = parse(
        f"agraph (float[{x}] x, float[{w}] w) => (float y) "
        f"{{ c = Conv <{attributes}> (x, w) y = Relu(c) }}",
        w=normal(1, *map(int, w.split(","))),
    )
    infer_shapes(model)

    assert not folds_of(layer_of(model.graph[0]))
    assert best_fold(layer_of(model.graph[0])) is None


@pytest.mark.parametrize("batch", ["2", "N"])
@pytest.mark.parametrize("then", ["", "Relu", "Clip"])
def test_a_conv_of_few_channels_runs_folded(batch: str, then: str, tmp_path: Path) -> None:
    last = {"": "y = Identity(c)", "Relu": "y = Relu(c)", "Clip": "y = Clip(c, zero, six)"}[then]
    text = f"""
    agraph (float[{batch}, 3, 96, 96] x, float[16, 3, 3, 3] w, float[16] b)
        => (float[{batch}, 16, 48, 48] y)
    <float zero = {{0.0}}, float six = {{6.0}}> {{
        c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
        {last}
    }}
    """
    model = parse(text, w=normal(1, 16, 3, 3, 3), b=normal(2, 16))
    before, samples = model.clone(), samples_of(2, 3, 96, 96)

    code_all(model, samples)

    (folded,) = [node for node in model.graph if node.op_type == "Conv"]
    assert folded.attributes.get_ints("strides") == (2, 1)
    kinds = work(model, tmp_path)
    assert Counter(kinds)["QLinearConv"] == 1
    assert "Conv" not in kinds
    assert difference(before, model, samples[0]) < FINE
    assert steps_from_written(model, samples[0]) < 1.5


def test_two_folded_layers_and_one_that_is_not(tmp_path: Path) -> None:
    text = """
    agraph (float[1, 3, 96, 96] x, float[8, 3, 3, 3] u, float[8, 8, 3, 3] v, float[64, 8, 1, 1] w)
        => (float[1, 64, 48, 48] y) {
        a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, u) b = Relu(a)
        c = Conv <pads = [1, 1, 1, 1]> (b, v) d = Relu(c)
        y = Conv (d, w)
    }
    """
    weights = {"u": normal(1, 8, 3, 3, 3), "v": normal(2, 8, 8, 3, 3), "w": normal(3, 64, 8, 1, 1)}
    model = parse(text, **weights)
    before, samples = model.clone(), samples_of(1, 3, 96, 96)

    code_all(model, samples)

    kinds = work(model, tmp_path)
    assert kinds["QLinearConv"] == 3
    # What unfolds the first and folds for the second cancels out.
    assert kinds["Reshape"] == 2
    assert difference(before, model, samples[0]) < FINE
