from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.contract import Context
from graphopt.errors import SpecError
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.raise_opset import RaiseOpset

OLD = """
<ir_version: 4, opset_import: ["" : 9]>
agraph (float[1, 2, 4, 4] x, float[30, 2, 3, 3] w) => (float[1, 30, 1, 1] y)
{
    c = Conv <kernel_shape = [3, 3]> (x, w)
    d = Dropout (c)
    p = AveragePool <kernel_shape = [2, 2]> (d)
    y = Clip <min: float = 0.0, max: float = 6.0> (p)
}
"""


def old_model() -> ir.Model:
    return parse(OLD, w=np.random.default_rng(0).standard_normal((30, 2, 3, 3), np.float32))


def test_raises_to_17_by_default_and_keeps_the_weights() -> None:
    model = old_model()
    before = model.clone()
    weight = model.graph.initializers["w"].const_value

    change = apply_pass(RaiseOpset(), model)

    assert change.counts == {"opset raised from 9 to 17": 1}
    assert model.opset_imports[""] == 17
    assert model.ir_version >= onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid("", 17)]
    )
    assert model.graph.initializers["w"].const_value is weight
    assert_equivalent(before, model)


def test_metadata_doc_strings_and_annotations_stay() -> None:
    model = old_model()
    conv = model.graph[0]
    conv.metadata_props["layer"] = "first"
    conv.doc_string = "the first layer"
    model.graph.doc_string = "a graph"
    model.metadata_props["author"] = "somebody"

    apply_pass(RaiseOpset(opset=18), model)

    assert model.opset_imports[""] == 18
    assert model.graph[0].metadata_props == {"layer": "first"}
    assert model.graph[0].doc_string == "the first layer"
    assert model.graph.doc_string == "a graph"
    assert model.metadata_props == {"author": "somebody"}


def test_old_softmax_keeps_its_meaning() -> None:
    """Before opset 13 Softmax flattened what follows its axis."""
    model = parse(
        """
        <ir_version: 4, opset_import: ["" : 11]>
        agraph (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax <axis: int = 1> (x) }
        """
    )
    before = model.clone()

    change = apply_pass(RaiseOpset(), model)
    assert not change
    assert change.skips[0].reason == "opset 17 takes 3 nodes more (grow allows it)"

    assert apply_pass(RaiseOpset(grow=True), model)
    assert_equivalent(before, model)


@pytest.mark.parametrize(
    ("shape", "axis", "nodes"),
    [("2, 5, 1, 1", 1, 1), ("N, 5", 1, 1), ("2, 5", -1, 1), ("2, 5, 1", -2, 1), ("2, 5, 3", 1, 4)],
)
def test_a_softmax_over_one_axis_stays_one_node(shape: str, axis: int, nodes: int) -> None:
    model = parse(
        f"""
        <ir_version: 4, opset_import: ["" : 9]>
        agraph (float[{shape}] x) => (float[{shape}] y) {{ y = Softmax <axis: int = {axis}> (x) }}
        """
    )
    before = model.clone()

    apply_pass(RaiseOpset(grow=True), model)

    assert sum(n.op_type != "Constant" for n in model.graph) == nodes
    assert_equivalent(before, model)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("operator", "opset", "scale"),
    [(*old, scale) for old in (("Upsample", 9), ("Resize", 10)) for scale in (2.0, 2.5, 1.5)]
    + [("Resize", 10, 0.6), ("Resize", 10, 0.25)],
)
def test_an_old_resize_keeps_its_coordinates(
    operator: str, opset: int, scale: float, mode: str
) -> None:
    model = parse(
        f"""
        <ir_version: 5, opset_import: ["" : {opset}]>
        agraph (float[1, 1, 5, 5] x, float[4] s) => (float[1, 1, H, W] y)
        {{ y = {operator} <mode: string = "{mode}"> (x, s) }}
        """,
        s=np.float32([1, 1, scale, scale]),
    )
    before = model.clone()

    assert apply_pass(RaiseOpset(), model)
    assert_equivalent(before, model)


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ((2, 0.5), "nearest Resizes go up and down, which takes two roundings"),
        (None, "the scales of a nearest Resize are not constant: its rounding depends on them"),
    ],
)
def test_a_resize_that_newer_opsets_do_not_have_stays(
    scales: tuple[float, float] | None, reason: str
) -> None:
    model = parse(
        """
        <ir_version: 5, opset_import: ["" : 10]>
        agraph (float[1, 1, 5, 5] x, float[4] s) => (float[1, 1, H, W] y)
        { y = Resize <mode: string = "nearest"> (x, s) }
        """,
        **({} if scales is None else {"s": np.float32([1, 1, *scales])}),
    )

    change = apply_pass(RaiseOpset(), model)

    assert not change
    assert [s.reason for s in change.skips] == [reason]


