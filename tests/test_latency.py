"""The model of kernels' time against times that were measured."""

from __future__ import annotations

import pytest

from graphopt_passes.quantize.latency import conv_cost, depthwise_cost, filled

MEASURED = [
    # Channels in and out, kernel, stride, height and width; microseconds in float32 and on codes.
    (3, 32, 3, 2, 192, 141, 342),
    (3, 16, 3, 1, 32, 14, 33),
    (1, 64, 3, 1, 64, 67, 211),
    (8, 8, 3, 1, 120, 297, 462),
    (16, 16, 3, 1, 48, 105, 50),
    (24, 144, 1, 1, 56, 194, 93),
    (32, 32, 3, 1, 28, 97, 36),
    (58, 16, 3, 1, 48, 720, 170),
    (64, 64, 3, 1, 28, 342, 92),
    (96, 576, 1, 1, 14, 134, 47),
    (256, 256, 3, 1, 14, 1402, 324),
    (960, 160, 1, 1, 7, 90, 28),
]
DEPTHWISE = [
    # Channels, kernel, height and width; microseconds in float32 and on codes.
    (24, 3, 32, 12, 41),
    (32, 3, 96, 101, 194),
    (58, 3, 40, 242, 137),
    (64, 5, 32, 36, 80),
    (64, 7, 32, 56, 132),
    (116, 3, 32, 38, 148),
    (128, 3, 32, 38, 58),
    (192, 3, 24, 43, 48),
    (232, 3, 32, 76, 250),
]
"""On a Xeon with AVX512-VNNI, onnxruntime 1.32, one thread, median of 40 runs."""


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_conv(shape: tuple[int, ...]) -> None:
    inputs, outputs, kernel, stride, size, floats_us, codes_us = shape
    places = (size // stride) ** 2

    cost = conv_cost(places, 1, inputs, outputs, kernel * kernel)

    assert cost.floats_ns == pytest.approx(1e3 * floats_us, rel=0.35)
    assert cost.codes_ns == pytest.approx(1e3 * codes_us, rel=0.35)


@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise(shape: tuple[int, ...]) -> None:
    channels, kernel, size, floats_us, codes_us = shape

    cost = depthwise_cost(size * size, channels, kernel * kernel)

    assert cost.floats_ns == pytest.approx(1e3 * floats_us, rel=0.35)
    assert cost.codes_ns == pytest.approx(1e3 * codes_us, rel=0.35)


@pytest.mark.parametrize("channels", [24, 58, 116])
def test_whole_lanes_are_faster_on_codes(channels: int) -> None:
    narrow = depthwise_cost(1600, channels, 9)
    whole = depthwise_cost(1600, filled(channels), 9)

    assert whole.codes_ns < narrow.codes_ns
    assert whole.floats_ns <= narrow.floats_ns
