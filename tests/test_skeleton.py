from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.serializing import STUB, stubbed
from graphopt.skeleton import (
    INFERRED,
    LONG_VECTOR,
    has_long_vectors,
    infer_shapes,
    known_shape,
    skeleton,
    why_invalid,
)
from graphopt.testing import parse


def _named(model: ir.Model, name: str) -> ir.Value:
    return next(o for node in model.graph for o in node.outputs if o.name == name)


def _dims(value: ir.Value) -> list[int | str | None] | None:
    return (
        None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    )


LARGE = """
agraph (float[N, 512] x, float[512, 512] w, int64[3] s) => (float[A, B, C] z)
{
    y = MatMul(x, w)
    z = Reshape(y, s)
}
"""


def _large() -> ir.Model:
    return parse(LARGE, w=np.ones((512, 512), np.float32), s=np.array([-1, 2, 256]))


def test_large_weights_are_left_out_and_small_ones_are_kept() -> None:
    proto = skeleton(_large())

    assert proto.ByteSize() < 1000
    assert [i.name for i in proto.graph.initializer] == ["s"]
    assert [i.name for i in proto.graph.input] == ["x", "w"]
    onnx.checker.check_model(proto, full_check=True)


def test_making_a_skeleton_leaves_the_model_as_it_was() -> None:
    model = _large()
    tensors = {name: v.const_value for name, v in model.graph.initializers.items()}

    skeleton(model)

    assert {name: v.const_value for name, v in model.graph.initializers.items()} == tensors


def test_stubs_tell_type_and_shape_and_the_tensors_come_beside() -> None:
    proto, tensors = stubbed(_large())

    (stub,) = [i for i in proto.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    assert (stub.name, list(stub.dims), stub.data_type) == ("w", [512, 512], onnx.TensorProto.FLOAT)
    assert {e.key: e.value for e in stub.external_data}["location"] == STUB
    assert tensors["w"].numpy().sum() == 512 * 512


def test_small_external_tensors_are_in_the_proto_so_that_shapes_can_be_inferred(
    tmp_path: Path,
) -> None:
    model = _large()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    tensor = loaded.graph.initializers["s"].const_value
    assert isinstance(tensor, ir.ExternalTensor)

    infer_shapes(loaded)
    proto = skeleton(loaded)

    assert onnx.numpy_helper.to_array(proto.graph.initializer[0]).tolist() == [-1, 2, 256]
    assert loaded.graph.initializers["s"].const_value is tensor


def test_a_large_weight_that_is_an_input_is_an_input_once() -> None:
    model = parse("agraph (float[5000] w) => (float[5000] y) { y = Neg(w) }")
    (value,) = model.graph.inputs
    value.const_value = ir.tensor(np.ones(5000, np.float32), name="w")
    model.graph.register_initializer(value)

    assert [i.name for i in skeleton(model).graph.input] == ["w"]
    assert why_invalid(model) is None


# ------------------------------------------------------------------ inference


def test_fills_in_types_and_shapes_and_marks_them() -> None:
    model = _large()
    infer_shapes(model)

    hidden = _named(model, "y")
    assert (hidden.dtype, _dims(hidden)) == (ir.DataType.FLOAT, ["N", 512])
    assert hidden.meta[INFERRED]


def test_outputs_of_the_model_stay_as_they_are_declared() -> None:
    model = _large()
    infer_shapes(model)

    assert _dims(_named(model, "z")) == ["A", "B", "C"]
    assert INFERRED not in _named(model, "z").meta


def test_shape_arithmetic_is_followed() -> None:
    model = parse(
        """
        agraph (float[2, 3, 4] x) => (float[A, B] z)
        {
            s = Shape(x)
            i = Constant<value_ints=[0]>()
            b = Gather(s, i)
            m = Constant<value_ints=[-1]>()
            t = Concat<axis=0>(b, m)
            y = Reshape(x, t)
            z = Relu(y)
        }
        """
    )
    infer_shapes(model)

    assert _dims(_named(model, "y")) == [2, 12]


def test_values_of_subgraphs_are_inferred() -> None:
    model = parse(
        """
        agraph (bool c, float[2, 3] x) => (float[3, 2] y)
        {
            y = If(c) <
                then_branch = then () => (float[3, 2] t) { a = Transpose(x) t = Neg(a) },
                else_branch = other () => (float[3, 2] e) { b = Exp(x) e = Transpose(b) }
            >
        }
        """
    )
    infer_shapes(model)

    (choice,) = model.graph
    shapes = {
        o.name: _dims(o)
        for branch in ("then_branch", "else_branch")
        for node in choice.attributes[branch].as_graph()
        for o in node.outputs
    }
    assert shapes == {"a": [3, 2], "t": [3, 2], "b": [2, 3], "e": [3, 2]}


def test_what_the_file_says_of_a_foreign_operator_is_kept() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "my.domain" : 1]>
        agraph (float[2, 3] x) => (float[P, Q] z)
        <float[4, 5] y>
        { y = my.domain.Odd(x) w = Relu(y) v = my.domain.Odd(w) z = Neg(v) }
        """
    )
    infer_shapes(model)

    assert _dims(_named(model, "y")) == _dims(_named(model, "w")) == [4, 5]
    assert _dims(_named(model, "v")) is None


def test_a_second_inference_changes_nothing() -> None:
    model = _large()
    infer_shapes(model)
    first = [(o.name, o.type, _dims(o)) for n in model.graph for o in n.outputs]
    infer_shapes(model)

    assert [(o.name, o.type, _dims(o)) for n in model.graph for o in n.outputs] == first


# ------------------------------------------------------------------ validity


def test_a_valid_model_has_nothing_against_it() -> None:
    assert why_invalid(_large()) is None
    assert why_invalid(ir.to_proto(_large())) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agraph (float x) => (float y) { y = Foo(x) }", "No Op registered for Foo"),
        ("agraph (float x) => (float y) { y = Neg(x, x) }", "Neg"),
        ("agraph (float x) => (float y) { y = Neg(q) }", "q"),
        ("agraph (float x) => (float y) { y = Neg(a) a = Neg(x) }", "topologically sorted"),
        ("agraph (float x) => (float y) { y = Neg(x) y = Exp(x) }", "y"),
        ("agraph (float x) => (float y) { y = Neg<odd=1>(x) }", "odd"),
        ("<ir_version: 10, opset_import: []> agraph (float x) => (float y) { y = Neg(x) }", ""),
    ],
)
def test_an_invalid_model_is_reported_in_the_words_of_the_checker(text: str, message: str) -> None:
    head = "" if text.startswith("<") else '<ir_version: 10, opset_import: ["" : 21]>'
    reason = why_invalid(onnx.parser.parse_model(head + text))

    assert reason is not None
    assert message in reason


def test_long_vectors_are_found_and_their_elements_can_be_left_alone() -> None:
    def model(dims: str, array: np.ndarray) -> ir.Model:
        return parse(f"agraph (float{dims} w) => (float{dims} y) {{ y = Add(w, w) }}", w=array)

    long = LONG_VECTOR + 1
    vector = model(f"[{long}]", np.zeros(long, np.float32))
    infer_shapes(vector, follows_elements=False)

    assert has_long_vectors(vector)
    assert known_shape(vector.graph.outputs[0]) == ir.Shape([long])
    assert not has_long_vectors(model(f"[1, {long}]", np.zeros((1, long), np.float32)))
    assert not has_long_vectors(model("[8]", np.zeros(8, np.float32)))
