from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.fuse.fuse_transpose import FuseTranspose


def model(
    image: str = "2,7,9,3",
    perm: str = "0, 3, 1, 2",
    conv: str = "<strides = [2, 3], pads = [1, 0, 2, 1]>",
    weight: tuple[int, ...] = (4, 3, 3, 2),
) -> ir.Model:
    sizes, outputs = ",".join(map(str, weight)), ",".join("NOABC"[: len(weight)])
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[{image}] x, float[{sizes}] w) => (float[{outputs}] y)
    {{
        t = Transpose <perm = [{perm}]> (x)
        y = Conv {conv} (t, w)
    }}
    """
    return parse(text, w=np.random.default_rng(3).standard_normal(weight).astype(np.float32))


def assert_fuses(changed: ir.Model) -> list[ir.Node]:
    before = changed.clone()
    change = apply_pass(FuseTranspose(), changed)
    assert change.counts == {"Transpose fused into Conv": 1}, change.skips
    assert_equivalent(before, changed)
    return list(changed.graph)


def reasons(unchanged: ir.Model) -> list[str]:
    return [skip.reason for skip in assert_unchanged(FuseTranspose(), unchanged).skips]


def test_reads_the_channels_as_columns() -> None:
    assert_rewrites(
        FuseTranspose(),
        """
        agraph (float[1,4,4,2] x) => (float[1,1,3,3] y)
        <float[1,2,2,2] w = {1., 2., 3., 4., 5., 6., 7., 8.}>
        {
            t = Transpose <perm = [0, 3, 1, 2]> (x)
            y = Conv (t, w)
        }
        """,
        """
        agraph (float[1,4,4,2] x) => (float[1,1,3,3] y)
        <
            int64[4] s = {0, 1, 4, 8},
            float[1,1,2,4] w = {1., 5., 2., 6., 3., 7., 4., 8.},
            float[1,2,2,2] unread = {1., 2., 3., 4., 5., 6., 7., 8.}
        >
        {
            t = Reshape (x, s)
            y = Conv <kernel_shape = [2, 4], pads = [0, 0, 0, 0], strides = [1, 2]> (t, w)
        }
        """,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv": ""},
        {"conv": "<kernel_shape = [3, 2], pads = [0, 1, 0, 2]>"},
        {"conv": '<auto_pad = "VALID", strides = [1, 2]>'},
        {"conv": "<dilations = [2, 1]>"},
        {"image": "N,7,9,3"},
        {"image": "N,H,9,3"},
        {"image": "2,9,3", "perm": "0, 2, 1", "conv": "<strides = [2]>", "weight": (4, 3, 3)},
        {
            "image": "2,3,4,5,2",
            "perm": "0, 4, 1, 2, 3",
            "conv": "<pads = [0, 0, 1, 1, 0, 2]>",
            "weight": (3, 2, 2, 2, 3),
        },
    ],
    ids=str,
)
def test_keeps_the_outputs(options: dict[str, object]) -> None:
    nodes = assert_fuses(model(**options))  # type: ignore[arg-type]
    assert [node.op_type for node in nodes] == ["Reshape", "Conv"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"perm": "0, 3, 2, 1"}, "it does not move the channels from the last place to the second"),
        ({"image": "2,7,W,3"}, "the size of the image is not known"),
        ({"conv": "<dilations = [1, 2]>"}, "the Conv is dilated"),
        (
            {"conv": '<auto_pad = "SAME_UPPER">'},
            "the Conv chooses its pads by the size of its input (SAME_UPPER)",
        ),
        (
            {"image": "2,7,9,6", "conv": "<group = 2>", "weight": (4, 3, 3, 2)},
            "the Conv has groups",
        ),
        ({"image": "2,7,9,16", "weight": (4, 16, 3, 2)}, "it has over 15 channels"),
    ],
    ids=str,
)
def test_says_why_it_leaves_a_transpose(options: dict[str, object], reason: str) -> None:
    assert reasons(model(**options)) == [reason]  # type: ignore[arg-type]


def test_leaves_a_transpose_that_others_read() -> None:
    shared = model()
    transposed = shared.graph[0].outputs[0]
    transposed.type = ir.TensorType(ir.DataType.FLOAT)
    shared.graph.outputs.append(transposed)
    assert reasons(shared) == []


def test_leaves_a_weight_that_is_computed() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[1,4,4,2] x, float[1,2,2,2] w) => (float[1,1,3,3] y)
    {
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        y = Conv (t, w)
    }
    """
    assert reasons(parse(text)) == ["the weight of the Conv is not constant"]


def test_serves_the_cpu_only() -> None:
    context = Context(read_original=model, provider="cuda")
    assert FuseTranspose().refuse(model(), context) is not None
