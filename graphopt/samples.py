"""Samples: the user's own inputs, in every form, checked against the model before anything runs.

A sample maps input names to arrays. Samples are read from disk one at a time, so memory does not
grow with their number. They are split once, by content: the gate judges on samples that no pass
ever sees.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.sample_files import (
    REGISTERED_DTYPE,
    Source,
    npz_shapes,
    read_file,
    read_npz,
    write_npz,
)
from graphopt.signature import Input, check_sample

GATE_SHARE = 0.2
GATE_MINIMUM = 4
GATE_MAXIMUM = 64
SHARED_BELOW = 8
"""With fewer samples than this, all serve both for calibration and for the gate."""


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
        names: of each sample, by which a user knows it: the stem of its file (behind that of the
            subfolder it is in; with a number in brackets where the file has several samples), or
            its number in an iterable. Empty for samples that graphopt made.
    """

    loaders: tuple[Callable[[], Sample], ...]
    digests: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    random: bool = False
    keep: Any = field(default=None, repr=False, compare=False)
    names: tuple[str, ...] = ()

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
            tuple(self.names[i] for i in order) if self.names else (),
        )

    def first(self, count: int) -> Samples:
        """At most so many samples from the front; a long sequence is cut."""
        kept: list[tuple[int, ...]] = []
        for sequence in self.sequences:
            room = count - sum(map(len, kept))
            if room > 0:
                kept.append(sequence[:room])
        cut = replace(self, sequences=tuple(kept))
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
    reads = [
        [
            _named(source, file, path)
            for file in files
            for source in read_file(file, inputs, Path(keep.name))
        ]
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
    return frozenset(n for f in files if f.suffix == ".npz" for n in npz_shapes(f)), source


def _folder(path: Path, state: bool) -> list[list[Path]]:
    """The files of each sequence."""
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())] if state else [path]
    groups = [sorted(p for p in f.iterdir() if p.suffix in (".npz", ".npy")) for f in folders]
    if not any(groups):
        raise SampleError(f"the folder {path} has no .npz or .npy files")
    return [g for g in groups if g]


def _named(source: Source, file: Path, path: Path) -> Source:
    """The source with the subfolder in its name, where it is in one."""
    if file.parent in (path, path.parent):
        return source
    return replace(source, name=f"{file.parent.name}/{source.name}")


def _spool(source: Iterable[Sample]) -> tuple[list[list[Source]], Any]:
    keep = tempfile.TemporaryDirectory(prefix="graphopt-")
    reads: list[Source] = []
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
        load = partial(read_npz, path)
        reads.append(Source(f"sample {index}", str(index), load))
    return [reads], keep


def _typed(load: Callable[[], Sample], inputs: Sequence[Input]) -> Callable[[], Sample]:
    """The reader, with bytes of no known type seen as what the model expects."""
    narrow = {i.name: i.dtype for i in inputs if i.dtype.isbuiltin == REGISTERED_DTYPE}
    if not narrow:
        return load

    def see(name: str, array: np.ndarray) -> np.ndarray:
        dtype = narrow.get(name, array.dtype)
        raw = array.dtype.type is np.void and array.dtype.itemsize == dtype.itemsize
        return np.ascontiguousarray(array).view(dtype).reshape(array.shape) if raw else array

    return lambda: {name: see(name, array) for name, array in load().items()}


def _checked(
    opened: tuple[list[list[Source]], Any],
    inputs: Sequence[Input],
    carried: set[str],
    what: str,
) -> Samples:
    reads, keep = opened
    flat = [replace(s, load=_typed(s.load, inputs)) for group in reads for s in group]
    if not flat:
        raise SampleError(f"{what} are empty: no sample in them")
    digests = []
    for source in flat:
        sample = source.load()
        check_sample(sample, inputs, source.where, carried)
        digests.append(digest(sample))
    sequences: list[tuple[int, ...]] = [(i,) for i in range(len(flat))]
    if carried:
        starts = np.cumsum([0] + [len(g) for g in reads])
        sequences = [tuple(range(a, b)) for a, b in pairwise(starts)]
    return Samples(
        tuple(source.load for source in flat),
        tuple(digests),
        tuple(sequences),
        keep=keep,
        names=tuple(source.name for source in flat),
    )


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
