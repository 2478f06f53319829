"""Several models, one data file: weights that their graphs have in common are stored once.

Encoder and decoder, prefill and decode, a model and its fine-tuned heads. Equal bytes are one
region of the data file, whatever their names, types and shapes, and each model is loaded, written
and let go before the next.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt import loading, runtime, saving
from graphopt.contract import Effect
from graphopt.errors import CheckFailed, ModelError, SampleError
from graphopt.external_data import external_tensors
from graphopt.file_set import FileSet
from graphopt.recording import Feed, Recording, compare, record
from graphopt.runtime import Reference, Session
from graphopt.subject import Progress, Subject, open_subject
from graphopt.validation import why_over

STEM = "graphopt-shared"
"""What the data file is named after."""

SAMPLES = 3
"""Random samples on which each model is compared with what was written."""


@dataclass(frozen=True)
class SharedModel:
    """One of the models.

    Attributes:
        source: where it was.
        path: of its graph now.
        bytes_before: size of its files as given.
        graph_bytes: size of its graph file now.
        weight_bytes: what it reads of the data file, each region once.
        shared_bytes: what of that another model reads too.
    """

    source: Path
    path: Path
    bytes_before: int
    graph_bytes: int
    weight_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Sharing:
    """What was stored.

    Attributes:
        models: in the order given.
        data: the data file; None where all tensors are so small that they are in the graphs.
        data_bytes: its size.
        distinct_bytes: the bytes of the tensors in it, without the gaps between them.
        bytes_before: size of all files of all models as given, each file once.
        bytes_after: size of all graphs and the data file.
        validated: each graph was loaded into onnxruntime, and compared as far as no note says
            otherwise.
        notes: what else a user should know.
    """

    models: tuple[SharedModel, ...]
    data: Path | None
    data_bytes: int
    distinct_bytes: int
    bytes_before: int
    bytes_after: int
    validated: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Given:
    """What is left of a model when its weights are written and it was let go.

    Attributes:
        path: of its file.
        proto: with stubs for the weights.
        graph_bytes: size of its graph file.
        data_files: that it read, with their sizes.
        expected: what it is run on, and what it gave; None where it is not compared.
    """

    path: Path
    proto: onnx.ModelProto
    graph_bytes: int
    data_files: Mapping[Path, int]
    expected: tuple[Feed, Recording] | None


def share(
    models: Sequence[Path], folder: Path, *, validate: bool = True, progress: Progress
) -> Sharing:
    """Write models into a folder, each under its own name, with one data file for all.

    At every moment each graph in the folder is the old one or the new one, whole; the new ones
    take their names when all are written and judged, and before that nothing else has changed.

    Args:
        models: paths of two models or more; they are not modified.
        folder: where to write; it is made where only it is missing.
        validate: load each written graph, and compare its outputs bit by bit with those of the
            model as given, as written, on random samples.
        progress: called with a few words on what goes on.

    Raises:
        ModelError: a model cannot be read, or a file cannot be written; the folder is as it was.
        CheckFailed: a written graph gives other outputs; the folder is as it was.
    """
    _check_models(models, folder)
    if validate:
        runtime.check_provider("cpu")
    graphs = [folder / path.name for path in models]
    given: list[_Given] = []
    notes: list[str] = []
    read: set[Path] = set()

    def loaded() -> Iterator[tuple[onnx.ModelProto, Mapping[str, ir.TensorProtocol]]]:
        for path in models:
            one, tensors = _load(path, validate, notes, progress)
            given.append(one)
            read.update(one.data_files)
            progress(f"writing {path}")
            yield one.proto, tensors
            # Before the next model is loaded; the parts of a model refer to each other in circles.
            del tensors
            gc.collect()

    with _folder(folder), _told(folder):
        for source in models:
            for graph in graphs:
                saving.check_target(graph, source=source)
        with FileSet(folder / STEM, graphs, keep=read) as files:
            data_bytes = files.write_data(loaded(), by_content=True)
            for one, graph in zip(given, graphs, strict=True):
                progress(f"judging {graph}")
                written = files.write_graph(graph, one.proto)
                if validate:
                    _judge(one, written)
            files.commit()
    return _sharing(given, graphs, files.data, data_bytes, validate, notes)


def _check_models(models: Sequence[Path], folder: Path) -> None:
    """Raise ModelError where there is nothing to share, or no place for it."""
    if len(models) < 2:
        raise ModelError("one model has nobody to share weights with; give two or more")
    for path in models:
        loading.check_file(path)
    named: dict[str, Path] = {}
    for path in models:
        # File names that differ in case only are one name on some systems.
        name = path.name.casefold()
        other = named.get(name)
        named[name] = path
        if other is None:
            continue
        if other.samefile(path):
            raise ModelError(f"{path} is given twice; give each model once")
        raise ModelError(
            f"{other} and {path} have the same file name, and both graphs go into {folder}; "
            "rename one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"cannot write to {folder}: it is not a folder")


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder where it is missing; what fails takes it away again."""
    missing = not path.exists()
    if missing:
        try:
            path.mkdir()
        except OSError as error:
            raise ModelError(f"cannot make the folder {path}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        if missing:
            # Whatever somebody else has put there meanwhile stays.
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(saving.why_not_written(folder, error)) from error


def _load(
    path: Path, validate: bool, notes: list[str], progress: Progress
) -> tuple[_Given, Mapping[str, ir.TensorProtocol]]:
    """A model, and its weights apart from it, which are all that keeps them in memory."""
    try:
        subject = open_subject(path, "cpu", validate, False, progress)
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise ModelError(f"{path}: {error}") from None
    progress(f"running {path}")
    expected = _expect(subject) if validate else None
    notes += [f"{path}: {note}" for note in subject.notes]
    proto, tensors = saving.for_disk(subject.source.model)
    data_files = {Path(tensor.path).resolve() for tensor in external_tensors(subject.source.model)}
    sizes = {file: file.stat().st_size for file in data_files}
    return _Given(path, proto, path.stat().st_size, sizes, expected), tensors


def _expect(subject: Subject) -> tuple[Feed, Recording] | None:
    """What the model gives as it is, as written; None where that cannot be known."""
    if subject.is_random():
        return None
    try:
        feed = subject.feed(None, SAMPLES, ())
        return feed, record(feed.run(Session(subject.given, Reference.AS_WRITTEN)))
    except (ModelError, SampleError) as error:
        subject.notes.append(f"its outputs were not compared: {error}")
        return None


def _judge(one: _Given, written: Path) -> None:
    """Raise ModelError when a written graph does not load, CheckFailed for other outputs."""
    try:
        Session(written, Reference.AS_DEPLOYED)
    except ModelError as error:
        raise ModelError(f"{one.path}: what was written of it does not load: {error}") from None
    if one.expected is None:
        return
    feed, recorded = one.expected
    (outputs,) = compare(feed.run(Session(written, Reference.AS_WRITTEN)), [recorded])
    reason = why_over(Effect.EXACT, outputs, ())
    if reason is not None:
        raise CheckFailed(f"{one.path}: what was written of it differs: {reason}")


# ------------------------------------------------------------------ the account


def _sharing(
    given: Sequence[_Given],
    graphs: Sequence[Path],
    data: Path | None,
    data_bytes: int,
    validated: bool,
    notes: Sequence[str],
) -> Sharing:
    regions = [_regions(one.proto) for one in given]
    readers = Counter(region for own in regions for region in own)
    files = {file: size for one in given for file, size in one.data_files.items()}
    models = tuple(
        SharedModel(
            source=one.path,
            path=graph,
            bytes_before=one.graph_bytes + sum(one.data_files.values()),
            graph_bytes=one.proto.ByteSize(),
            weight_bytes=_sum(own),
            shared_bytes=_sum(region for region in own if readers[region] > 1),
        )
        for one, graph, own in zip(given, graphs, regions, strict=True)
    )
    return Sharing(
        models=models,
        data=data,
        data_bytes=data_bytes,
        distinct_bytes=_sum(readers),
        bytes_before=sum(one.graph_bytes for one in given) + sum(files.values()),
        bytes_after=sum(model.graph_bytes for model in models) + data_bytes,
        validated=validated,
        notes=tuple(notes),
    )


def _regions(proto: onnx.ModelProto) -> set[tuple[int, int]]:
    """Offset and length of what a graph reads of the data file."""
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    return {(int(entry["offset"]), int(entry["length"])) for entry in entries}


def _sum(regions: Iterable[tuple[int, int]]) -> int:
    return sum(length for _, length in regions)
