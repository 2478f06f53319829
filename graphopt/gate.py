"""The gate: whether a rewritten model may be kept.

After each pass the checker accepts the model, onnxruntime loads it, the interface holds, and the
outputs on the gate samples agree as far as the effect of the pass demands. EXACT and ROUNDING are
judged as written against the model before the pass, and against the original, so that rounding
does not add up from pass to pass. LOSSY is judged as deployed, against the original. Where models
round activations to codes, two that are equal may differ at ties; see `graphopt.ties`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphopt.contract import Effect, Pass
from graphopt.errors import ModelError, SampleError
from graphopt.operators import all_graphs, nodes_within, other_operators
from graphopt.recording import Feed, Recording, compare, record
from graphopt.runtime import Reference, Session
from graphopt.skeleton import type_text, why_invalid
from graphopt.ties import Rounded, rounded_of, why_not_ties
from graphopt.validation import ROUNDING_LIMITS, Budget, OutputError, why_over

HALVES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}

CONVERTED = {"BFLOAT16", "FLOAT", "FLOAT16"}
"""Types of inputs and outputs that a pass may exchange where the user asks for it."""

UNKNOWN = "None"
"""What is said of a type that a file does not state."""

HALVES_NOTE = (
    "half precision on the CPU: onnxruntime computes in float32 and rounds between nodes, so exact "
    "passes are judged within rounding"
)

LOSSLESS_SAMPLES = 8
"""EXACT and ROUNDING are judged on at most so many samples; more would find nothing else."""


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs as a caller sees them: name, type and dimensions each."""

    inputs: tuple[tuple[str, str, tuple[int | str | None, ...] | None], ...]
    outputs: tuple[tuple[str, str, tuple[int | str | None, ...] | None], ...]


def interface_of(model: ir.Model) -> Interface:
    """The interface of a model; inputs that have an initializer do not belong to it."""
    required = [v for v in model.graph.inputs if not v.is_initializer()]
    return Interface(tuple(map(_face, required)), tuple(map(_face, model.graph.outputs)))


def _face(value: ir.Value) -> tuple[str, str, tuple[int | str | None, ...] | None]:
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return value.name or "", type_text(value), dims


def computed_in_half(model: ir.Model) -> dict[str, str]:
    """The outputs that depend on values of half precision, by name, and the coarsest of those.

    A float32 output that was computed in float16 differs by what rounding costs in float16.
    """
    coarse: dict[ir.Value, str] = {}
    for node in model.graph:
        inner = list(nodes_within(node))
        kinds = {coarse[v] for n in inner for v in n.inputs if v is not None and v in coarse}
        kinds |= {HALVES[o.dtype] for n in inner for o in n.outputs if o.dtype in HALVES}
        if kinds:
            coarse.update(dict.fromkeys(node.outputs, max(kinds, key=ROUNDING_LIMITS.__getitem__)))
    return {o.name or "": coarse[o] for o in model.graph.outputs if o in coarse}


def coarsest(*each: Mapping[str, str]) -> dict[str, str]:
    """Of several models, the coarsest type in which each output is computed (`computed_in_half`).

    What one of two models rounds to float16 differs by that, whichever of them it is.
    """
    joined: dict[str, str] = {}
    for kinds in each:
        for name, kind in kinds.items():
            joined[name] = max(kind, joined.get(name, kind), key=ROUNDING_LIMITS.__getitem__)
    return joined


def why_other_interface(before: Interface, after: Interface, converted: bool = False) -> str | None:
    """What differs for a caller, or None.

    A dimension or type of an output that was unknown may have become known.

    Args:
        before: the interface as it was.
        after: as it is now.
        converted: one floating-point type may have taken the place of another.
    """
    pairs = (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs))
    for kind, olds, news in pairs:
        if [o[0] for o in olds] != [n[0] for n in news]:
            was, now = ", ".join(o[0] for o in olds), ", ".join(n[0] for n in news)
            return f"the {kind}s are now {now or 'none'}; they were {was or 'none'}"
        for (name, old_type, old_dims), (_, new_type, new_dims) in zip(olds, news, strict=True):
            refined = kind == "output" and old_type == UNKNOWN
            exchanged = converted and {old_type, new_type} <= CONVERTED
            if old_type != new_type and not refined and not exchanged:
                return f"{kind} {name!r} is now {new_type}; it was {old_type}"
            if not _same_dims(old_dims, new_dims, kind == "output"):
                return f"{kind} {name!r} now has shape {new_dims}; it was {old_dims}"
    return None


def _same_dims(
    old: tuple[int | str | None, ...] | None, new: tuple[int | str | None, ...] | None, refine: bool
) -> bool:
    if old is None or new is None:
        return old == new or (refine and old is None)
    if len(old) != len(new):
        return False
    return all(o == n or (refine and not isinstance(o, int)) for o, n in zip(old, new, strict=True))


