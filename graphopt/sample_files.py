"""Samples in .npz and .npy files. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.signature import Input

REGISTERED_DTYPE = 2
"""`dtype.isbuiltin` of the types that numpy itself does not know: those of ml_dtypes."""

_UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What numpy, zipfile and zlib raise on a file that is damaged or is something else."""


@dataclass(frozen=True)
class Source:
    """Where a sample comes from.

    Attributes:
        where: what to call it in a message.
        name: the stem of its file; with a number in brackets where the file has several.
        load: reads it.
    """

    where: str
    name: str
    load: Callable[[], Sample]


def _whole(path: Path, load: Callable[[], Sample]) -> Source:
    return Source(str(path), path.stem, load)


def _part(path: Path, index: int, load: Callable[[], Sample]) -> Source:
    return Source(f"{path}, sample {index}", f"{path.stem}[{index}]", load)


def read_file(path: Path, inputs: Sequence[Input], scratch: Path) -> list[Source]:
    """The samples in the file."""
    if path.suffix == ".npy":
        return _read_npy_file(path, inputs)
    ranks = {i.name: len(i.shape) for i in inputs if i.shape is not None}
    shapes = npz_shapes(path)
    stacked = bool(shapes) and all(
        name in ranks and len(shape) == ranks[name] + 1 for name, shape in shapes.items()
    )
    if not stacked:
        return [_whole(path, lambda: read_npz(path))]
    counts = {shape[0] for shape in shapes.values()}
    if len(counts) != 1:
        raise SampleError(f"{path}: the arrays have different numbers of samples: {sorted(counts)}")
    files = {name: _unzip(path, name, scratch) for name in shapes}
    return [
        _part(path, i, lambda i=i: {n: _row(f, i) for n, f in files.items()})  # type: ignore[misc]
        for i in range(counts.pop())
    ]


def _read_npy_file(path: Path, inputs: Sequence[Input]) -> list[Source]:
    required = [i for i in inputs if i.required]
    if len(required) != 1:
        raise SampleError(
            f"{path}: an .npy file serves a model with one input; this one has "
            f"{', '.join(i.name for i in required)}: use .npz keyed by input name"
        )
    (only,) = required
    array = _load_npy(path)
    if only.shape is None or array.ndim != len(only.shape) + 1:
        return [_whole(path, lambda: {only.name: np.array(_load_npy(path))})]
    return [
        _part(path, i, lambda i=i: {only.name: _row(path, i)})  # type: ignore[misc]
        for i in range(len(array))
    ]


def _load_npy(path: Path) -> np.ndarray:
    try:
        # Not numpy.load: whatever it does not know, it takes for pickled Python objects.
        return np.lib.format.open_memmap(path, mode="r")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _row(path: Path, index: int) -> np.ndarray:
    """One sample of a stacked .npy file.

    The file is mapped anew each time: pages of a map that stays open would count as memory in use
    and add up to the whole file.
    """
    return np.array(_load_npy(path)[index])


def read_npz(path: Path) -> Sample:
    """The arrays of an .npz file by name.

    Raises:
        SampleError: the file cannot be read, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an .npz file, from their headers alone."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(stream)
                if dtype.hasobject:
                    raise SampleError(f"{path}: {member!r} holds Python objects; save numbers")
                shapes[member.removesuffix(".npy")] = shape
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    return shapes


def _unzip(path: Path, name: str, scratch: Path) -> Path:
    """Where a copy of one array of an .npz file is, as .npy, which can be mapped."""
    folder = scratch / hashlib.sha256(f"{path}\0{name}".encode()).hexdigest()[:16]
    try:
        with zipfile.ZipFile(path) as archive:
            return Path(archive.extract(f"{name}.npy", folder))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SampleError:
    if "Python objects" in str(error) or "Object arrays" in str(error):
        return SampleError(f"{path}: holds Python objects; save arrays of numbers")
    if path.suffix not in (".npz", ".npy"):
        return SampleError(
            f"{path}: cannot be read as samples; they are .npz or .npy files, or a folder of them"
        )
    return SampleError(f"{path}: cannot be read as {path.suffix} ({error})")


def write_npz(path: Path, sample: Sample) -> None:
    """Write a sample to an .npz file.

    Unlike `numpy.savez` it takes every input name, and bfloat16 and the like, whose bytes it keeps
    (`read_samples` gives them their type back, which it knows from the model). Strings become
    numpy's own.

    Raises:
        SampleError: an array holds Python objects other than strings.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, given in sample.items():
            try:
                array = plain(given)
            except TypeError as error:
                raise SampleError(f"{name!r} holds {error}, not numbers or strings") from None
            raw = array.dtype.isbuiltin == REGISTERED_DTYPE
            stored = np.ascontiguousarray(array).view(f"V{array.itemsize}") if raw else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, stored.reshape(array.shape), allow_pickle=False)


def plain(array: np.ndarray) -> np.ndarray:
    """Strings in an array of objects as numpy's own strings, which need no pickle; else the array.

    Raises:
        TypeError: there are other objects in it.
    """
    if array.dtype != object:
        return array
    texts = [_text(item) for item in array.reshape(-1).tolist()]
    return np.array(texts, np.str_).reshape(array.shape)


def _text(item: object) -> str:
    if isinstance(item, bytes):
        return item.decode(errors="backslashreplace")
    if not isinstance(item, str):
        raise TypeError(f"a Python object ({type(item).__name__})")
    return item
