"""The files of one save: graphs, and the one data file that they read.

The data is written to a temporary file, hashed, synced and renamed to
`STEM.<12 hex of its hash>.data`; then each graph is written to a temporary file and synced; when
all are there they are renamed. That is the commit point. Older data files go only after it, and
only those that no graph in the folder reads. What a killed save leaves behind, the next one
removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from graphopt.content import digest
from graphopt.data_file import DataFile
from graphopt.errors import ModelError
from graphopt.external_data import reads
from graphopt.loading import PROTO_LIMIT_BYTES
from graphopt.scratch import is_scratch


class FileSet:
    """The files of one save to one folder, temporary until `commit`; what is not goes at the end.

    Attributes:
        stem: what the data file is named after.
        graphs: paths of the graph files to be, in the folder of the stem.
        keep: data files that stay, resolved, whoever reads them.
        data: the data file, once there is one.
    """

    def __init__(self, stem: Path, graphs: Sequence[Path], keep: Container[Path] = ()) -> None:
        self.stem = stem
        self.graphs = graphs
        self.keep = keep
        self.data: Path | None = None
        self._data_is_new = False
        self._committed = False
        self._lock = -1

    def __enter__(self) -> FileSet:
        self._lock = _lock(self.stem.parent)
        for path in self._named():
            _remove_leftovers(path)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._named():
            for kind in ("graph", "data"):
                _temporary(path, kind).unlink(missing_ok=True)
        if not self._committed and self.data is not None and self._data_is_new:
            self.data.unlink(missing_ok=True)
        os.close(self._lock)

    def _named(self) -> set[Path]:
        """What the files of this save are named after."""
        return {self.stem, *self.graphs}

    def write_data(
        self,
        models: Iterable[tuple[onnx.ModelProto, Mapping[str, ir.TensorProtocol]]],
        *,
        by_content: bool = False,
    ) -> int:
        """Write the data file and point the stubs of the protos at it; its size in bytes.

        Args:
            models: protos and the tensors that their stubs stand for; each is asked for when the
                one before is written, and let go then.
            by_content: store equal bytes once, whatever the type and shape; otherwise only what
                is the same region of a file.
        """
        temporary = _temporary(self.stem, "data")
        with DataFile(temporary) as file, ThreadPoolExecutor(max_workers=1) as hasher:
            filling = _Filling(file, hasher, by_content)
            for proto, tensors in models:
                filling.add(proto, tensors)
                del tensors  # before the next model is loaded
            file.sync()
        if filling.stubs:
            self.data = self.stem.with_name(f"{self.stem.name}.{filling.content()}.data")
            self._data_is_new = not self.data.exists()
            os.replace(temporary, self.data)
            for stub in filling.stubs:
                stub.external_data.add(key="location", value=self.data.name)
        return file.size_bytes

    def write_graph(self, path: Path, proto: onnx.ModelProto) -> Path:
        """Write one of the graphs; where it is until `commit`."""
        if proto.ByteSize() > PROTO_LIMIT_BYTES:
            raise ModelError(f"cannot write {path}: the graph itself is over 2 GiB")
        temporary = _temporary(path, "graph")
        with open(temporary, "wb") as file:
            file.write(proto.SerializeToString(deterministic=True))
            _sync(file)
        return temporary

    def commit(self) -> None:
        """Give the graphs, all written, their names; then remove what they took the place of."""
        for path in self.graphs:
            os.replace(_temporary(path, "graph"), path)
            self._committed = True
        _sync_folder(self.stem.parent)
        self._remove_older_data()

    def _remove_older_data(self) -> None:
        kept = {self.data, *self.graphs}
        for path in self._named():
            for file in data_files_named_after(path):
                if file not in kept and file.resolve() not in self.keep and not _is_read(file):
                    file.unlink(missing_ok=True)


@dataclass
class _Filling:
    """Tensors on their way into a data file."""

    file: DataFile
    hasher: Executor
    by_content: bool
    stubs: list[onnx.TensorProto] = field(default_factory=list)
    _offsets: dict[Hashable, int] = field(default_factory=dict)
    _state: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, proto: onnx.ModelProto, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        """Append the tensors of a model, and say in its stubs where they are."""
        stubs = [s for s in proto.graph.initializer if s.name in tensors]
        stubs.sort(key=lambda stub: _place(tensors[stub.name]))
        # The hash is computed beside the copying; whichever is slower sets the pace.
        digests = [self.hasher.submit(digest, tensors[s.name]) for s in stubs]
        for stub, found in zip(stubs, digests, strict=True):
            tensor = tensors[stub.name]
            key = found.result() if self.by_content else _region(tensor)
            if key not in self._offsets:
                self._offsets[key] = self.file.append(tensor)
            point_at(stub, self._offsets[key], tensor.nbytes)
            self._state.update(f"{self._offsets[key]}\0".encode())
        for found in digests:
            self._state.update(found.result())
        self.stubs += stubs

    def content(self) -> str:
        """The part of the file's name that says what is in it."""
        return self._state.hexdigest()[:12]


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp")


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


def _region(tensor: ir.TensorProtocol) -> Hashable:
    """The bytes of a file that a tensor is; one in memory is like no other."""
    if not isinstance(tensor, ir.ExternalTensor):
        return id(tensor)
    return str(tensor.path), tensor.offset or 0, tensor.nbytes


def point_at(stub: onnx.TensorProto, offset: int, length: int, location: str | None = None) -> None:
    """Say of a stub where its data is; without the file where that has no name yet."""
    del stub.external_data[:]
    stub.external_data.add(key="offset", value=str(offset))
    stub.external_data.add(key="length", value=str(length))
    if location is not None:
        stub.external_data.add(key="location", value=location)


def data_files_named_after(path: Path) -> list[Path]:
    """The data files of saves to a path."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]


def _is_read(file: Path) -> bool:
    """A graph in the folder of a data file reads it, or may do so."""
    return any(_may_read(other, file) for other in file.parent.iterdir())


def _may_read(graph: Path, file: Path) -> bool:
    if graph.suffix == ".data":
        return False
    try:
        if not graph.is_file() or graph.stat().st_size > PROTO_LIMIT_BYTES:
            return False
        return reads(graph, file)
    except OSError:
        # Nobody here may look into it, so what it reads stays.
        return True


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
