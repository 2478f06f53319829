"""What onnxruntime makes of a model at load."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from graphopt.protos import nested_graphs


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that run as deployed, in subgraphs too, and how often each."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    source = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    return Counter(node.op_type for one in nested_graphs(graph) for node in one.node)
