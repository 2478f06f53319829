"""Samples: the user's own inputs, in every form, checked against the model before anything runs.

A sample maps input names to arrays. Samples are read from disk one at a time, so memory does not
grow with their number. They are split once, by content: the gate judges on samples that no pass
ever sees.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.errors import SampleError, did_you_mean
from graphopt.skeleton import type_text

GATE_SHARE = 0.2
GATE_MINIMUM = 4
GATE_MAXIMUM = 64
SHARED_BELOW = 8
"""With fewer samples than this, all serve both for calibration and for the gate."""

_REGISTERED_DTYPE = 2
"""`dtype.isbuiltin` of the types that numpy itself does not know: those of ml_dtypes."""

_UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What numpy, zipfile and zlib raise on a file that is damaged or is something else."""


@dataclass(frozen=True)
class Input:
    """What the model expects of one input.

    Attributes:
        name: of the input.
        dtype: element type of the arrays; object for strings.
        shape: dimensions; a name or None where any size goes; None when the rank is free.
        required: False for an input with a default value.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    required: bool = True

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[?]"
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype}[{dims}]"


def signature(model: ir.Model) -> tuple[Input, ...]:
    """The inputs of the model, in order.

    Raises:
        SampleError: an input is a sequence, a map or optional: there is no form of sample for it.
    """
    return tuple(_input(value, model.graph) for value in model.graph.inputs)


def _input(value: ir.Value, graph: ir.Graph) -> Input:
    name = value.name or ""
    if not isinstance(value.type, ir.TensorType):
        raise SampleError(
            f"input {name!r} is a {type_text(value)}, and samples can only hold tensors"
        )
    string = value.type.dtype == ir.DataType.STRING
    dtype = np.dtype(object) if string else np.dtype(value.type.dtype.numpy())
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Input(name, dtype, dims, name not in graph.initializers)


@dataclass(frozen=True)
class Samples:
    """Samples that can be iterated over again and again, each time read anew.

    Attributes:
        loaders: a function that reads a sample, for each sample.
        digests: of each sample's content.
        sequences: indices of samples that follow one another when state is carried; without state
            every sample stands alone.
        random: the samples were drawn at random.
        keep: what must live as long as the samples (a folder of temporary files).
    """

    loaders: tuple[Callable[[], Sample], ...]
    digests: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    random: bool = False
    keep: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.loaders)

    def __iter__(self) -> Iterator[Sample]:
        # Not a generator expression: that would not keep this object, and its files, alive.
        for load in self.loaders:
            yield load()

    def roll_outs(self) -> Iterator[Iterator[Sample]]:
        """The sequences, each as an iterator over its samples."""
        for sequence in self.sequences:
            yield (self.loaders[i]() for i in sequence)

    def select(self, sequences: Iterable[int]) -> Samples:
        """The samples of these sequences."""
        chosen = [self.sequences[s] for s in sequences]
        order = [i for sequence in chosen for i in sequence]
        place = {old: new for new, old in enumerate(order)}
        return Samples(
            tuple(self.loaders[i] for i in order),
            tuple(self.digests[i] for i in order),
            tuple(tuple(place[i] for i in sequence) for sequence in chosen),
            self.random,
            self.keep,
        )

    def first(self, count: int) -> Samples:
        """At most so many samples from the front; a long sequence is cut."""
        kept: list[tuple[int, ...]] = []
        for sequence in self.sequences:
            room = count - sum(map(len, kept))
            if room > 0:
                kept.append(sequence[:room])
        cut = Samples(self.loaders, self.digests, tuple(kept), self.random, self.keep)
        return cut.select(range(len(kept)))

    def split(self, gate_count: int | None = None) -> tuple[Samples, Samples]:
        """Samples for the passes, and samples for the gate, by content hash.

        Args:
            gate_count: how many for the gate; by default 20 %, at least 4 and at most 64. With
                fewer than 8 samples all serve both, unless this says otherwise. A sample that
                equals a gate sample is given to nobody else.

        Raises:
            SampleError: fewer than one for the gate were asked for.
        """
        if gate_count is not None and gate_count < 1:
            raise SampleError(f"{gate_count} samples for the gate; it needs at least 1")
        total = len(self.sequences)
        if total < SHARED_BELOW and gate_count is None:
            return self, self
        count = min(GATE_MAXIMUM, max(GATE_MINIMUM, round(total * GATE_SHARE)))
        count = min(total, gate_count if gate_count is not None else count)
        order = sorted(range(total), key=lambda s: (self._sequence_digest(s), s))
        gate = order[:count]
        seen = {self._sequence_digest(s) for s in gate}
        calibration = sorted(s for s in order[count:] if self._sequence_digest(s) not in seen)
        if not calibration:
            return self, self
        return self.select(calibration), self.select(gate)

    def _sequence_digest(self, sequence: int) -> str:
        return "".join(self.digests[i] for i in self.sequences[sequence])


def read_samples(
    source: str | Path | Iterable[Sample],
    inputs: Sequence[Input],
    state: Sequence[tuple[str, str]] = (),
) -> Samples:
    """Samples from a folder, a file or an iterable, each checked against the model.

    Args:
        source: a folder of .npz files keyed by input name, read in the order of their names; an
            .npz file with one sample, or with many along a leading axis; the same as .npy for a
            model with one input; or an iterable of mappings. An iterable is read once and kept on
            disk.
        inputs: what the model expects; see `signature`.
        state: pairs of output and input that carry state. All samples of a folder are then one
            sequence, and each of its subfolders is one more.

    Raises:
        SampleError: there are none, they cannot be read, or one does not fit.
    """
    carried = {name for _, name in state}
    if not isinstance(source, str | Path):
        return _checked(_spool(source), inputs, carried, "the samples")
    path = Path(source)
    if not path.exists():
        raise SampleError(f"there are no samples at {path}: no such file or folder")
    keep = tempfile.TemporaryDirectory(prefix="graphopt-")
    groups = [[path]] if path.is_file() else _folder(path, bool(state))
    reads: list[list[tuple[str, Callable[[], Sample]]]] = [
        [read for file in files for read in _read_file(file, inputs, Path(keep.name))]
        for files in groups
    ]
    return _checked((reads, keep), inputs, carried, str(path))


def first_names(
    source: str | Path | Iterable[Sample],
) -> tuple[frozenset[str], str | Path | Iterable[Sample]]:
    """The input names in the first sample, and the source to read on from (an iterator moves).

    Raises:
        SampleError: the first sample cannot be read.
    """
    if not isinstance(source, str | Path):
        rest = iter(source)
        first = list(islice(rest, 1))
        return frozenset(*first), chain(first, rest)
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.npz"))[:1] if path.is_dir() else []
    return frozenset(n for f in files if f.suffix == ".npz" for n in _npz_shapes(f)), source


def _folder(path: Path, state: bool) -> list[list[Path]]:
    """The files of each sequence."""
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())] if state else [path]
    groups = [sorted(p for p in f.iterdir() if p.suffix in (".npz", ".npy")) for f in folders]
    if not any(groups):
        raise SampleError(f"the folder {path} has no .npz or .npy files")
    return [g for g in groups if g]


def _spool(source: Iterable[Sample]) -> tuple[list[list[tuple[str, Callable[[], Sample]]]], Any]:
    keep = tempfile.TemporaryDirectory(prefix="graphopt-")
    reads: list[tuple[str, Callable[[], Sample]]] = []
    for index, sample in enumerate(source):
        if not isinstance(sample, Mapping):
            raise SampleError(
                f"sample {index} is a {type(sample).__name__}; it must map input names to arrays"
            )
        arrays = {name: np.asarray(value) for name, value in sample.items()}
        path = Path(keep.name) / f"{index}.npz"
        try:
            write_npz(path, arrays)
        except SampleError as error:
            raise SampleError(f"sample {index}: {error}") from None
        reads.append((f"sample {index}", lambda path=path: read_npz(path)))  # type: ignore[misc]
    return [reads], keep


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
            raw = array.dtype.isbuiltin == _REGISTERED_DTYPE
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


def _typed(load: Callable[[], Sample], inputs: Sequence[Input]) -> Callable[[], Sample]:
    """The reader, with bytes of no known type seen as what the model expects."""
    narrow = {i.name: i.dtype for i in inputs if i.dtype.isbuiltin == _REGISTERED_DTYPE}
    if not narrow:
        return load

    def see(name: str, array: np.ndarray) -> np.ndarray:
        dtype = narrow.get(name, array.dtype)
        raw = array.dtype.type is np.void and array.dtype.itemsize == dtype.itemsize
        return np.ascontiguousarray(array).view(dtype).reshape(array.shape) if raw else array

    return lambda: {name: see(name, array) for name, array in load().items()}


def _checked(
    opened: tuple[list[list[tuple[str, Callable[[], Sample]]]], Any],
    inputs: Sequence[Input],
    carried: set[str],
    what: str,
) -> Samples:
    reads, keep = opened
    flat = [(where, _typed(load, inputs)) for group in reads for where, load in group]
    if not flat:
        raise SampleError(f"{what} are empty: no sample in them")
    digests = []
    for where, load in flat:
        sample = load()
        check_sample(sample, inputs, where, carried)
        digests.append(digest(sample))
    sequences: list[tuple[int, ...]] = [(i,) for i in range(len(flat))]
    if carried:
        starts = np.cumsum([0] + [len(g) for g in reads])
        sequences = [tuple(range(a, b)) for a, b in pairwise(starts)]
    return Samples(tuple(load for _, load in flat), tuple(digests), tuple(sequences), keep=keep)


def digest(sample: Sample) -> str:
    """A hash of a sample's names, types, shapes and values."""
    state = hashlib.sha256()
    for name in sorted(sample):
        array = np.ascontiguousarray(sample[name])
        state.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        if array.dtype == object:
            state.update(repr(array.tolist()).encode())
        elif array.size:
            state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def check_sample(sample: Sample, inputs: Sequence[Input], where: str, carried: set[str]) -> None:
    """Raise SampleError when a sample does not fit the inputs of the model.

    Args:
        sample: the sample.
        inputs: what the model expects.
        where: what to call the sample in the message.
        carried: inputs that carry state; they may be missing.
    """
    known = {i.name: i for i in inputs}
    for name in sample:
        if name not in known:
            near = did_you_mean(name, known)
            raise SampleError(f"{where}: the model has no input {name!r}{near}")
    sizes: dict[str, tuple[int, str]] = {}
    for expected in inputs:
        array = sample.get(expected.name)
        if array is not None:
            _check_array(array, expected, where, sizes)
        elif expected.required and expected.name not in carried:
            raise SampleError(f"{where}: input {expected.name!r} ({expected}) is missing")


