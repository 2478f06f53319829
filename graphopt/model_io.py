"""Models in and out.

Loading accepts what onnxruntime loads and never reads large external weights: they stay files.
Saving is atomic: whatever happens, the target is the old model or the new one, whole.

How a save goes: external data is written to a temporary file, hashed, synced and renamed to
`OUT.<12 hex of its hash>.data`; then the graph is written to a temporary file, synced and renamed
to `OUT`. That last rename is the commit point. Older data files of the same output go only after
it. What a killed save leaves behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphopt.errors import ModelError
from graphopt.operators import ONNX_DOMAINS, all_graphs
from graphopt.skeleton import INFERRED, stubbed, why_invalid

ModelLike = str | Path | bytes | onnx.ModelProto | ir.Model

PROTO_LIMIT_BYTES = (1 << 31) - 1
INLINE_LIMIT_BYTES = 3 << 29
"""Weights above this (1.5 GiB) go to external data: a proto of 2 GiB cannot be read back."""
NAME_LIMIT_BYTES = 200
"""File names have 255 bytes in most systems; data and temporary files add to that of the graph."""
CHUNK_BYTES = 4 << 20
ALIGNMENT_BYTES = 64

_DIGEST = "graphopt.sha256"
_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """A model as it was given.

    Attributes:
        model: in memory; weights in external data stay there.
        path: of its file, or None when it was given in memory.
        stored_bytes: size of the graph file and of the data files that it references; of its
            serialized form when it was given in memory.
        graph_sha256: hash of the graph file (or of the serialized form).
        notes: what loading changed, for the user to know.
        invalid: what the onnx checker has against it, or None.
    """

    model: ir.Model
    path: Path | None
    stored_bytes: int
    graph_sha256: str
    notes: tuple[str, ...] = ()
    invalid: str | None = None

    def sha256(self) -> str:
        """Hash of the input: of the file; with external data, of the file's and tensors' hashes."""
        tensors = list(_external_tensors(self.model))
        if not tensors:
            return self.graph_sha256
        state = hashlib.sha256(self.graph_sha256.encode())
        for digest in _digests(tensors):
            state.update(digest)
        return state.hexdigest()


def load(model: ModelLike, *, drop_training_info: bool = False) -> ir.Model:
    """Load a model for inspection or rewriting; see `open_model`."""
    return open_model(model, drop_training_info=drop_training_info).model


def open_model(model: ModelLike, *, drop_training_info: bool = False) -> Source:
    """Load a model from a path, bytes, an onnx proto or an `ir.Model`, which is never modified.

    Large weights in external data are not read. `sparse_initializer` is made dense, nodes are
    sorted; both are told in the notes.

    Raises:
        ModelError: the file is not there, is no model, is damaged, its external data is missing,
            too short or outside the model's folder, its graph has a cycle, or it has
            `training_info` and `drop_training_info` is not set.
    """
    if isinstance(model, ir.Model):
        proto, tensors = stubbed(model)
        size = proto.ByteSize() + sum(t.nbytes for t in tensors.values())
        digest = hashlib.sha256(proto.SerializeToString())
        for raw in _digests(list(tensors.values())):
            digest.update(raw)
        return Source(model.clone(), None, size, digest.hexdigest(), (), why_invalid(proto))
    if isinstance(model, str | Path):
        path = Path(model)
        data = _read_file(path)
        proto = _parse(data, str(path))
        return _from_proto(
            proto, path, hashlib.sha256(data).hexdigest(), len(data), drop_training_info
        )
    if isinstance(model, bytes):
        proto = _parse(model, "the bytes given")
        return _from_proto(
            proto, None, hashlib.sha256(model).hexdigest(), len(model), drop_training_info
        )
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        data = copy.SerializeToString()
        return _from_proto(
            copy, None, hashlib.sha256(data).hexdigest(), len(data), drop_training_info
        )
    raise ModelError(
        f"a model is a path, bytes, a ModelProto or an ir.Model, not a {type(model).__name__}"
    )


def _read_file(path: Path) -> bytes:
    _check_encodable(path)
    try:
        if not path.exists():
            raise ModelError(f"there is no model at {path}: no such file")
        if path.is_dir():
            raise ModelError(f"{path} is a folder; give the .onnx file in it")
        if path.stat().st_size > PROTO_LIMIT_BYTES:
            raise ModelError(
                f"{path} is over 2 GiB in one file, which protobuf cannot hold; export the model "
                "with external data"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if not data:
        raise ModelError(f"{path} is empty; export or copy the model again")
    if data.startswith(_LFS_MARK):
        raise ModelError(
            f"{path} is a pointer of Git LFS, not the model itself; fetch it with `git lfs pull`"
        )
    return data


def _check_encodable(path: Path) -> None:
    """Raise ModelError for the name of a file that onnxruntime could not be told."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path)
        raise ModelError(f"the path {name!r} is not UTF-8; rename the file or folder") from None


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{what} is not an ONNX model, or is truncated: protobuf cannot parse it"
        ) from None
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{what} is not an ONNX model: it has no IR version or no graph")
    _check_versions(proto, what)
    return proto