@pytest.mark.parametrize(
    ("opset", "outputs", "stays"),
    [
        (7, "y, float[2, 3] m", True),
        (10, "y, bool[2, 3] m", True),
        (12, "y, bool[2, 3] m", False),
        (7, "y", False),
    ],
)
def test_a_mask_that_is_read_stays_as_it_was(opset: int, outputs: str, stays: bool) -> None:
    model = parse(
        f"""
        <ir_version: 3, opset_import: ["" : {opset}]>
        agraph (float[2, 3] x) => (float[2, 3] {outputs}) {{ y, m = Dropout(x) }}
        """
    )

    before = model.clone()

    change = RaiseOpset().apply(model, Context(lambda: model))

    assert_equivalent(before, model)
    reason = "the mask of a Dropout, which is read, is another one before opset 12"
    assert [s.reason for s in change.skips] == ([reason] if stays else [])


def test_a_scan_of_opset_8_stays() -> None:
    """onnx's converter leaves it its batch axis, which later ones do not have."""
    model = parse(
        """
        <ir_version: 3, opset_import: ["" : 8]>
        agraph (float[1, 2] start, float[1, 3, 2] x) => (float[1, 2] end, float[1, 3, 2] y)
        {
            end, y = Scan <num_scan_inputs = 1, body = b
                (float[2] s, float[2] v) => (float[2] t, float[2] o)
                { t = Add(s, v)  o = Identity(t) }
            > (, start, x)
        }
        """
    )

    change = RaiseOpset(grow=True).apply(model, Context(lambda: model))

    assert not change
    assert change.skips[0].reason == "onnx cannot convert Scan, which lost its batch axis"


IN_A_BODY = """
<ir_version: 4, opset_import: ["" : 11]>
agraph (bool c, float[{shape}] x) => (float[{shape}] y)
{{
    y = If (c) <
        then_branch = t () => (float[{shape}] a) {{ a = Neg (x) }},
        else_branch = e () => (float[{shape}] b) {{ {inner} }}
    >
}}
"""


@pytest.mark.parametrize("place", ["main", "body"])
def test_a_hardmax_over_several_axes_stays(place: str) -> None:
    """onnx's converter leaves it as it is, with another meaning."""
    text = (
        '<ir_version: 4, opset_import: ["" : 11]>'
        "agraph (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Hardmax (x) }"
    )
    if place == "body":
        text = IN_A_BODY.format(shape="2, 3, 4", inner="b = Hardmax (x)")

    change = apply_pass(RaiseOpset(grow=True), parse(text))

    assert not change
    assert change.skips[0].reason == "onnx cannot convert a Hardmax over several axes"


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
def test_an_old_softmax_in_a_body_keeps_its_meaning(operator: str) -> None:
    model = parse(IN_A_BODY.format(shape="2, 3, 4", inner=f"b = {operator} (x)"))
    before = model.clone()

    assert apply_pass(RaiseOpset(grow=True), model)
    assert_equivalent(before, model)


def test_a_hardmax_over_one_axis_is_raised() -> None:
    model = parse(
        '<ir_version: 4, opset_import: ["" : 11]>'
        "agraph (float[2, 3] x) => (float[2, 3] y) { y = Hardmax (x) }"
    )
    before = model.clone()

    assert apply_pass(RaiseOpset(), model)
    assert_equivalent(before, model)


def test_leaves_a_newer_model_and_never_lowers() -> None:
    assert_unchanged(RaiseOpset(), "agraph (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert_rewrites(
        RaiseOpset(opset=22),
        "agraph (float[2] x) => (float[2] y) { y = Neg(x) }",
        parse(
            '<ir_version: 10, opset_import: ["" : 22]>'
            "agraph (float[2] x) => (float[2] y) { y = Neg(x) }"
        ),
    )


def test_refuses_a_model_with_functions() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["" : 14, "local" : 1]>
        agraph (float[2] x) => (float[2] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 14]>
        f (a) => (c) { c = Neg(a) }
        """
    )

    reason = RaiseOpset().refuse(model, Context(lambda: model))

    assert reason == "the model has functions; run inline-functions before"


def test_what_onnx_cannot_convert_stays_with_a_reason() -> None:
    """onnx's converter fails on a softmax that a body reads."""
    model = parse(
        """
        <ir_version: 4, opset_import: ["" : 11]>
        agraph (bool c, float[2, 3] x) => (float[2, 3] y)
        {
            s = Softmax <axis: int = 0> (x)
            y = If (c) <
                then_branch = t () => (float[2, 3] a) { a = Neg (s) },
                else_branch = e () => (float[2, 3] b) { b = Abs (s) }
            >
        }
        """
    )
    before = ir.to_proto(model).SerializeToString()

    change = RaiseOpset().apply(model, Context(lambda: model))

    assert not change
    assert ir.to_proto(model).SerializeToString() == before
    assert change.skips[0].reason.startswith("onnx cannot convert it: ")


def test_option_is_bounded() -> None:
    with pytest.raises(SpecError, match="option 'opset' of 'raise-opset' is 99"):
        RaiseOpset(opset=99)
