"""Models out: whatever happens, the target is the old model or the new one, whole.

`graphopt.file_set` says how; the data file of a model at `OUT` is `OUT.<12 hex of its hash>.data`.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.collection import no_collection
from graphopt.errors import ModelError
from graphopt.external_data import data_files_of, external_tensors, reads
from graphopt.file_set import FileSet, data_files_named_after, point_at
from graphopt.loading import check_encodable, check_file
from graphopt.scratch import is_scratch
from graphopt.serializing import is_large, stubbed
from graphopt.skeleton import INFERRED
from graphopt.sparse_tensors import make_sparse
from graphopt.stored_size import stored_size

INLINE_LIMIT_BYTES = 3 << 29
"""Weights above this (1.5 GiB) go to external data: a proto of 2 GiB cannot be read back."""
NAME_LIMIT_BYTES = 200
"""File names have 255 bytes in most systems; data and temporary files add to that of the graph."""


def save(
    model: ir.Model,
    path: str | Path,
    *,
    external_data: bool | None = None,
    reuse_data: bool = False,
    keep: Collection[Path] = (),
    metadata: Callable[[], Mapping[str, str]] | None = None,
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Write a model so that the target is the old one or the new one, whole, at every moment.

    Args:
        model: not modified.
        path: of the graph file; where it is a link, of what it leads to. Its folder must exist.
        external_data: put weights into a data file of their own; by default where the model's
            weights are in external data already or would not fit into one proto.
        reuse_data: leave weights that are in external data in their files, which must lie in the
            folder of the path and stay there; the other weights go into a data file of their own.
        keep: data files that stay even if they are older ones of this output, because something
            reads them. Those of the model always stay.
        metadata: called once the weights are written, for entries of the graph's metadata_props.
        verify: called with the path of the written graph before it takes its final name; what it
            raises stops the save and leaves the old model as it was.

    Returns:
        The bytes of the graph file and of the weights that it reads, which with `reuse_data` are
        not all written.

    Raises:
        ModelError: the folder is not there or not writable, the disk is full, the weights in
            subgraphs do not fit into the graph file, or data to reuse is in another folder.
    """
    path = Path(path)
    check_target(path)
    if path.is_symlink():
        path = path.resolve()
    read = {Path(tensor.path) for tensor in external_tensors(model)}
    _check_not_its_data(path, read)
    proto, tensors = for_disk(model)
    old = _in_files(tensors) if reuse_data else {}
    check_reuse(path, [Path(tensor.path) for tensor in old.values()])
    new = {name: tensor for name, tensor in tensors.items() if name not in old}
    if external_data is None:
        external_data = _goes_external(tensors)
    try:
        with FileSet(path, [path], {file.resolve() for file in (*read, *keep)}) as files:
            _leave_in_files(proto, old)
            size = sum(reused_bytes(model).values()) if old else 0
            if external_data and new:
                size += files.write_data([(proto, new)])
            else:
                _fill_in(proto, new)
            if metadata is not None:
                _add_metadata(proto, metadata())
            written = files.write_graph(path, proto)
            size += written.stat().st_size
            if verify is not None:
                verify(written)
            files.commit()
            return size
    except OSError as error:
        raise ModelError(why_not_written(path, error)) from error


