"""Models in: from a path, bytes, an onnx proto or an `ir.Model`.

Loading accepts what onnxruntime loads and never reads large external weights: they stay files.
What is wrong with a model is said here, in a message that names the cause, before any work begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphopt.collection import no_collection
from graphopt.content import digest, digests
from graphopt.errors import ModelError
from graphopt.external_data import anchor_external_tensors, check_external_data, external_tensors
from graphopt.naming import check_names
from graphopt.operators import ONNX_DOMAINS
from graphopt.protos import scopes, tensors_of
from graphopt.rewriting import replace_tensors, tensor_of, unshadow
from graphopt.serializing import stubbed
from graphopt.skeleton import from_proto, why_invalid

ModelLike = str | Path | bytes | onnx.ModelProto | ir.Model

PROTO_LIMIT_BYTES = (1 << 31) - 1

_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """A model as it was given.

    Attributes:
        path: of its file, or None when it was given in memory.
        stored_bytes: size of the graph file and of the data files that it references; of its
            serialized form when it was given in memory.
        graph_sha256: hash of the graph file (or of the serialized form).
        notes: what loading changed, for the user to know.
        invalid: what the onnx checker has against it, or None.
        data_files: those with external data.
    """

    path: Path | None
    stored_bytes: int
    graph_sha256: str
    notes: tuple[str, ...]
    invalid: str | None
    data_files: frozenset[Path]
    _read: Callable[[], ir.Model]
    _held: list[ir.Model]

    @property
    def model(self) -> ir.Model:
        """The model in memory, not to be modified; weights in external data stay there."""
        if not self._held:
            self._held.append(self._read())
        return self._held[0]

    def give_away(self) -> ir.Model:
        """The model, to be modified; when `model` is asked for again, it is made anew.

        A clone of a graph of many nodes takes as long as making it, and is seldom needed.
        """
        given, _ = self.model, self.external_tensors
        self._held.clear()
        return given

    @cached_property
    def external_tensors(self) -> tuple[ir.ExternalTensor, ...]:
        """The weights that are in files beside the graph."""
        return tuple(external_tensors(self.model)) if self.data_files else ()

    def has_external_data(self) -> bool:
        """Some of its weights are in files beside the graph."""
        return bool(self.data_files)

    def external_data(self) -> bool | None:
        """For `saving.save`: True where the weights came in files, None where it may choose."""
        return self.has_external_data() or None

    def hash_ahead(self) -> None:
        """Begin to hash external data in a thread of its own, for `sha256` and for saving."""
        if self.has_external_data():
            threading.Thread(target=self._hash_quietly, daemon=True).start()

    def _hash_quietly(self) -> None:
        # An error comes again, to somebody, when the hash is asked for.
        with contextlib.suppress(ModelError):
            self.sha256()

    def sha256(self) -> str:
        """Hash of the input: of the file; with external data, of the file's and tensors' hashes.

        External data is read, but for tensors whose hash is known already.
        """
        if not self.external_tensors:
            return self.graph_sha256
        state = hashlib.sha256(self.graph_sha256.encode())
        for tensor in self.external_tensors:
            state.update(digest(tensor))
        return state.hexdigest()


def load(model: ModelLike, *, drop_training_info: bool = False) -> ir.Model:
    """Load a model for inspection or rewriting; see `open_model`."""
    return open_model(model, drop_training_info=drop_training_info).model


@no_collection()
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
        clone = model.clone()
        anchor_external_tensors(clone)
        replace_tensors(clone, _view)
        proto, tensors = stubbed(clone)
        size = proto.ByteSize() + sum(t.nbytes for t in tensors.values())
        state = hashlib.sha256(proto.SerializeToString())
        for raw in digests(list(tensors.values())):
            state.update(raw)
        notes = _unshadowed(clone)
        invalid = why_invalid(proto)
        files = frozenset(Path(tensor.path) for tensor in external_tensors(clone))
        return Source(None, size, state.hexdigest(), notes, invalid, files, clone.clone, [])
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


def _view(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same content under a name of its own: renaming a value renames its tensor.

    Clones share tensors, so that would reach the model that a caller gave, and the proto below it.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return tensor
    if tensor.dtype == ir.DataType.STRING:
        return tensor_of(tensor.numpy(), tensor.name or "")
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
    )


def check_file(path: Path) -> None:
    """Raise ModelError when a file cannot be that of a model, before it is read."""
    check_encodable(path)
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
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None


def _read_file(path: Path) -> bytes:
    check_file(path)
    try:
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


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{what} is not an ONNX model, or is truncated: protobuf cannot parse it"
        ) from None
    if proto.graph.node and not proto.graph.output:
        raise ModelError(f"{what} has no outputs, so there is nothing to run it for")
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
    dense = sum(_densify(scope) for scope in scopes(proto))
    is_sorted = check_names(proto.graph)
    if _free_negative_dims(proto.graph):
        notes.append("dimensions of inputs or outputs that were negative are free now")
    if _state_opset_of_microsoft(proto):
        notes.append("opset 1 of com.microsoft was used but not stated; it is now")
    if dense:
        notes.append(f"{dense} sparse tensors are stored dense")
    files = check_external_data(proto, path)
    folder = path.parent if path is not None and files else None
    size += sum(file.stat().st_size for file in files)
    invalid = why_invalid(proto)
    names = [tensor.name for tensor in tensors_of(proto)]
    try:
        model = from_proto(proto)
    except Exception as error:  # whatever a malformed proto makes onnx-ir raise
        raise ModelError(f"the model is not valid: {invalid or _root(error)}") from error
    if folder is not None:
        anchor_external_tensors(model, folder)
    if not is_sorted:
        _sort(model)
        notes.append("nodes were not in topological order; they are now")
        invalid = why_invalid(model)
    if invalid is not None:
        _check_handled(model, invalid)
    notes += _unshadowed(model)
    read = partial(_made_again, proto, names, folder, is_sorted)
    return Source(path, size, digest, tuple(notes), invalid, frozenset(files), read, [model])


def _made_again(
    proto: onnx.ModelProto, names: Sequence[str], folder: Path | None, is_sorted: bool
) -> ir.Model:
    """The model of a proto that was found to be in order, whose tensors had these names."""
    for tensor, name in zip(tensors_of(proto), names, strict=True):
        # A value of the model that was made before renames its tensor along with itself.
        tensor.name = name
    model = from_proto(proto)
    if folder is not None:
        anchor_external_tensors(model, folder)
    if not is_sorted:
        model.graph.sort()
    unshadow(model)
    return model


def _root(error: BaseException) -> BaseException:
    """What an error came from: onnx-ir wraps each in ones that name where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _unshadowed(model: ir.Model) -> tuple[str, ...]:
    renamed = unshadow(model)
    if not renamed:
        return ()
    return (f"{renamed} values in bodies hid an outer value of the same name and were renamed",)


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
    used = any(node.domain == domain for scope in scopes(proto) for node in scope.node)
    if not used or any(opset.domain == domain for opset in proto.opset_import):
        return False
    proto.opset_import.add(domain=domain, version=1)
    return True


def check_encodable(path: Path) -> None:
    """Raise ModelError for the name of a file that onnxruntime could not be told."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path)
        raise ModelError(f"the path {name!r} is not UTF-8; rename the file or folder") from None


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
