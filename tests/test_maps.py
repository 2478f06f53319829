"""Models whose outputs are maps, as those of classifiers that scikit-learn's converters write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import graphopt
from graphopt.errors import SampleError
from graphopt.runtime import Session

ML = "ai.onnx.ml"


def classifier() -> onnx.ModelProto:
    """Two classes of rows of two numbers; a Cast that does nothing."""
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        helper.make_node(
            "LinearClassifier",
            ["c"],
            ["label", "scores"],
            domain=ML,
            coefficients=[1.0, -1.0, -1.0, 1.0],
            intercepts=[0.0, 0.5],
            classlabels_ints=[3, 7],
            post_transform="SOFTMAX",
        ),
        helper.make_node("ZipMap", ["scores"], ["chances"], domain=ML, classlabels_int64s=[3, 7]),
    ]
    one = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    )
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_value_info("chances", helper.make_sequence_type_proto(one)),
        ],
    )
    imports = [helper.make_opsetid("", 11), helper.make_opsetid(ML, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=6)


def test_a_map_is_an_output_like_others(tmp_path: Path) -> None:
    proto = classifier()
    before = proto.SerializeToString()
    x = np.float32([[1, -1], [-2, 0.5], [0, 0]])

    run = graphopt.optimize(proto, samples=[{"x": x}], benchmark=False)
    run.save(tmp_path / "o.onnx")

    assert proto.SerializeToString() == before
    assert [s.spec for s in run.steps if s.verdict == "rolled back"] == []
    assert [n.op_type for n in run.model.graph] == ["LinearClassifier", "ZipMap"]
    assert {e.name for e in run.numerics["as deployed"]} >= {"label", "chances[0][3]"}
    saved = onnx.load(tmp_path / "o.onnx")
    assert saved.graph.output[1].type == proto.graph.output[1].type
    given, made = Session(graphopt.load(proto)).run({"x": x}), Session(run.model).run({"x": x})
    assert given.keys() == made.keys()
    assert all(np.array_equal(given[name], made[name]) for name in given)


def test_inspect_names_the_type() -> None:
    found, _ = graphopt.inspect(classifier())

    assert found.outputs[1].name == "chances"
    assert found.outputs[1].dtype == "sequence of maps"


def test_an_input_that_is_a_map_has_no_samples() -> None:
    kind = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    )
    node = helper.make_node("DictVectorizer", ["d"], ["y"], domain=ML, int64_vocabulary=[3, 7])
    graph = helper.make_graph(
        [node],
        "vectorizer",
        [helper.make_value_info("d", kind)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)

    with pytest.raises(SampleError, match="input 'd' is a map, and samples can only hold tensors"):
        graphopt.optimize(proto)
    run = graphopt.optimize(proto, validate=False, benchmark=False)
    assert run.optimized.nodes == 1
