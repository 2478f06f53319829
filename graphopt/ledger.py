"""What a run did: the ledger of its steps, and the result with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from graphopt import saving
from graphopt.benchmark import BenchmarkReport
from graphopt.contract import Effect, Skip
from graphopt.details import Details
from graphopt.loading import Source
from graphopt.operators import Census, census, node_count, opset_of, other_operators
from graphopt.recipes import Plan
from graphopt.runtime import Reference, Session
from graphopt.validation import OutputError

Verdict = Literal["kept", "unchanged", "rolled back", "too slow", "refused"]


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        spec: the pass in text form; the form that was judged last where it narrowed itself.
        effect: what it may do to the outputs.
        verdict: kept; unchanged (it found nothing to do); rolled back (the gate rejected it); too
            slow (it was rolled back because it did not pay); or refused (by the pass).
        reason: why it was rolled back, too slow or refused, else None.
        changes: how often each kind of rewrite was done, also when it was rolled back.
        skips: what it left alone, and why.
        nodes_before: nodes of the model; see `graphopt.operators.node_count`.
        nodes_after: the same after the step.
        bytes_before: bytes that the model takes on disk.
        bytes_after: the same after the step.
        seconds: for the pass and its gate.
        round: 1 for the first time through the passes; later rounds list only what acted.
        max_error: for a lossy pass, the budget that it was judged by.
        latency_ratio: measured latency over that of the model before, for a pass that is judged by
            it; None where nothing was measured.
        notes: what else the pass says of it.
    """

    spec: str
    effect: Effect
    verdict: Verdict
    reason: str | None
    changes: Mapping[str, int]
    skips: tuple[Skip, ...]
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    round: int
    max_error: str | None = None
    latency_ratio: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """The step changed the model and the change was kept."""
        return self.verdict == "kept"


@dataclass(frozen=True)
class Size:
    """Nodes (Constant nodes do not count), bytes on disk and default opset of a model.

    `other_nodes` are those of operators that ONNX does not define, such as onnxruntime's own.
    """

    nodes: int
    stored_bytes: int
    opset: int
    other_nodes: int


def size_of(model: ir.Model, external_data: bool | None, counts: Census | None = None) -> Size:
    """The size that a model has when it is saved; see `graphopt.saving.save`.

    Args:
        model: not modified.
        external_data: as for `save`.
        counts: the census of all its graphs, if there is one.
    """
    stored_bytes = saving.stored_bytes(model, external_data)
    return _size(model, stored_bytes, counts or census(model))


def size_as_given(source: Source) -> Size:
    """The size of a model as it was given."""
    return _size(source.model, source.stored_bytes, census(source.model))


def _size(model: ir.Model, stored_bytes: int, counts: Census) -> Size:
    other_nodes = other_operators(model, counts).total()
    return Size(node_count(model, counts), stored_bytes, opset_of(model), other_nodes)


VERSION_KEY = "graphopt.version"
PIPELINE_KEY = "graphopt.pipeline"
INPUT_KEY = "graphopt.input_sha256"
INPUT_GRAPH_KEY = "graphopt.input_graph_sha256"
"""Keys in a model's `metadata_props` that say where it comes from."""


def stamp(model: ir.Model, plan: Plan, source: Source) -> None:
    """Write into the model where it comes from.

    Where the hash of the input takes reading external data, `Run.save` adds it: the data is read
    there anyway. Where it is not, because the result goes on using it, the hash of the graph file
    has to do.
    """
    for key in (INPUT_KEY, INPUT_GRAPH_KEY):
        model.metadata_props.pop(key, None)
    model.metadata_props[VERSION_KEY] = version("graphopt")
    model.metadata_props[PIPELINE_KEY] = plan.recipe or str(plan)
    if not source.has_external_data():
        model.metadata_props[INPUT_KEY] = source.sha256()


@dataclass(frozen=True)
class Run:
    """The result of `graphopt.optimize`: the model and the evidence.

    Attributes:
        model: the optimized model, with its provenance in `metadata_props` (see `stamp`).
        plan: what was asked for.
        steps: the ledger.
        original: size of the model as given.
        optimized: size of the result.
        numerics: errors per output against the original, by reference ("as written", "as
            deployed"); empty when outputs were not compared.
        benchmark: latency, load time and memory of both; None when not asked for.
        notes: what else a user should know.
        failures: requirements that do not hold, and a lossy plan that kept nothing.
        provider: "cpu" or "cuda".
        validated: the model was run; False when the user asked not to.
        source: the input.
        details: sizes and errors by layer, and kernels; None when not asked for.
    """

    model: ir.Model
    plan: Plan
    steps: tuple[Step, ...]
    original: Size
    optimized: Size
    numerics: Mapping[str, tuple[OutputError, ...]]
    benchmark: BenchmarkReport | None
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    provider: str
    validated: bool
    source: Source
    details: Details | None = None

    @property
    def input_sha256(self) -> str:
        """Hash of the input; see `Source.sha256`."""
        return self.source.sha256()

    def save(
        self, path: str | Path, *, external_data: bool | None = None, reuse_data: bool = False
    ) -> Run:
        """Write the optimized model; see `graphopt.saving.save`.

        By default it has external data if the input had, or if it would not fit into one file. The
        written file is loaded into onnxruntime before it replaces what was there, unless the
        run was told not to validate.

        Args:
            path: of the graph file.
            external_data: see `graphopt.saving.save`.
            reuse_data: leave weights that did not change in the data files of the input, which must
                lie in the folder of the path and stay there.

        Returns:
            The run, its `optimized.stored_bytes` replaced by what is on the disk now: the bytes of
            the graph and of the weights that it reads, wherever they are.

        Raises:
            ModelError: the path is that of the input, cannot be written, or the written file does
                not load; or there is no data to reuse, or it is in another folder.
        """
        saving.check_target(Path(path), source=self.source.path)
        given = {Path(tensor.path) for tensor in self.source.external_tensors}
        if reuse_data:
            saving.check_has_data(given)
            saving.check_reuse(Path(path), given)
        if external_data is None:
            external_data = self.source.external_data()
        written_bytes = saving.save(
            self.model,
            path,
            external_data=external_data,
            reuse_data=reuse_data,
            keep=given,
            metadata=lambda: (
                {INPUT_GRAPH_KEY: self.source.graph_sha256}
                if reuse_data
                else {INPUT_KEY: self.input_sha256}
            ),
            verify=self._load if self.validated else None,
        )
        optimized = replace(self.optimized, stored_bytes=written_bytes)
        notes = self._reuse_notes() if reuse_data else ()
        return replace(self, optimized=optimized, notes=(*self.notes, *notes))

    def _repr_html_(self) -> str:
        """The ledger and what was measured as tables, for notebooks."""
        from graphopt import html_sections

        return html_sections.run(self)

    def _reuse_notes(self) -> tuple[str, ...]:
        reused = saving.reused_bytes(self.model)
        if not reused:
            return ("every weight was rewritten: the result reads no data file of the input",)
        return tuple(
            f"{count:,} bytes of the result are weights in {file.name}, which the input and the "
            "result both read now: keep it where it is"
            for file, count in reused.items()
        )

    def _load(self, path: Path) -> None:
        Session(path, Reference.AS_DEPLOYED, provider=self.provider)
