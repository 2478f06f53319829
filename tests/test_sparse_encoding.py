"""What is written without its zeros comes back bit for bit, as one initializer, in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt.encoding import Encoding
from graphopt.packing import is_packed, packed_weights
from graphopt.rewriting import Names
from graphopt.sparse_encoding import sparse_of
from graphopt.testing import parse

KINDS = {"float32": "float", "float64": "double", "float16": "float16", "int8": "int8"}


def sparse_array(density: float, shape: tuple[int, ...] = (9, 7, 13), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kept = rng.random(shape) < density
    return np.where(kept, rng.standard_normal(shape), 0.0).astype(np.float32)


def written(array: np.ndarray) -> ir.Model:
    """A model that outputs the array, written sparse."""
    dtype = ir.DataType.from_numpy(array.dtype)
    kind, dims = dtype.name.lower(), ",".join(map(str, array.shape))
    text = f"agraph (bool[1] c, {kind}[{dims}] x) => ({kind}[{dims}] y) {{ y = Where(c, x, x) }}"
    model = parse(text)
    encoding = Encoding(model.graph, Names(model), lambda a, name: ir.Tensor(a, name=name))
    sparse = sparse_of(array)
    assert sparse is not None
    model.graph[0].replace_input_with(1, encoding.sparse(sparse, dtype, "w"))
    encoding.close()
    return model


def computed(
    model: ir.Model, tmp_path: Path, optimized: bool
) -> tuple[np.ndarray, onnx.ModelProto]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options)
    source = session.get_inputs()[1]
    dtype = ir.DataType[source.type[7:-1].upper()].numpy()
    feeds = {"c": np.ones(1, bool), "x": np.zeros(source.shape, dtype)}
    (output,) = session.run(None, feeds)
    return output, onnx.load(tmp_path / "optimized.onnx")


@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.1, 0.2, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(9, 7, 13), (64, 32), (5000,)])
def test_onnxruntime_folds_to_one_initializer(density, shape, tmp_path: Path) -> None:
    array = sparse_array(density, shape)
    array.reshape(-1)[-1] = 0
    model = written(array)
    output, folded = computed(model, tmp_path, True)
    np.testing.assert_array_equal(output.view(np.uint32), array.view(np.uint32))
    assert [node.op_type for node in folded.graph.node] == ["Where"]
    assert len(folded.graph.initializer) == 1
    output, folded = computed(model, tmp_path, False)
    np.testing.assert_array_equal(output.view(np.uint32), array.view(np.uint32))
    assert all(is_packed(o) for n in model.graph if n.op_type != "Where" for o in n.outputs), [
        n.op_type for n in model.graph if not is_packed(n.outputs[0])
    ]
    assert [v.name for v in packed_weights(model.graph)] == ["w"]
