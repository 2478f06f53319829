"""Initializers that a file holds as `sparse_initializer`: dense in memory, marked by their tensor.

onnxruntime makes them dense when it loads the model, and so does `graphopt.loading`. Indices count
elements from the first one, as int64 in variable length: 1 to 3 bytes each up to two million
elements, where 8 are usual. onnx itself (1.23) gives such an initializer no type, so that its shape
inference, and its checker with `full_check`, reject most models that have one.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.content import bits_of, read_array

_SPARSE = "graphopt.sparse"
"""Key in the `meta` of a tensor: the file is to hold it without its zeros."""


def mark_sparse(tensor: ir.TensorProtocol) -> None:
    """Let the file hold a tensor without its zeros, as an initializer of the main graph.

    A tensor that takes its place is not marked.

    Args:
        tensor: that no other model has yet: clones share tensors.
    """
    tensor.meta[_SPARSE] = True


def is_marked(tensor: ir.TensorProtocol | None) -> bool:
    """The file is to hold the tensor without its zeros."""
    return tensor is not None and _SPARSE in tensor.meta


def sparse_proto(tensor: ir.TensorProtocol, name: str) -> onnx.SparseTensorProto:
    """A tensor without its zeros; -0.0 is a number like any other.

    Args:
        tensor: of elements of 1, 2, 4 or 8 bytes.
        name: of the initializer.
    """
    bits = np.ascontiguousarray(read_array(tensor)).reshape(-1).view(bits_of(tensor))
    indices = np.flatnonzero(bits)
    proto = onnx.SparseTensorProto(dims=tensor.shape.numpy())
    proto.values.name, proto.values.data_type = name, tensor.dtype.value
    proto.values.raw_data = bits[indices].tobytes()
    proto.indices.data_type = onnx.TensorProto.INT64
    proto.indices.int64_data.extend(indices.tolist())
    for part in (proto.values, proto.indices):
        part.dims.append(indices.size)
    return proto


def make_sparse(
    model: ir.Model, proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol]
) -> None:
    """Write the marked initializers of a main graph without their zeros.

    Args:
        model: not modified.
        proto: of it, where they are initializers or stubs of these.
        tensors: those left out of the proto, by name.
    """
    initializers = model.graph.initializers.items()
    marked = {name: v.const_value for name, v in initializers if is_marked(v.const_value)}
    if not marked:
        return
    kept = [one for one in proto.graph.initializer if one.name not in marked]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, tensor in marked.items():
        assert tensor is not None
        tensors.pop(name, None)
        proto.graph.sparse_initializer.append(sparse_proto(tensor, name))