def _in_files(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, ir.ExternalTensor]:
    """Those that are in files that stay."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, ir.ExternalTensor) and not is_scratch(tensor)
    }


def _leave_in_files(proto: onnx.ModelProto, tensors: Mapping[str, ir.ExternalTensor]) -> None:
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            tensor = tensors[stub.name]
            # Not the link: who looks whether a file is read looks for its own name.
            location = Path(tensor.path).resolve().name
            point_at(stub, tensor.offset or 0, tensor.nbytes, location)


def reused_bytes(model: ir.Model) -> dict[Path, int]:
    """How many bytes of which data files a save with `reuse_data` leaves where they are."""
    tensors = {name: v.const_value for name, v in model.graph.initializers.items()}
    large = {name: t for name, t in tensors.items() if t is not None and is_large(t)}
    regions: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for tensor in _in_files(large).values():
        start = tensor.offset or 0
        regions[Path(tensor.path).resolve()].append((start, start + tensor.nbytes))
    return {file: _covered_bytes(regions[file]) for file in sorted(regions)}


def _covered_bytes(regions: Iterable[tuple[int, int]]) -> int:
    """The bytes in regions from start to end, each once: tensors may share theirs."""
    count = reached = 0
    for start, end in sorted(regions):
        count += max(0, end - max(start, reached))
        reached = max(reached, end)
    return count


def check_reuse(path: Path, files: Iterable[Path]) -> None:
    """Raise ModelError when a graph at the path cannot read data files where they are.

    Args:
        path: of the graph file to be.
        files: the data files.
    """
    for file in map(Path.resolve, files):
        if file.parent != path.resolve().parent:
            raise ModelError(
                f"cannot write {path} with --reuse-data: the weights of the input are in {file}, "
                f"and the result can read them there only from the same folder; give an output "
                f"path in {file.parent}"
            )


def check_target(path: Path, source: Path | None = None, reuse_data: bool = False) -> None:
    """Raise ModelError when a model cannot be written to a path, before any work is done.

    Args:
        path: of the graph file to be.
        source: the model that the result is made from; it must not be overwritten.
        reuse_data: see `save`; the source must have data files, in the folder of the path.
    """
    check_encodable(path)
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
    if source is not None and reuse_data:
        check_file(source)
        files = data_files_of(source)
        # Loading the input will say what is wrong with it.
        if files is not None:
            check_has_data(files)
            check_reuse(path, files)


def check_has_data(files: Collection[Path]) -> None:
    """Raise ModelError when there are no data files to reuse."""
    if not files:
        raise ModelError(
            "the input has no data file that --reuse-data could go on using: its weights are in "
            "the graph file; leave the option out"
        )


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
    endangered = [*data_files_named_after(path), *([path] if path.is_file() else [])]
    for file in endangered:
        if reads(source, file):
            raise ModelError(
                f"weights of the input {source} are in {file}, which writing {path} would replace "
                "or remove; give another output path"
            )


def _check_not_its_data(path: Path, files: Collection[Path]) -> None:
    if path.exists() and any(file.exists() and path.samefile(file) for file in files):
        raise ModelError(f"weights of the model itself are in {path}; give another output path")


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


def why_not_written(path: Path, error: OSError) -> str:
    """What to tell the user of a save that the system stopped."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {path}: the disk is full; what was there before is unharmed"
    return f"cannot write {path}: {error.strerror or error}; what was there before is unharmed"


def _fill_in(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    _clear_locations(proto, tensors)
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            stub.raw_data = tensors[stub.name].tobytes()


def _add_metadata(proto: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    merged = {**{p.key: p.value for p in proto.metadata_props}, **entries}
    del proto.metadata_props[:]
    for key in sorted(merged):
        proto.metadata_props.add(key=key, value=merged[key])


# ------------------------------------------------------------------ what goes to disk


def stored_bytes(model: ir.Model, external_data: bool | None = None) -> int:
    """How many bytes the model takes on disk: graph and weights.

    Exact where the weights are in the graph file; with external data the offsets in the graph are
    counted roughly.

    Args:
        model: not modified.
        external_data: as for `save`.
    """
    size = stored_size(model, _is_declared)
    if external_data is None:
        external_data = size.has_external or size.large_bytes > INLINE_LIMIT_BYTES
    return size.reference_bytes + size.large_bytes if external_data else size.inline_bytes


def _goes_external(tensors: Mapping[str, ir.TensorProtocol]) -> bool:
    external = any(isinstance(t, ir.ExternalTensor) for t in tensors.values())
    return external or sum(t.nbytes for t in tensors.values()) > INLINE_LIMIT_BYTES


def _clear_locations(proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            stub.ClearField("external_data")
            stub.ClearField("data_location")


@no_collection()
def for_disk(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """As `serializing.stubbed`, without the types and shapes that onnxruntime infers by itself.

    What the file is to hold without its zeros is in the proto so.
    """
    proto, tensors = stubbed(model, _is_declared)
    make_sparse(model, proto, tensors)
    return proto, tensors


def _is_declared(value: ir.Value) -> bool:
    """The file said of which type the value is; initializers state that themselves."""
    return value.producer() is not None and INFERRED not in value.meta
