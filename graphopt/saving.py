"""Models out: whatever happens, the target is the old model or the new one, whole.

How a save goes: external data is written to a temporary file, hashed, synced and renamed to
`OUT.<12 hex of its hash>.data`; then the graph is written to a temporary file, synced and renamed
to `OUT`. That last rename is the commit point. Older data files of the same output go only after
it. What a killed save leaves behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphopt.collection import no_collection
from graphopt.content import digest
from graphopt.data_file import DataFile
from graphopt.errors import ModelError
from graphopt.external_data import external_tensors
from graphopt.loading import PROTO_LIMIT_BYTES, check_encodable
from graphopt.protos import tensors_of
from graphopt.scratch import is_scratch
from graphopt.serializing import stubbed
from graphopt.skeleton import INFERRED
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
        keep: data files that stay even if they are older ones of this output, because something
            reads them. Those of the model always stay.
        metadata: called once the weights are written, for entries of the graph's metadata_props.
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
    if path.is_symlink():
        path = path.resolve()
    _check_not_its_data(path, model)
    proto, tensors = _for_disk(model)
    if external_data is None:
        external_data = _goes_external(tensors)
    read = {Path(tensor.path).resolve() for tensor in external_tensors(model)}
    try:
        with _Save(path, read | {file.resolve() for file in keep}) as files:
            size = 0
            if external_data and tensors:
                size = files.write_data(proto, tensors)
            else:
                _fill_in(proto, tensors)
            if metadata is not None:
                _add_metadata(proto, metadata())
            return size + files.write_graph(proto, verify)
    except OSError as error:
        raise ModelError(_why_not_written(path, error)) from error


def check_target(path: Path, source: Path | None = None) -> None:
    """Raise ModelError when a model cannot be written to a path, before any work is done.

    Args:
        path: of the graph file to be.
        source: the model that the result is made from; it must not be overwritten.
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


def _check_not_its_data(path: Path, model: ir.Model) -> None:
    files = {Path(tensor.path) for tensor in external_tensors(model)}
    if path.exists() and any(file.exists() and path.samefile(file) for file in files):
        raise ModelError(f"weights of the model itself are in {path}; give another output path")


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
        for tensor in tensors_of(proto)
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


def _add_metadata(proto: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    merged = {**{p.key: p.value for p in proto.metadata_props}, **entries}
    del proto.metadata_props[:]
    for key in sorted(merged):
        proto.metadata_props.add(key=key, value=merged[key])


class _Save:
    """The temporary files of one save, next to the target; left-overs go when it ends."""

    def __init__(self, path: Path, keep: Container[Path]) -> None:
        self.path = path
        self.keep = keep
        self.lock = -1
        self.data: Path | None = None
        self.data_is_new = False
        self.committed = False

    def __enter__(self) -> _Save:
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
        stubs.sort(key=lambda stub: _place(tensors[stub.name]))
        temporary = self._temporary("data")
        with DataFile(temporary) as file, ThreadPoolExecutor(max_workers=1) as hasher:
            # The hash is computed beside the copying; whichever is slower sets the pace.
            digests = [hasher.submit(digest, tensors[s.name]) for s in stubs]
            state = hashlib.sha256()
            written: dict[tuple[str, int, int] | None, int] = {}
            for stub in stubs:
                tensor = tensors[stub.name]
                region = _region(tensor)
                offset = written[region] if region in written else file.append(tensor)
                if region is not None:
                    written[region] = offset
                state.update(f"{offset}\0".encode())
                _point_at(stub, offset, tensor.nbytes)
            for future in digests:
                state.update(future.result())
            file.sync()
        self.data = self.path.with_name(f"{self.path.name}.{state.hexdigest()[:12]}.data")
        self.data_is_new = not self.data.exists()
        os.replace(temporary, self.data)
        for stub in stubs:
            stub.external_data.add(key="location", value=self.data.name)
        return file.size_bytes

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
        self._remove_older_data()
        return size

    def _remove_older_data(self) -> None:
        for file in _data_files_named_after(self.path):
            if file != self.data and file.resolve() not in self.keep:
                file.unlink(missing_ok=True)


def _place(tensor: ir.TensorProtocol) -> tuple[int, str, int]:
    """The order in which tensors are written: as they lie in their files, then the new ones.

    Of the new ones, those in a scratch file come in the order in which they were made, those in
    memory in that of the graph.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return 2, "", 0
    if is_scratch(tensor):
        return 1, "", tensor.offset or 0
    return 0, str(tensor.path), tensor.offset or 0


def _region(tensor: ir.TensorProtocol) -> tuple[str, int, int] | None:
    """The bytes of a file that a tensor is; None for one in memory."""
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return str(tensor.path), tensor.offset or 0, tensor.nbytes


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
def _for_disk(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """As `serializing.stubbed`, without the types and shapes that onnxruntime infers by itself."""
    return stubbed(model, _is_declared)


def _is_declared(value: ir.Value) -> bool:
    """The file said of which type the value is; initializers state that themselves."""
    return value.producer() is not None and INFERRED not in value.meta