def _check_versions(proto: onnx.ModelProto, what: str) -> None:
    """Raise ModelError for a model from the future, which nothing here could read."""
    newest_ir, newest_opset = onnx.IR_VERSION, onnx.defs.onnx_opset_version()
    if proto.ir_version > newest_ir:
        raise ModelError(
            f"{what} has IR version {proto.ir_version}, and the onnx package here knows up to "
            f"{newest_ir}; install a newer onnx, or export the model for an older one"
        )
    if not proto.opset_import:
        raise ModelError(f"{what} states no opset (opset_import is empty); export the model again")
    for opset in proto.opset_import:
        if opset.domain in ONNX_DOMAINS and opset.version > newest_opset:
            raise ModelError(
                f"{what} has opset {opset.version}, and the onnx package here knows up to "
                f"{newest_opset}; install a newer onnx, or export the model with an older opset"
            )


def _from_proto(
    proto: onnx.ModelProto, path: Path | None, digest: str, size: int, drop_training_info: bool
) -> Source:
    try:
        return _source(proto, path, digest, size, drop_training_info)
    except UnicodeDecodeError as error:
        raise ModelError(
            f"the model is damaged: a name in it is not text, but {error.object[:40]!r}"
        ) from None


def _source(
    proto: onnx.ModelProto, path: Path | None, digest: str, size: int, drop_training_info: bool
) -> Source:
    notes = []
    if proto.training_info and not drop_training_info:
        raise ModelError(
            "the model has training_info (a training graph), which optimization would break; "
            "drop it with --drop-training-info if only inference is wanted"
        )
    if proto.training_info:
        del proto.training_info[:]
        notes.append("training_info was dropped")
    dense = sum(_densify(scope) for scope in _proto_scopes(proto))
    _check_names(proto.graph)
    if _free_negative_dims(proto.graph):
        notes.append("dimensions of inputs or outputs that were negative are free now")
    if _state_opset_of_microsoft(proto):
        notes.append("opset 1 of com.microsoft was used but not stated; it is now")
    if dense:
        notes.append(f"{dense} sparse tensors are stored dense")
    size += sum(f.stat().st_size for f in _check_external_data(proto, path))
    invalid = why_invalid(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # whatever a malformed proto makes onnx-ir raise
        raise ModelError(f"the model is not valid: {invalid or error}") from error
    if path is not None:
        _anchor_external_tensors(model, path.parent)
    if not _is_sorted(proto.graph):
        _sort(model)
        notes.append("nodes were not in topological order; they are now")
        invalid = why_invalid(model)
    if invalid is not None:
        _check_handled(model, invalid)
    return Source(model, path, size, digest, tuple(notes), invalid)


def _check_handled(model: ir.Model, invalid: str) -> None:
    """Raise ModelError for a model that is too damaged to be copied and written."""
    try:
        stubbed(model.clone())
    except Exception as error:  # as above
        raise ModelError(f"the model is not valid: {invalid}") from error


def _sort(model: ir.Model) -> None:
    try:
        model.graph.sort()
    except ValueError:
        raise ModelError("the graph has a cycle: its nodes cannot be put in order") from None


def _check_names(graph: onnx.GraphProto, outer: tuple[set[str], ...] = ()) -> None:
    """Raise ModelError where a value is read that nothing makes, or is made twice."""
    known = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        for text in (node.name, node.op_type, node.domain):
            # protobuf gives back as bytes what is not UTF-8, and nothing here could write it.
            if isinstance(text, bytes):
                raise ModelError(f"the model is damaged: {text[:40]!r} in a node is not text")
        for name in node.output:
            if name and name in known:
                raise ModelError(
                    f"value {name!r} is made twice, the second time by {_called(node)}; values "
                    "need different names"
                )
            known.add(name)
    scopes = (known, *outer)
    for node in graph.node:
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise ModelError(
                    f"{_called(node)} reads {name!r}, which nothing makes: no input, initializer "
                    "or node has that name"
                )
        for inner in _inner_graphs(node):
            _check_names(inner, scopes)
    for value in graph.output:
        if not any(value.name in scope for scope in scopes):
            raise ModelError(f"output {value.name!r} is made by nothing in the graph")


def _is_sorted(graph: onnx.GraphProto, outer: tuple[set[str], ...] = ()) -> bool:
    """No node reads what a later one makes. The checker's word is of the first fault only."""
    known = {"", *(value.name for value in graph.input), *(t.name for t in graph.initializer)}
    scopes = (known, *outer)
    for node in graph.node:
        if not all(any(name in scope for scope in scopes) for name in node.input):
            return False
        if not all(_is_sorted(inner, scopes) for inner in _inner_graphs(node)):
            return False
        known.update(node.output)
    return True


def _free_negative_dims(graph: onnx.GraphProto) -> bool:
    """Exporters mean by -1 what onnxruntime takes it for: any size; whether there was one."""
    dims = [
        dim
        for value in (*graph.input, *graph.output)
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_value < 0
    ]
    for dim in dims:
        dim.Clear()
    return bool(dims)


def _state_opset_of_microsoft(proto: onnx.ModelProto) -> bool:
    """Only onnxruntime does without the statement; the checker and shape inference do not."""
    domain = "com.microsoft"
    used = any(node.domain == domain for scope in _proto_scopes(proto) for node in scope.node)
    if not used or any(opset.domain == domain for opset in proto.opset_import):
        return False
    proto.opset_import.add(domain=domain, version=1)
    return True


def _called(node: onnx.NodeProto) -> str:
    return f"node {node.name!r} ({node.op_type})" if node.name else f"an unnamed {node.op_type}"


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _proto_graphs(scope: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    """The scope, if it is a graph, and the graphs nested in it."""
    if isinstance(scope, onnx.GraphProto):
        yield scope
    for node in scope.node:
        for inner in _inner_graphs(node):
            yield from _proto_graphs(inner)


def _proto_scopes(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Everything that has nodes: the graph, the functions, and the graphs nested in them."""
    yield from _proto_graphs(proto.graph)
    for function in proto.functions:
        yield function
        yield from _proto_graphs(function)


# ------------------------------------------------------------------ sparse tensors


def _densify(scope: onnx.GraphProto | onnx.FunctionProto) -> int:
    """Replace sparse initializers and Constant attributes by dense ones; how many there were."""
    count = 0
    if isinstance(scope, onnx.GraphProto):
        count = len(scope.sparse_initializer)
        scope.initializer.extend(_dense(sparse) for sparse in scope.sparse_initializer)
        del scope.sparse_initializer[:]
    for node in scope.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = _dense(attribute.sparse_tensor)
                attribute.Clear()
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
                count += 1
    return count


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    dims = tuple(sparse.dims)
    try:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        flat = np.zeros(int(np.prod(dims)), values.dtype)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), dims)
        flat[indices] = values
        return onnx.numpy_helper.from_array(flat.reshape(dims), sparse.values.name)
    except (ValueError, IndexError, TypeError, OSError) as error:
        raise ModelError(f"the sparse tensor {sparse.values.name!r} is damaged: {error}") from None


# ------------------------------------------------------------------ external data


def _proto_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for scope in _proto_scopes(proto):
        if isinstance(scope, onnx.GraphProto):
            yield from scope.initializer
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _check_external_data(proto: onnx.ModelProto, path: Path | None) -> set[Path]:
    """The data files of the model, each checked to be there, inside its folder and long enough."""
    files: dict[str, Path] = {}
    for tensor in _proto_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor)
            continue
        if path is None:
            raise ModelError(
                f"tensor {tensor.name!r} is in external data, which a model given in memory cannot "
                "find; give the path of the file"
            )
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            files[location] = _data_file(path.parent, location, tensor.name)
        _check_length(tensor, entries, files[location])
    return set(files.values())


def _data_file(folder: Path, location: str, tensor: str) -> Path:
    where = f"the data of tensor {tensor!r} is at {location!r}"
    if not location:
        raise ModelError(f"tensor {tensor!r} is in external data, but names no file")
    if Path(location).is_absolute():
        raise ModelError(f"{where}: an absolute path; external data must lie in the model's folder")
    file = folder / location
    root = folder.resolve()
    inside = Path(os.path.normpath(root / location)).is_relative_to(root)
    if not inside or not file.resolve().is_relative_to(root):
        raise ModelError(f"{where}, which leaves the model's folder {folder}; move it there")
    if not file.is_file():
        raise ModelError(f"{where}, and there is no such file in {folder}")
    return file


def _check_length(tensor: onnx.TensorProto, entries: Mapping[str, str], file: Path) -> None:
    for key in ("offset", "length"):
        if not re.fullmatch(r"-?[0-9]+", entries.get(key, "0")):
            raise ModelError(f"tensor {tensor.name!r} has {key} {entries[key]!r}: not a number")
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    needed = _needed_bytes(tensor)
    if min(offset, length) < 0 or ("length" in entries and length != needed):
        raise ModelError(
            f"tensor {tensor.name!r} declares {length} bytes of data at {offset}, and its type and "
            f"shape need {needed}"
        )
    if offset + needed > file.stat().st_size:
        raise ModelError(
            f"the data file {file} is too short: tensor {tensor.name!r} needs bytes {offset} to "
            f"{offset + needed}, and the file has {file.stat().st_size}"
        )


def _check_inline(tensor: onnx.TensorProto) -> None:
    """The checker never sees large tensors; this is what it would say of their bytes."""
    if not tensor.HasField("raw_data"):
        return
    given, needed = len(tensor.raw_data), _needed_bytes(tensor)
    if given != needed:
        raise ModelError(
            f"tensor {tensor.name!r} has {given} bytes of data, and its type and shape need "
            f"{needed}"
        )


def _needed_bytes(tensor: onnx.TensorProto) -> int:
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):
        raise ModelError(
            f"tensor {tensor.name!r} has the element type {tensor.data_type}, which is none of "
            "those whose bytes can be stored"
        ) from None
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative dimension: {list(tensor.dims)}")
    return (math.prod(tensor.dims) * bits + 7) // 8


def _anchor_external_tensors(model: ir.Model, folder: Path) -> None:
    """Let external tensors know where they are, whatever the working directory becomes.

    The location is made absolute, and the containment that onnx-ir would check again at each
    access has been checked by `_data_file`.
    """
    root = folder.absolute()
    for graph in _graphs_and_functions(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _anchored(value.const_value, root)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = attribute.as_tensor()
                    if isinstance(tensor, ir.ExternalTensor):
                        node.attributes[name] = ir.AttrTensor(name, _anchored(tensor, root))


def _anchored(tensor: ir.ExternalTensor, root: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        root / tensor.location,
        tensor.offset or 0,
        tensor.length or tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in _graphs_and_functions(model):
        held = [value.const_value for value in graph.initializers.values()]
        held += [a.value for node in graph for a in node.attributes.values()]
        yield from (tensor for tensor in held if isinstance(tensor, ir.ExternalTensor))


def _graphs_and_functions(model: ir.Model) -> Iterator[ir.Graph]:
    yield from all_graphs(model)
    yield from (function.graph for function in model.functions.values())


# ------------------------------------------------------------------ content


def chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The bytes of a tensor, little-endian, a few MB at a time.

    External data is read from its file, not through a mapping, whose pages would stay resident.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        content = memoryview(tensor.tobytes())
        for start in range(0, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]
        return
    left = tensor.nbytes
    buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
    with _open_data(tensor) as file:
        file.seek(tensor.offset or 0)
        while left:
            got = file.readinto(buffer[: min(len(buffer), left)])
            if not got:
                raise ModelError(f"the data file {tensor.path} ended while it was read")
            yield buffer[:got]
            left -= got


def _open_data(tensor: ir.ExternalTensor) -> io.FileIO:
    try:
        return open(tensor.path, "rb", buffering=0)
    except FileNotFoundError:
        raise ModelError(
            f"the data file {tensor.path}, with tensor {tensor.name!r}, is gone; it was there when "
            "the model was loaded"
        ) from None


def digest(tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of the bytes of a tensor; remembered for tensors in external data."""
    external = isinstance(tensor, ir.ExternalTensor)
    if external and _DIGEST in tensor.meta:
        known: bytes = tensor.meta[_DIGEST]
        return known
    state = hashlib.sha256()
    for chunk in chunks(tensor):
        state.update(chunk)
    if external:
        tensor.meta[_DIGEST] = state.digest()
    return state.digest()


def _digests(tensors: list[ir.TensorProtocol] | list[ir.ExternalTensor]) -> Iterator[bytes]:
    """The digests in order, computed by two threads: hashing releases the interpreter lock."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(digest, tensors)


def stored_bytes(model: ir.Model) -> int:
    """How many bytes the model takes on disk: graph and weights.

    Exact where the weights are in the graph file; with external data the offsets in the graph are
    counted roughly.
    """
    proto, tensors = _for_disk(model)
    if _goes_external(tensors):
        return proto.ByteSize() + sum(t.nbytes for t in tensors.values())
    _clear_locations(proto, tensors)
    added = 0
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            bare, data = stub.ByteSize(), tensors[stub.name].nbytes
            full = bare + 1 + _varint_bytes(data) + data
            added += full - bare + _varint_bytes(full) - _varint_bytes(bare)
    graph_bytes = proto.graph.ByteSize()
    outer = _varint_bytes(graph_bytes + added) - _varint_bytes(graph_bytes)
    return proto.ByteSize() + added + outer


def _varint_bytes(number: int) -> int:
    """The bytes that protobuf takes for a length."""
    return max(1, (number.bit_length() + 6) // 7)


def _goes_external(tensors: Mapping[str, ir.TensorProtocol]) -> bool:
    external = any(isinstance(t, ir.ExternalTensor) for t in tensors.values())
    return external or sum(t.nbytes for t in tensors.values()) > INLINE_LIMIT_BYTES


def _clear_locations(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            stub.ClearField("external_data")
            stub.ClearField("data_location")


def _for_disk(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """As `skeleton.stubbed`, without the types and shapes that onnxruntime infers by itself."""
    proto, tensors = stubbed(model)
    for imported in proto.opset_import:
        if not imported.domain:
            imported.ClearField("domain")
    declared = {
        output.name
        for graph in all_graphs(model)
        for node in graph
        for output in node.outputs
        if INFERRED not in output.meta
    }
    for graph in _proto_graphs(proto.graph):
        kept = [info for info in graph.value_info if info.name in declared]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return proto, tensors


# ------------------------------------------------------------------ saving


def save(
    model: ir.Model,
    path: str | Path,
    *,
    external_data: bool | None = None,
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Write a model so that the target is the old one or the new one, whole, at every moment.

    Args:
        model: not modified.
        path: of the graph file. Its folder must exist.
        external_data: put weights into a data file of their own; by default where the model's
            weights are in external data already or would not fit into one proto.
        verify: called with the path of the written graph before it takes its final name; what it
            raises stops the save and leaves the old model as it was.

    Returns:
        The bytes written: graph and data file.

    Raises:
        ModelError: the folder is not there or not writable, the disk is full, or the weights in
            subgraphs do not fit into the graph file.
    """
    path = Path(path)
    check_target(path)
    proto, tensors = _for_disk(model)
    if external_data is None:
        external_data = _goes_external(tensors)
    try:
        with _Scratch(path) as scratch:
            size = 0
            if external_data:
                size = scratch.write_data(proto, tensors)
            else:
                _fill_in(proto, tensors)
            return size + scratch.write_graph(proto, verify)
    except OSError as error:
        raise ModelError(_why_not_written(path, error)) from error


def check_target(path: Path, source: Path | None = None) -> None:
    """Raise ModelError when a model cannot be written to a path, before any work is done.

    Args:
        path: of the graph file to be.
        source: the model that the result is made from; it must not be overwritten.
    """
    _check_encodable(path)
    _check_place(path)
    if path.exists() and not path.is_file():
        # Renaming a file to a device or pipe, as a save ends, would replace it.
        raise ModelError(f"cannot write {path}: it is not a regular file; give a file name")
    if not os.access(path.parent, os.W_OK):
        raise ModelError(f"cannot write {path}: the folder {path.parent} is not writable")
    if len(os.fsencode(path.name)) > NAME_LIMIT_BYTES:
        raise ModelError(f"cannot write {path}: the file name is too long; give a shorter one")
    if source is not None:
        _check_not_the_input(path, source)


def check_text_target(path: Path, models: Iterable[Path], others: Iterable[Path] = ()) -> None:
    """Raise ModelError when a text cannot be written to a path, before any work is done.

    Args:
        path: of the text file to be; a device or pipe is good too.
        models: that are read; neither they nor their data must be overwritten.
        others: files that must not be overwritten either.
    """
    _check_place(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise ModelError(f"cannot write {path}: it is not writable")
    for model in models:
        _check_not_the_input(path, model)
    if any(path.resolve() == other.resolve() for other in others):
        raise ModelError(f"{path} is asked for twice, for two things; give the text another path")


def _check_place(path: Path) -> None:
    try:
        if path.is_dir():
            raise ModelError(f"cannot write {path}: it is a folder; give a file name")
        if not path.parent.is_dir():
            raise ModelError(f"cannot write {path}: there is no folder {path.parent}")
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None


def _check_not_the_input(path: Path, source: Path) -> None:
    """Raise ModelError when writing to the path would destroy the input or its external data."""
    try:
        if not (path.parent.is_dir() and source.is_file()):
            return
    except OSError:
        # Loading the input will say what is wrong with its path.
        return
    if path.exists() and path.samefile(source):
        raise ModelError(f"{path} is the input itself; give another output path")
    endangered = [*_data_files_named_after(path), *([path] if path.is_file() else [])]
    for file in endangered:
        if _has_data_in(source, file):
            raise ModelError(
                f"weights of the input {source} are in {file}, which writing {path} would replace "
                "or remove; give another output path"
            )


def _has_data_in(source: Path, file: Path) -> bool:
    """The model keeps tensors in that file; a look at its raw bytes rules that out at once."""
    with open(source, "rb") as stream:
        if not source.stat().st_size:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(file.name.encode()) < 0:
                return False
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(source.read_bytes())
    except (DecodeError, OSError):
        return False
    locations = {
        source.parent / entry.value
        for tensor in _proto_tensors(proto)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return any(place.exists() and place.samefile(file) for place in locations)


def write_text(path: Path, text: str) -> None:
    """Write a small text file.

    Raises:
        ModelError: the path cannot be written.
    """
    try:
        # A name of a file that is no UTF-8 is written as Python and JSON escape it.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None


def _why_not_written(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {path}: the disk is full; what was there before is unharmed"
    return f"cannot write {path}: {error.strerror or error}; what was there before is unharmed"


def _fill_in(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    _clear_locations(proto, tensors)
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            stub.raw_data = tensors[stub.name].tobytes()


class _Scratch:
    """The temporary files of one save, next to the target; left-overs go when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = -1
        self.data: Path | None = None
        self.data_is_new = False
        self.committed = False

    def __enter__(self) -> _Scratch:
        self.lock = _lock(self.path.parent)
        _remove_leftovers(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        for kind in ("graph", "data"):
            self._temporary(kind).unlink(missing_ok=True)
        if not self.committed and self.data is not None and self.data_is_new:
            self.data.unlink(missing_ok=True)
        os.close(self.lock)

    def _temporary(self, kind: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{os.getpid()}.{kind}.tmp")

    def write_data(self, proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> int:
        """Write the data file and point the stubs of the proto at it; its size in bytes."""
        stubs = [s for s in proto.graph.initializer if s.name in tensors]
        temporary = self._temporary("data")
        with (
            open(temporary, "wb") as file,
            ThreadPoolExecutor(max_workers=1) as hasher,
        ):
            # The hash is computed beside the copying; whichever is slower sets the pace.
            digests = [hasher.submit(digest, tensors[s.name]) for s in stubs]
            state = hashlib.sha256()
            for stub in stubs:
                offset = _write_tensor(file, tensors[stub.name])
                state.update(f"{offset}\0".encode())
                _point_at(stub, offset, tensors[stub.name].nbytes)
            for future in digests:
                state.update(future.result())
            _sync(file)
            size = file.tell()
        self.data = self.path.with_name(f"{self.path.name}.{state.hexdigest()[:12]}.data")
        self.data_is_new = not self.data.exists()
        os.replace(temporary, self.data)
        for stub in stubs:
            stub.external_data.add(key="location", value=self.data.name)
        return size

    def write_graph(self, proto: onnx.ModelProto, verify: Callable[[Path], None] | None) -> int:
        """Write the graph, let it be verified, and commit; its size in bytes."""
        if proto.ByteSize() > PROTO_LIMIT_BYTES:
            raise ModelError(f"cannot write {self.path}: the graph itself is over 2 GiB")
        temporary = self._temporary("graph")
        with open(temporary, "wb") as file:
            file.write(proto.SerializeToString(deterministic=True))
            _sync(file)
            size = file.tell()
        if verify is not None:
            verify(temporary)
        os.replace(temporary, self.path)
        self.committed = True
        _sync_folder(self.path.parent)
        _remove_older_data(self.path, self.data)
        return size


def _write_tensor(file: IO[bytes], tensor: ir.TensorProtocol) -> int:
    """Append the tensor's bytes, aligned; the offset at which they start."""
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    offset = file.tell()
    if not (isinstance(tensor, ir.ExternalTensor) and _copy_in_kernel(file, tensor)):
        for chunk in chunks(tensor):
            file.write(chunk)
    return offset


def _copy_in_kernel(file: IO[bytes], tensor: ir.ExternalTensor) -> bool:
    """Copy without passing the bytes through this process; False where the system cannot."""
    if not hasattr(os, "copy_file_range"):
        return False
    file.flush()
    start, done = file.tell(), 0
    with _open_data(tensor) as source:
        while done < tensor.nbytes:
            try:
                moved = os.copy_file_range(
                    source.fileno(),
                    file.fileno(),
                    tensor.nbytes - done,
                    (tensor.offset or 0) + done,
                    start + done,
                )
            except OSError as error:
                if done == 0 and error.errno in (
                    errno.EXDEV,
                    errno.EINVAL,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                ):
                    return False
                raise
            if moved == 0:
                raise ModelError(f"the data file {tensor.path} ended while it was read")
            done += moved
    file.seek(start + done)
    return True


def _point_at(stub: onnx.TensorProto, offset: int, length: int) -> None:
    del stub.external_data[:]
    stub.external_data.add(key="offset", value=str(offset))
    stub.external_data.add(key="length", value=str(length))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _data_files_named_after(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]


def _remove_older_data(path: Path, current: Path | None) -> None:
    for file in _data_files_named_after(path):
        if file != current:
            file.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of saves to this target that were killed.

    To be called by the holder of the folder's lock: nobody else is saving there.
    """
    pattern = re.compile(r"\." + re.escape(path.name) + r"\.\d+\.(graph|data)\.tmp")
    for file in path.parent.iterdir():
        if pattern.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _lock(folder: Path) -> int:
    """Wait until no other process or thread saves to the folder; the handle that holds it.

    Two saves to one target at a time would remove each other's data files. The lock goes with the
    process that holds it, however that ends.
    """
    import fcntl  # not on every system, and only saving needs it

    handle = os.open(folder, os.O_RDONLY)
    # Without: a file system that has no locks.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


# ------------------------------------------------------------------ inputs with a default


def allow_new_initializers(model: ir.Model) -> None:
    """Before IR version 4 every initializer had to be an input; raise an older model to it."""
    model.ir_version = max(model.ir_version, 4)


def freeze_overridable_inputs(model: ir.Model) -> list[str]:
    """Make constants of the initializers that are also inputs; their names.

    Old exporters list every weight as an input, so that a caller could replace it. None does, and
    as long as one could, nothing that depends on the weight can be computed ahead.
    """
    graph = model.graph
    frozen = [v for v in graph.inputs if v.is_initializer()]
    for value in frozen:
        graph.inputs.remove(value)
    allow_new_initializers(model)
    return [v.name or "" for v in frozen]
