"""A model on which passes are tried: with samples to fit by, and others to judge by.

A trial lies in a folder: the model as it was given, the model to begin with, and the samples. So
another process, or another machine, can open the same one and comes to the same results.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import loading, runtime, saving
from graphopt.agreement import Scale, judge_by, learn_scales
from graphopt.contract import Context
from graphopt.errors import SearchStopped
from graphopt.gate import Gate, interface_of
from graphopt.ledger import Step, size_of
from graphopt.memo import Memo
from graphopt.observe import Observer, content_key
from graphopt.pipeline import Pipeline
from graphopt.recipes import plan
from graphopt.recording import Feed
from graphopt.registry import PASSES_GROUP, versions
from graphopt.runtime import Session
from graphopt.sample_files import write_npz
from graphopt.samples import Samples, read_samples
from graphopt.scores import Judge, Scores
from graphopt.signature import signature
from graphopt.treatments import TREATMENTS_GROUP
from graphopt.variations import mirrored

ORIGINAL, BASE, SETUP, FITTED, JUDGED, MEMO = (
    "original.onnx",
    "base.onnx",
    "setup.json",
    "fitted",
    "judged",
    "memo",
)
"""Names in the folder of a trial."""

GLANCED_MAXIMUM = 128
"""Samples by which single layers are compared."""


@dataclass(frozen=True)
class Setup:
    """What else a trial is made of.

    Attributes:
        original: where the model as it was given lies; None for in the folder.
        provider: "cpu" or "cuda".
        state: pairs of output and input that carry state.
        external_data: see `graphopt.saving.save`.
        scales: how the losses of each output are measured; see `graphopt.agreement`.
        glanced: by so many samples single layers are compared.
        key: a hash of all that results depend on.
    """

    original: str | None
    provider: str
    state: tuple[tuple[str, str], ...]
    external_data: bool | None
    scales: Mapping[str, Scale]
    glanced: int
    key: str


@dataclass(frozen=True)
class Expected:
    """What a model is expected to do to samples that were not seen.

    Attributes:
        loss: of agreement with the original, in points.
        divergence: of its outputs, and one standard error more: a few samples, on which a model
            goes astray, may be most of it, and may be missing among those that were seen.
    """

    loss: float
    divergence: float


@dataclass
class Trial:
    """A model on which passes are tried.

    Attributes:
        setup: what it is made of.
        base: the model to begin with; not modified.
        context: for the passes: the original, and the samples to fit by.
        original: a session of it.
        fitted: the samples to fit by.
        judged: others.
    """

    setup: Setup
    base: ir.Model
    context: Context
    original: Session
    fitted: Feed
    judged: Feed
    _known: dict[str, Scores] = field(default_factory=dict)

    @cached_property
    def judge(self) -> Judge:
        """Gives the agreement of a model with the original on the samples to judge by.

        On images also as they are seen in a mirror.
        """
        return self._judge_by(_with_mirrored(self.judged))

    @cached_property
    def glance(self) -> Judge:
        """The same on a few of them, for what is tried on many layers."""
        return self._judge_by(
            replace(self.judged, samples=self.judged.samples.first(self.setup.glanced))
        )

    @cached_property
    def recall(self) -> Judge:
        """The same on the samples to fit by."""
        return self._judge_by(self.fitted)

    def _judge_by(self, feed: Feed) -> Judge:
        return judge_by(self.setup.scales, self.original, feed)

    def rewritten(self, passes: str, loads: bool = False) -> tuple[ir.Model, tuple[Step, ...]]:
        """What passes make of the base, and the ledger.

        They are judged on structure alone: what comes out is what they did, however bad, and never
        what milder ones would have done.

        Args:
            passes: in text form; may be none.
            loads: each step is loaded into onnxruntime, and rolled back where that fails.
        """
        model = self.base.clone()
        pipeline = Pipeline(
            model,
            size_of(model, self.setup.external_data),
            self.setup.external_data,
            Gate(interface_of(model), model, None, loads, provider=self.setup.provider),
            self.context,
            self.base.clone,
            narrows=False,
        )
        if passes:
            pipeline.run(plan(None, passes, None))
        return pipeline.model, tuple(pipeline.steps)

    def scores(self, model: ir.Model) -> Scores:
        """The agreement of a model with the original.

        Raises:
            GraphoptError: onnxruntime does not run it.
        """
        return self.judge(self._session(model))

    def expected(self, model: ir.Model, unseen: Scores, glanced: Scores) -> Expected:
        """What a model is expected to do to other samples, as well as all that there are can tell.

        On samples that it was fitted by it loses less than on others: by how much less, the
        divergences on both say, which vary little. So these samples count, too.

        Args:
            model: not modified.
            unseen: its scores.
            glanced: its scores on a few samples.

        Raises:
            GraphoptError: onnxruntime does not run it.
        """
        seen = self.recall(self._session(model))
        ratio = 1.0
        if seen.divergence and glanced.divergence and math.isfinite(glanced.divergence):
            ratio = max(glanced.divergence / seen.divergence, 1.0)
        losses = 100.0 - unseen.value, ratio * (100.0 - seen.value)
        judged, fitted = (len(one.samples.sequences) for one in (self.judged, self.fitted))
        loss = (judged * losses[0] + fitted * losses[1]) / (judged + fitted)
        return Expected(loss, _upper(unseen.divergences, seen.divergences, ratio))

    def glanced(self, model: ir.Model) -> Scores:
        """The same, on a few samples.

        Raises:
            GraphoptError: onnxruntime does not run it.
        """
        return self.glance(self._session(model))

    @property
    def base_glanced(self) -> Scores:
        """That of the base."""
        if "base" not in self._known:
            self._known["base"] = self.glanced(self.base)
        return self._known["base"]

    def _session(self, model: ir.Model) -> Session:
        return Session(model, provider=self.setup.provider, threads=1)

    def stored_bytes(self, model: ir.Model) -> int:
        """What a model takes on disk."""
        return saving.stored_bytes(model, self.setup.external_data)


def write_trial(
    folder: Path,
    original: ir.Model,
    given: ir.Model | Path,
    base: ir.Model,
    fitted: Feed,
    judged: Feed,
    provider: str,
    external_data: bool | None,
    scales: Mapping[str, Scale],
    glanced: int = GLANCED_MAXIMUM,
) -> Path:
    """Lay a trial down in a folder.

    Args:
        folder: there, and empty.
        original: the model as it was given.
        given: its file, where there is one, to which the trial then refers.
        base: the model to begin with.
        fitted: samples for the passes.
        judged: samples to judge by.
        provider: "cpu" or "cuda".
        external_data: see `graphopt.saving.save`.
        scales: see `scales_of`.
        glanced: by so many samples single layers are compared.

    Returns:
        The folder.

    Raises:
        SearchStopped: it is full, or cannot be written.
    """
    path = given.absolute() if isinstance(given, Path) else None
    try:
        if path is None:
            saving.save(original, folder / ORIGINAL, external_data=external_data)
        saving.save(base, folder / BASE, external_data=external_data)
        for feed, name in ((fitted, FITTED), (judged, JUDGED)):
            _write_samples(feed, folder / name)
    except OSError as error:
        raise SearchStopped(
            f"samples cannot be kept in {folder} ({error.strerror}); make room there, or set "
            "TMPDIR to another folder"
        ) from error
    setup = {
        "provider": provider,
        "state": fitted.state,
        "external_data": external_data,
        "scales": {name: asdict(one) for name, one in sorted(scales.items())},
        "glanced": glanced,
    }
    place = None if path is None else str(path)
    key = _key((original, base), (fitted, judged), setup)
    (folder / SETUP).write_text(json.dumps({**setup, "original": place, "key": key}))
    return folder


def _key(models: Sequence[ir.Model], feeds: Sequence[Feed], setup: Mapping[str, object]) -> str:
    """A hash of all that results depend on: not of where things lie."""
    parts = (
        *versions(PASSES_GROUP),
        *versions(TREATMENTS_GROUP),
        runtime.version() or "",
        *map(content_key, models),
        *(digest for feed in feeds for digest in ("|", *feed.samples.digests)),
        json.dumps(setup),
    )
    return sha256("\0".join(parts).encode()).hexdigest()


def scales_of(
    original: ir.Model,
    given: ir.Model | Path,
    judged: Feed,
    provider: str,
    sureness: float | None = None,
) -> dict[str, Scale]:
    """How the losses of each output of the original are measured.

    Args:
        original: the model as it was given.
        given: its file, where there is one.
        judged: samples to judge by.
        provider: "cpu" or "cuda".
        sureness: how sure the original is taken to be; see `graphopt.agreement`.

    Raises:
        GraphoptError: onnxruntime does not run the original on the samples.
    """
    session = Session(given, provider=provider, threads=1)
    carried = {name for name, _ in judged.state}
    return learn_scales(original, _with_mirrored(judged).run(session), carried, sureness)


def _with_mirrored(feed: Feed) -> Feed:
    """Images also as they are seen in a mirror, where they carry no state."""
    seen = None if feed.state else mirrored(feed.samples)
    return feed if seen is None else replace(feed, samples=seen)


def _write_samples(feed: Feed, folder: Path) -> None:
    """One file for each sample; where state is carried, one folder for each sequence."""
    folder.mkdir()
    samples = feed.samples
    width = len(str(len(samples)))
    for number, sequence in enumerate(samples.sequences):
        into = folder / f"{number:0{width}d}" if feed.state else folder
        into.mkdir(exist_ok=True)
        for index in sequence:
            write_npz(into / f"{index:0{width}d}.npz", samples.loaders[index]())


def read_setup(folder: Path) -> Setup:
    """What a trial in a folder is made of.

    Raises:
        SearchStopped: the folder is gone.
    """
    try:
        content = json.loads((folder / SETUP).read_text())
    except OSError as error:
        raise SearchStopped(
            f"the folder of a trial, {folder}, cannot be read ({error.strerror}); is something "
            "clearing the folder for temporary files (TMPDIR)?"
        ) from error
    content["state"] = tuple((a, b) for a, b in content["state"])
    content["scales"] = {name: Scale(**one) for name, one in content["scales"].items()}
    return Setup(**content)


def open_trial(folder: Path, progress: Callable[[str], None] = lambda _: None) -> Trial:
    """The trial that lies in a folder.

    Raises:
        GraphoptError: onnxruntime does not run the original on the samples.
    """
    setup = read_setup(folder)
    original_path = Path(setup.original) if setup.original else folder / ORIGINAL
    original = loading.load(original_path, drop_training_info=True)
    base = loading.load(folder / BASE)
    inputs = signature(original)

    def feed(name: str) -> Feed:
        read = read_samples(folder / name, inputs, setup.state)
        return Feed(read, inputs, setup.state)

    fitted, judged = feed(FITTED), feed(JUDGED)
    context = Context(
        read_original=lambda: original,
        samples=fitted.samples,
        provider=setup.provider,
        progress=progress,
        observer=Observer(fitted, setup.provider, threads=1),
        memo=Memo(folder / MEMO),
    )
    session = Session(original_path, provider=setup.provider, threads=1)
    return Trial(setup, base, context, session, fitted, judged)


def _upper(unseen: np.ndarray | None, seen: np.ndarray | None, ratio: float) -> float:
    """The mean of divergences, those that were seen times the ratio, and its standard error."""
    if unseen is None or seen is None:
        return math.inf
    found = np.concatenate([unseen, ratio * seen])
    if not np.isfinite(found).all():
        return math.inf
    return float(found.mean() + found.std() / math.sqrt(len(found)))


def packed(folder: Path) -> bytes:
    """All of a trial as one file, for a machine that does not share this one's disk."""
    setup, stream = read_setup(folder), io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w") as archive,
        tempfile.TemporaryDirectory(prefix="graphopt-") as scratch,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != SETUP and path.parent.name != MEMO:
                archive.write(path, path.relative_to(folder))
        if setup.original is not None:
            saving.save(loading.load(setup.original), Path(scratch) / ORIGINAL)
            for path in sorted(Path(scratch).iterdir()):
                archive.write(path, path.name)
        content = json.loads((folder / SETUP).read_text())
        archive.writestr(SETUP, json.dumps({**content, "original": None}))
    return stream.getvalue()


def unpacked(content: bytes, folder: Path) -> Path:
    """Lay a trial down that was packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def tried_on(samples: Samples, sequences: Sequence[int], feed: Feed) -> Feed:
    """A feed of some sequences of samples."""
    return Feed(samples.select(sequences), feed.inputs, feed.state)