@dataclass
class Gate:
    """Judges candidates against the model before and the original.

    Attributes:
        interface: of the original, inputs with defaults made constant.
        given: the original, as onnxruntime loads it.
        feed: the gate samples; None judges on structure alone (nothing is run).
        loads: candidates are loaded into onnxruntime.
        checks: the checker is asked; False where it rejects the original itself.
        provider: where candidates run.
        allowed_operators: those outside the standard that a candidate may hold; None allows all.
        budgets: for LOSSY passes; empty leaves each pass its own default.
        lossless_samples: EXACT and ROUNDING are judged on at most so many samples.
        original: outputs of the original under each reference, recorded when first needed.
        before: outputs of the current model, as written.
        lossless_so_far: no lossy pass was kept.
        written: the reference by which EXACT and ROUNDING are judged; as deployed only where the
            original does not run as written.
        notes: what the user should know of it.
    """

    interface: Interface
    given: ir.Model | Path
    feed: Feed | None
    loads: bool = True
    checks: bool = True
    provider: str = "cpu"
    allowed_operators: Container[str] | None = None
    budgets: tuple[Budget, ...] = ()
    lossless_samples: int = LOSSLESS_SAMPLES
    original: dict[Reference, Recording] = field(default_factory=dict)
    before: Recording | None = None
    lossless_so_far: bool = True
    written: Reference = Reference.AS_WRITTEN
    notes: list[str] = field(default_factory=list)
    _halves_given: Mapping[str, str] = field(default_factory=dict)
    _halves_before: Mapping[str, str] = field(default_factory=dict)
    _rounded_given: Rounded | None = None
    _rounded_before: Rounded | None = None
    _judged: tuple[Recording, bool, Mapping[str, str], Rounded | None] | None = None
    _converted: Interface | None = None

    def __post_init__(self) -> None:
        if self.feed is None:
            return
        try:
            self.before = self._original(Reference.AS_WRITTEN)
        except (ModelError, SampleError) as error:
            # Seen of onnxruntime 1.32: with optimizations off it frees too early what only a
            # branch reads.
            self.written = Reference.AS_DEPLOYED
            self.notes.append(
                f"onnxruntime does not run the model as written ({error}): passes are judged as "
                "deployed, within rounding"
            )
            self.before = self._original(Reference.AS_DEPLOYED)

    def _original(self, reference: Reference) -> Recording:
        if reference not in self.original:
            assert self.feed is not None
            session = self._session(self.given, reference)
            feed = self._lossless(self.feed) if reference is Reference.AS_WRITTEN else self.feed
            self.original[reference] = record(feed.run(session))
        return self.original[reference]

    def _lossless(self, feed: Feed) -> Feed:
        return Feed(feed.samples.first(self.lossless_samples), feed.inputs, feed.state)

    def _session(self, model: ir.Model | Path, reference: Reference) -> Session:
        return Session(model, reference, provider=self.provider)

    def why_rejected(self, candidate: ir.Model, by: Pass) -> str | None:
        """Why the candidate may not be kept, or None; then `accept` may follow.

        Args:
            candidate: the rewritten model.
            by: the pass that rewrote it.
        """
        self._judged = None
        self._converted = interface_of(candidate) if by.converts_interface else None
        reason = self.why_malformed(candidate, by.converts_interface)
        if reason is not None or not self.loads:
            return reason
        try:
            written = self._session(candidate, self.written)
            deployed = self._session(candidate, Reference.AS_DEPLOYED)
        except ModelError as error:
            return f"onnxruntime does not load it: {error}"
        if self.feed is None:
            return None
        try:
            if by.effect is Effect.LOSSY:
                return self._why_over_budget(written, deployed, candidate, by)
            return self._why_not_equal(written, candidate, self.claim(candidate, by))
        except SampleError as error:
            return f"it does not run: {error}"

    def accept(self) -> None:
        """Take the candidate that was judged last for the model before the next pass."""
        if self._judged is not None:
            self.before, self.lossless_so_far, self._halves_before, self._rounded_before = (
                self._judged
            )
            self._judged = None
        self.interface = self._converted or self.interface

    def start_from(self, model: ir.Model) -> None:
        """Remember which outputs the original computes in half precision, and what it rounds.

        Args:
            model: before any pass, with types inferred.
        """
        self._halves_given = self._halves_before = computed_in_half(model)
        if self.before is not None:
            self._rounded_given = self._rounded_before = self._rounded(model, self.before)

    def check_read(self, model: ir.Model, notes: Sequence[str]) -> None:
        """Raise ModelError when what was read computes something else than the file.

        Only a model that is not valid ONNX can be read in two ways.

        Args:
            model: before any pass.
            notes: on what was mended in reading.
        """
        if self.feed is None:
            return
        session = self._session(model, self.written)
        reason = self._why_not_equal(session, model, Effect.ROUNDING)
        self.accept()
        if reason is not None:
            raise ModelError(
                f"the model cannot be read for certain ({'; '.join(notes)}): what onnxruntime "
                f"makes of the file differs, {reason}"
            )

    def claim(self, candidate: ir.Model, by: Pass) -> Effect:
        """What is demanded of a lossless pass: what it claims, where onnxruntime lets it show."""
        if self.written is Reference.AS_DEPLOYED:
            return Effect.ROUNDING
        if by.effect is Effect.EXACT and self._rounds_between_nodes(candidate):
            if HALVES_NOTE not in self.notes:
                self.notes.append(HALVES_NOTE)
            return Effect.ROUNDING
        return by.effect

    def _rounds_between_nodes(self, model: ir.Model) -> bool:
        """Half precision on the CPU, which onnxruntime computes in float32.

        It rounds where a value passes between nodes, also as written, so a node that passes its
        input on cannot be removed without a trace.
        """
        return self.provider == "cpu" and any(
            value.dtype in HALVES
            for graph in all_graphs(model)
            for node in graph
            for value in node.outputs
        )

    def budgets_for(self, by: Pass) -> tuple[Budget, ...]:
        """The budgets that a lossy pass is judged by: the user's, else the pass's own default."""
        return self.budgets or (Budget(by.error_budget),)

    def budget_text(self, by: Pass) -> str:
        """The same, as text."""
        return " ".join(map(str, self.budgets_for(by)))

    def why_malformed(self, candidate: ir.Model, converted: bool = False) -> str | None:
        """What the checker has against the candidate, or what changed for a caller; or None.

        Args:
            candidate: the rewritten model.
            converted: one floating-point type may take the place of another in the interface.
        """
        invalid = why_invalid(candidate) if self.checks else None
        if invalid is not None:
            return f"the checker rejects it: {invalid}"
        if self.allowed_operators is not None:
            others = [o for o in other_operators(candidate) if o not in self.allowed_operators]
            if others:
                return f"it writes {', '.join(sorted(others))}, and only standard operators may be"
        return why_other_interface(self.interface, interface_of(candidate), converted)

    def _why_not_equal(self, written: Session, model: ir.Model, effect: Effect) -> str | None:
        assert self.feed is not None and self.before is not None
        halves = computed_in_half(model)
        after = record(self._lossless(self.feed).run(written))
        references = [self.before]
        if self.lossless_so_far:
            references.append(self._original(self.written))
        step, *total = compare(iter(after), references)
        reason = why_over(effect, step, computed_in=coarsest(halves, self._halves_before))
        for outputs in total if reason is None else ():
            computed_in = coarsest(halves, self._halves_given)
            reason = why_over(Effect.ROUNDING, outputs, computed_in=computed_in)
            reason = reason and f"{reason}, counted from the original"
        rounded = self._rounded(model, after)
        if reason is not None and rounded is not None:
            reason = self._why_not_ties(rounded, effect, halves, reason)
        if reason is None:
            self._judged = after, self.lossless_so_far, halves, rounded
        return reason

    def _rounded(self, model: ir.Model, outputs: Recording) -> Rounded | None:
        """The model, if it rounds activations, with what it gives as written."""
        feed = self.feed
        if feed is None:
            return None
        return rounded_of(
            model,
            outputs,
            lambda one: record(self._lossless(feed).run(self._session(one, self.written))),
        )

    def _why_not_ties(
        self, rounded: Rounded, effect: Effect, halves: Mapping[str, str], reason: str
    ) -> str | None:
        """Why the outputs differ by more than ties explain; by default the reason that is given."""
        before, given = self._rounded_before, self._rounded_given
        if before is None:
            return reason
        found = why_not_ties(before, rounded, effect, coarsest(halves, self._halves_before))
        if found is None and self.lossless_so_far and given is not None:
            computed_in = coarsest(halves, self._halves_given)
            found = why_not_ties(given, rounded, Effect.ROUNDING, computed_in)
            found = found and f"{found}, counted from the original"
        return found

    def _why_over_budget(
        self, written: Session, deployed: Session, candidate: ir.Model, by: Pass
    ) -> str | None:
        assert self.feed is not None
        (outputs,) = compare(self.feed.run(deployed), [self._original(Reference.AS_DEPLOYED)])
        reason = why_over(Effect.LOSSY, outputs, self.budgets_for(by))
        if reason is None:
            after = record(self._lossless(self.feed).run(written))
            rounded = self._rounded(candidate, after)
            self._judged = after, False, computed_in_half(candidate), rounded
        return reason

    def numerics(self, model: ir.Model) -> dict[str, tuple[OutputError, ...]]:
        """The errors of a model against the original, under both references.

        Raises:
            ModelError: onnxruntime does not load it.
        """
        if self.feed is None:
            return {}
        found = {}
        feeds = {self.written: self._lossless(self.feed), Reference.AS_DEPLOYED: self.feed}
        for reference, feed in feeds.items():
            session = self._session(model, reference)
            recordings: Sequence[Recording] = [self._original(reference)]
            (found[reference.value],) = compare(feed.run(session), recordings)
        return found
