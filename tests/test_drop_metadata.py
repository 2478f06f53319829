from __future__ import annotations

import onnx_ir as ir

from graphopt.skeleton import INFERRED
from graphopt.testing import apply_pass, assert_unchanged, parse
from graphopt_passes.simplify.drop_metadata import DropMetadata

TEXT = "agraph (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"


def noted() -> ir.Model:
    model = parse(TEXT)
    relu = model.graph[0]
    relu.doc_string = "File model.py, line 3"
    relu.metadata_props["pkg.torch.onnx.stack_trace"] = "a long one"
    relu.outputs[0].metadata_props["shape"] = "[2]"
    model.graph.inputs[0].doc_string = "an image"
    model.metadata_props["author"] = "someone"
    return model


def test_drops_notes_and_keeps_those_of_the_model() -> None:
    model = noted()

    change = apply_pass(DropMetadata(), model)

    relu = model.graph[0]
    assert change.counts["note dropped"] == 3
    assert relu.doc_string is None
    assert not relu.metadata_props
    assert not relu.outputs[0].metadata_props
    assert model.graph.inputs[0].doc_string is None
    assert model.metadata_props == {"author": "someone"}


def test_types_inside_are_left_to_inference() -> None:
    model = parse(TEXT)
    hidden = model.graph[0].outputs[0]
    hidden.type, hidden.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    hidden.meta.pop(INFERRED, None)

    change = DropMetadata().apply(model, None)  # type: ignore[arg-type]

    assert change.counts == {"type left to inference": 1}
    assert hidden.meta[INFERRED]
    assert INFERRED not in model.graph.outputs[0].meta


def test_leaves_alone_a_model_without_notes() -> None:
    assert_unchanged(DropMetadata(), TEXT)


def test_twice_is_once() -> None:
    model = noted()
    apply_pass(DropMetadata(), model)

    assert not apply_pass(DropMetadata(), model)
