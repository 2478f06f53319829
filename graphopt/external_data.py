"""External data: weights in files beside the graph, checked before anything reads them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphopt.content import CHUNK_BYTES, remember
from graphopt.errors import ModelError
from graphopt.operators import attributes_of, graphs_and_functions
from graphopt.protos import tensors_of
from graphopt.rewriting import replace_tensors


def check_external_data(proto: onnx.ModelProto, path: Path | None) -> set[Path]:
    """The data files of the model, each checked to be there, inside its folder and long enough."""
    files: dict[str, Path] = {}
    for tensor in tensors_of(proto):
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
    if not Path(os.path.normpath(root / location)).is_relative_to(root):
        raise ModelError(f"{where}, which leaves the model's folder {folder}; move it there")
    if not file.resolve().is_relative_to(root):
        raise ModelError(
            f"{where}, a link that leaves the model's folder {folder}; copy the file itself there "
            "(cp -L copies what links lead to)"
        )
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


def anchor_external_tensors(model: ir.Model, folder: Path | None = None) -> None:
    """Let external tensors know where they are, whatever the working directory becomes.

    The location is made absolute. Containment, which onnx-ir would check again at each access, has
    been checked by `check_external_data` for models from a file.

    Args:
        model: its tensors are replaced, not changed.
        folder: of the graph file; by default what each tensor says itself.

    Raises:
        ModelError: a data file is not there, or too short.
    """
    replace_tensors(
        model, lambda t: _anchored(t, folder) if isinstance(t, ir.ExternalTensor) else t
    )


def _anchored(tensor: ir.ExternalTensor, folder: Path | None) -> ir.ExternalTensor:
    path = (Path(tensor.base_dir) if folder is None else folder).absolute() / tensor.location
    if not path.is_file():
        raise ModelError(f"the data of tensor {tensor.name!r} is at {path}: no such file")
    end, size = (tensor.offset or 0) + tensor.nbytes, path.stat().st_size
    if end > size:
        raise ModelError(
            f"the data file {path} is too short: tensor {tensor.name!r} ends at byte {end}, and "
            f"the file has {size}"
        )
    anchored = ir.ExternalTensor(
        path,
        tensor.offset or 0,
        tensor.length or tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )
    anchored.meta.update(tensor.meta)
    remember(anchored)
    return anchored


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The tensors in external data: initializers, and attributes of nodes."""
    for graph in graphs_and_functions(model):
        held = [value.const_value for value in graph.initializers.values()]
        held += [a.value for node in graph for a in attributes_of(node)]
        yield from (tensor for tensor in held if isinstance(tensor, ir.ExternalTensor))


def reads(graph: Path, file: Path) -> bool:
    """A graph file keeps tensors in that data file; a look at its raw bytes rules that out at once.

    Raises:
        OSError: the graph cannot be read.
    """
    if not _mentions(graph, file.name.encode()):
        return False
    return any(place.exists() and place.samefile(file) for place in data_files_of(graph) or ())


def _mentions(path: Path, word: bytes) -> bool:
    tail = b""
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if word in tail + chunk:
                return True
            tail = (tail + chunk)[-len(word) :]
    return False


def data_files_of(graph: Path) -> set[Path] | None:
    """The data files that a graph file names, there or not; None where it is no graph.

    Raises:
        OSError: it cannot be read.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(graph.read_bytes())
    except DecodeError:
        return None
    return {
        graph.parent / entry.value
        for tensor in tensors_of(proto)
        for entry in tensor.external_data
        if entry.key == "location"
    }