def _check_array(
    array: np.ndarray, expected: Input, where: str, sizes: dict[str, tuple[int, str]]
) -> None:
    given = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    text = expected.dtype == object and array.dtype.kind in "US"
    if array.dtype != expected.dtype and not text:
        raise SampleError(
            f"{where}: input {expected.name!r} is {given}; the model expects {expected}: "
            f"wrong element type"
        )
    if expected.shape is None:
        return
    if array.ndim != len(expected.shape):
        raise SampleError(
            f"{where}: input {expected.name!r} is {given}; the model expects {expected}: wrong rank"
        )
    for size, dim in zip(array.shape, expected.shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise SampleError(
                f"{where}: input {expected.name!r} is {given}; the model expects {expected}: "
                f"wrong shape"
            )
        if isinstance(dim, str) and sizes.setdefault(dim, (size, expected.name))[0] != size:
            raise SampleError(
                f"{where}: dimension {dim!r} is {size} in input {expected.name!r} but "
                f"{sizes[dim][0]} in input {sizes[dim][1]!r}"
            )


def complete(sample: Sample, inputs: Sequence[Input]) -> Sample:
    """The sample with zeros for the required inputs that it lacks: state before the first step.

    Raises:
        SampleError: the rank of such an input is free.
    """
    missing = [i for i in inputs if i.required and i.name not in sample]
    if not missing:
        return sample
    sizes = {
        dim: size
        for i in inputs
        if i.name in sample and i.shape is not None
        for dim, size in zip(i.shape, sample[i.name].shape, strict=False)
        if isinstance(dim, str)
    }
    return {**sample, **{i.name: _zeros(i, sizes) for i in missing}}


def _zeros(expected: Input, sizes: Mapping[str, int]) -> np.ndarray:
    if expected.shape is None:
        raise SampleError(
            f"input {expected.name!r} is missing in a sample, and it cannot be zeros: its rank is "
            "free"
        )
    dims = [d if isinstance(d, int) else sizes.get(d or "", 1) for d in expected.shape]
    if expected.dtype.kind == "O":
        return np.full(dims, "", object)
    return np.zeros(dims, expected.dtype)


# ------------------------------------------------------------------ files


def _read_file(
    path: Path, inputs: Sequence[Input], scratch: Path
) -> list[tuple[str, Callable[[], Sample]]]:
    """A name and a reader for each sample in the file."""
    if path.suffix == ".npy":
        return _read_npy_file(path, inputs)
    ranks = {i.name: len(i.shape) for i in inputs if i.shape is not None}
    shapes = _npz_shapes(path)
    stacked = bool(shapes) and all(
        name in ranks and len(shape) == ranks[name] + 1 for name, shape in shapes.items()
    )
    if not stacked:
        return [(str(path), lambda: read_npz(path))]
    counts = {shape[0] for shape in shapes.values()}
    if len(counts) != 1:
        raise SampleError(f"{path}: the arrays have different numbers of samples: {sorted(counts)}")
    files = {name: _unzip(path, name, scratch) for name in shapes}
    return [
        (f"{path}, sample {i}", lambda i=i: {n: _row(f, i) for n, f in files.items()})  # type: ignore[misc]
        for i in range(counts.pop())
    ]


def _read_npy_file(path: Path, inputs: Sequence[Input]) -> list[tuple[str, Callable[[], Sample]]]:
    required = [i for i in inputs if i.required]
    if len(required) != 1:
        raise SampleError(
            f"{path}: an .npy file serves a model with one input; this one has "
            f"{', '.join(i.name for i in required)}: use .npz keyed by input name"
        )
    (only,) = required
    array = _load_npy(path)
    if only.shape is None or array.ndim != len(only.shape) + 1:
        return [(str(path), lambda: {only.name: np.array(_load_npy(path))})]
    return [
        (f"{path}, sample {i}", lambda i=i: {only.name: _row(path, i)})  # type: ignore[misc]
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


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
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
