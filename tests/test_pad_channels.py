from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, canonical, parse
from graphopt_passes.quantize.pad_channels import PadChannels


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def block(
    between: str = "h = Relu(a)",
    after: str = "r = Relu(d)",
    channels: int = 58,
    size: str = "1, 16, 20, 20",
    outputs: str = "",
    y: str = "1, 16, 20, 20",
    more: str = "",
) -> ir.Model:
    """Conv to `channels`, something, a depthwise Conv, something, and Conv back."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    agraph (
        float[{size}] x, float[{channels}, 16, 1, 1] v, float[{channels}] b,
        float[{channels}, 1, 3, 3] w, float[16, {channels}, 1, 1] u
    ) => (float[{y}] y{outputs})
    <float half = {{0.5}}{more}>
    {{
        a = Conv (x, v, b)
        {between}
        d = Conv <group = {channels}, pads = [1, 1, 1, 1]> (h, w)
        {after}
        y = Conv (r, u)
    }}
    """
    return parse(
        text,
        v=normal(1, channels, 16, 1, 1),
        b=normal(2, channels),
        w=normal(3, channels, 1, 3, 3),
        u=normal(4, 16, channels, 1, 1),
    )


def shapes_of_weights(model: ir.Model) -> list[tuple[int, ...]]:
    return [
        tuple(value.shape.numpy())
        for node in model.graph
        if node.op_type == "Conv"
        for value in node.inputs[1:]
        if value is not None and value.shape is not None
    ]


def assert_pads(model: ir.Model) -> None:
    before = model.clone()
    change = apply_pass(PadChannels(), model)
    assert change, change.skips
    assert shapes_of_weights(model) == [(64, 16, 1, 1), (64,), (64, 1, 3, 3), (16, 64, 1, 1)]
    assert_equivalent(before, model)
    assert not apply_pass(PadChannels(), model)


def test_a_block_of_58_channels_gets_64() -> None:
    model = block()
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]

    assert_pads(model)

    first, depthwise, last = (node for node in model.graph if node.op_type == "Conv")
    assert depthwise.attributes["group"].as_int() == 64
    for node, place, name in (
        (first, 1, "v"),
        (first, 2, "b"),
        (depthwise, 1, "w"),
        (last, 1, "u"),
    ):
        padded = node.inputs[place].const_value.numpy()  # type: ignore[union-attr]
        kept = tuple(slice(size) for size in before[name].shape)
        np.testing.assert_array_equal(padded[kept], before[name])
        assert np.count_nonzero(padded) == np.count_nonzero(before[name])


@pytest.mark.parametrize(
    "options",
    [
        {
            "between": "h = LeakyRelu(a)",
            "after": "r = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)",
        },
        {"between": "g = HardSwish(a) h = Mul(g, a)"},
        {"between": "g = Add(a, half) h = Sigmoid(g)"},
        {"between": "g = GlobalAveragePool(a) s = Sigmoid(g) h = Mul(a, s)"},
        {
            "after": "r = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (d)",
            "y": "1, 16, 10, 10",
        },
        {"after": "r = Add(d, h)"},
        {"size": "N, 16, 20, 20", "y": "N, 16, 20, 20"},
    ],
    ids=str,
)
def test_what_lies_between_may_be_all_that_keeps_channels_apart(options: dict[str, str]) -> None:
    assert_pads(block(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        # Other nodes read all channels, or the graph gives them out.
        {"between": "h = Softmax <axis = 1> (a)", "after": "r = Softmax <axis = 1> (d)"},
        {"between": "h = Relu(a)", "outputs": ", float[1, 58, 20, 20] h"},
        {"between": "h = Reciprocal(a)", "after": "r = Reciprocal(d)"},
        # One number for each channel, or for each place, in the place of one for all.
        {
            "between": "h = Add(a, by_channel)",
            "more": f", float[58, 1, 1] by_channel = {{{', '.join(['0.5'] * 58)}}}",
        },
        {
            "between": "m = ReduceMean <keepdims = 1> (a, one) h = Mul(a, m)",
            "more": ", int64[1] one = {1}",
        },
        # Nothing to gain.
        {"channels": 64},
        {"size": "1, 16, H, W", "y": "1, 16, H, W"},
        {"size": "1, 16, 2, 2", "y": "1, 16, 2, 2", "channels": 52},
    ],
    ids=str,
)  # fmt: skip
def test_leaves_channels_that_others_see_and_where_it_gains_nothing(
    options: dict[str, object],
) -> None:
    assert_unchanged(PadChannels(), block(**options))  # type: ignore[arg-type]


def test_a_body_that_reads_a_value_keeps_its_channels() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    agraph (float[1, 16, 20, 20] x, float[58, 16, 1, 1] v, float[58, 1, 3, 3] w,
            float[16, 58, 1, 1] u, bool k) => (float[1, 16, 20, 20] y)
    {
        a = Conv (x, v)
        h = If (k) <
            then_branch = then () => (float[1, 58, 20, 20] t) { t = Relu(a) },
            else_branch = else () => (float[1, 58, 20, 20] e) { e = Neg(a) }
        >
        d = Conv <group = 58, pads = [1, 1, 1, 1]> (h, w)
        s = Softmax (d)
        y = Conv (s, u)
    }
    """
    weights = {"v": normal(1, 58, 16, 1, 1), "w": normal(2, 58, 1, 3, 3)}
    assert_unchanged(PadChannels(), parse(text, **weights, u=normal(3, 16, 58, 1, 1)))


def test_a_weight_that_two_layers_share_is_padded_for_one() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    agraph (float[1, 16, 20, 20] x, float[58, 16, 1, 1] v, float[58, 1, 3, 3] w,
            float[16, 58, 1, 1] u) => (float[1, 16, 20, 20] y, float[1, 58, 20, 20] z)
    {
        a = Conv (x, v)
        d = Conv <group = 58, pads = [1, 1, 1, 1]> (a, w)
        y = Conv (d, u)
        z = Conv (x, v)
    }
    """
    model = parse(
        text, v=normal(1, 58, 16, 1, 1), w=normal(2, 58, 1, 3, 3), u=normal(3, 16, 58, 1, 1)
    )
    before = model.clone()
    assert apply_pass(PadChannels(), model), canonical(model)
    assert_equivalent(before, model)


def test_serves_the_cpu_only() -> None:
    context = Context(read_original=block, provider="cuda")
    assert PadChannels().refuse(block(), context) is not None
