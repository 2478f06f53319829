"""The search for the best model within a drop: trunks first, then layers, by what was probed.

What is done to all of a model (trunks) is built and judged. Of those within the drop, the best is
gone on with: its layers are probed, each alone with each option, which gives the whole front of
what they can have together (`graphopt.growth`). Few points of it are built, and what is seen of
them says where the limit is. Layers that do more together than alone are found by leaving each out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from graphopt import loading
from graphopt.agreement import Scale
from graphopt.allocation import front
from graphopt.building import Build, Built, build
from graphopt.candidates import (
    Candidate,
    Predicted,
    as_fast,
    best_first,
    cost_of,
    fastest_if_certain,
)
from graphopt.errors import GraphoptError, SearchStopped
from graphopt.executors import Workers
from graphopt.gauge import Gauge
from graphopt.growth import Growth
from graphopt.pace import glanced_samples
from graphopt.parting import Parts
from graphopt.probe_cache import ProbeCache
from graphopt.probing import Probe, probe
from graphopt.scenarios import Scenario, Trunk
from graphopt.subject import Subject
from graphopt.treatments import Layer, treatment
from graphopt.trial import scales_of, write_trial

MARGIN = 0.9
"""Of the drop that is allowed: what is aimed at."""

ENOUGH = 0.9
"""A candidate that takes so much of the drop allowed is near enough to the limit."""

ROUNDS = 4
"""How often points of the front are built, and the next ones chosen by what was seen."""

EVALUATIONS, EVALUATIONS_MAXIMUM = 14, 20
"""So many candidates are judged at most; and where some are rejected in the end, no more are built
after so many, looks at the samples kept back included. A user's metric may take minutes for one."""

TRUNKS_SHARE, SECOND_SHARE, PROBES_SHARE, ROUNDS_SHARE = 0.4, 0.6, 0.6, 0.75
"""Of the time: after it no further trunk is built, no second one gone on with, nothing more is
probed, and no further round of points is begun."""

BITS, BITS_MAXIMUM, ROOM_MINIMUM = 4.0, 8.0, 1e-3
"""What numbers of weights take in the end if all of the drop is theirs, and the most; and the share
of the drop that is left at least."""

NEARLY = 1.3
"""A trunk that promises so many times the bytes of the best may be the best all the same."""

SURPRISE = 1.25
"""Layers together that diverge by so many times the sum of each alone have offenders among them."""

OFFENDERS = 4
"""So many are looked for among those that are expected to diverge most."""


@dataclass
class Search:
    """A search for one model.

    Attributes:
        subject: the model as it was given.
        base: what lossless passes made of it.
        scenario: what is tried, and what is made least.
        limit: the drop that is allowed, in the unit of the metric.
        parts: of the samples.
        gauge: estimates drops.
        folder: for trials.
        models: folder in which models are kept until the search ends.
        workers: that build and probe.
        cache: of what was found before.
        latency: of the model in a file, over that of the original.
        seconds: that the search may take.
        sample_s: what the original takes for a sample.
        progress: called with a few words.
        sureness: how sure the original is taken to be; see `graphopt.agreement`.
        candidates: all that were built.
        predicted: points of the front that were not.
        probes: of the trunks that were gone on with, by their names.
        notes: what a user should know.
    """

    subject: Subject
    base: ir.Model
    scenario: Scenario
    limit: float
    parts: Parts
    gauge: Gauge
    folder: Path
    models: Path
    workers: Workers
    cache: ProbeCache
    latency: Callable[[Path], float]
    seconds: float
    sample_s: float
    progress: Callable[[str], None]
    sureness: float | None = None
    started_s: float = field(default_factory=time.monotonic)
    candidates: list[Candidate] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _trials: dict[tuple[str, bool], Path] = field(default_factory=dict)
    _growths: dict[str, Growth] = field(default_factory=dict)
    _rejected: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Build trunks, and points of the best of them.

        Raises:
            GraphoptError: a worker was lost, or a model does not run.
        """
        self._trunks()
        self.next_best()
        # What a trunk promises is a guess: where there is time, the next one is seen, too.
        rest = [one for one in self._promising() if one.trunk not in self._growths]
        if rest and self._evaluations_left and not self._is_late(SECOND_SHARE):
            self._grow(rest[0])

    @property
    def within(self) -> list[Candidate]:
        """All candidates within the drop, as far as is known; the best first."""
        within = [one for one in self.candidates if one.gauged.drop <= self.limit]
        left = [one for one in within if one.passes not in self._rejected]
        return best_first(left, self.scenario.objective)

    def next_best(self) -> Candidate | None:
        """The best candidate, but for those that were rejected; None where none is left.

        Where all that was built of layers was rejected, the next trunk is gone on with.
        """
        left = self.within
        trunks = [one for one in left if not one.chosen and one.trunk not in self._growths]
        has_time = self._evaluations_left and not self._is_late(ROUNDS_SHARE)
        if trunks and has_time and not any(one.chosen for one in left):
            self._grow(self._best_trunk(trunks))
            left = self.within
        return left[0] if left else None

    def reject(self, candidate: Candidate, drop: float) -> None:
        """Take a candidate as lost; of its trunk, milder choices of layers are looked for.

        Args:
            candidate: that samples which the search never saw speak against.
            drop: what it is found to lose.
        """
        self._rejected.add(candidate.passes)
        growth = self._growths.get(candidate.trunk)
        if growth is None or not candidate.chosen:
            return
        trunk = self.trunk_of(candidate)
        growth.reject(candidate.chosen, drop - trunk.gauged.drop)
        self._compare(trunk, growth)
        while self._evaluations_left and not self._is_late(ROUNDS_SHARE):
            found = self._round(trunk, growth, [min(growth.aims(self._room(trunk)))])
            if not found or any(one.chosen for one in self.within):
                break

    # -------------------------------------------------------------- trunks

    def _trunks(self) -> None:
        """Build trunks; a bolder one only where the milder is within the drop."""
        done: dict[str, Candidate | None] = {}
        running: dict[str, Build] = {}
        folder = self.trial(self.base, "base")
        while True:
            for one in self._ready(done, running):
                running[one.name] = build(folder, one.passes, self.models, self.workers, self.cache)
            if not running:
                break
            if self._is_late(TRUNKS_SHARE) and any(done.values()):
                self.notes.append(f"no time for {', '.join(running)}: more --budget-minutes help")
                break
            name = next((name for name, one in running.items() if one.is_done()), None)
            if name is not None:
                done[name] = self._judged_trunk(name, running.pop(name))
            else:
                time.sleep(0.02)
        self.candidates = [c for one in self.scenario.trunks if (c := done.get(one.name))]

    def _ready(self, done: dict[str, Candidate | None], running: dict[str, Build]) -> list[Trunk]:
        found = []
        for one in self.scenario.trunks:
            if one.name in done or one.name in running or self._is_late(TRUNKS_SHARE):
                continue
            if len(self.parts.fitted.samples) < one.least_samples:
                continue
            milder, bolder = (self._is_within(done, name) for name in (one.after, one.unless))
            if (one.after is None or milder) and (one.unless is None or bolder is False):
                found.append(one)
        return found

    def _is_within(self, done: dict[str, Candidate | None], name: str | None) -> bool | None:
        """Whether a trunk is within the drop; None where that is not known yet."""
        if name is None or name not in done:
            return None
        found = done[name]
        return found is not None and found.gauged.drop <= self.limit

    def _judged_trunk(self, name: str, running: Build) -> Candidate | None:
        (trunk,) = (one for one in self.scenario.trunks if one.name == name)
        try:
            built = running.wait()
        except SearchStopped:
            raise
        except GraphoptError as error:
            self.notes.append(f"{name} cannot be built: {error}")
            return None
        gauged = self.gauge(built, smooths=False)
        found = Candidate(name, replace(built, passes=""), gauged, {}, trunk.passes)
        self.progress(f"{name}: {built.stored_bytes:,} bytes, drop {found.gauged.drop:.3g}")
        self.candidates.append(found)
        return found

    def _best_trunk(self, within: Sequence[Candidate]) -> Candidate:
        """The one that promises most: by the clock, or by what its layers would still save."""
        if self.scenario.objective == "latency":
            return min(as_fast(self._timed(within)), key=lambda c: c.gauged.drop)
        if not self.scenario.treatments:
            return min(within, key=lambda c: c.built.stored_bytes)
        return self._promising(within)[0]

    def _promising(self, among: Sequence[Candidate] | None = None) -> list[Candidate]:
        """Trunks that promise nearly as few bytes as the best, which comes first, or a faster one.

        Args:
            among: these trunks; by default all that are within the drop.
        """
        if among is None:
            among = [one for one in self.within if not one.chosen]
        if not among or self.scenario.objective == "latency" or not self.scenario.treatments:
            return []
        order = [one.name for one in self.scenario.trunks]
        promises = {one.trunk: self._promised_bytes(one) for one in among}
        nearly = [c for c in among if promises[c.trunk] <= NEARLY * min(promises.values())]
        nearly.sort(key=lambda c: (promises[c.trunk], order.index(c.trunk)))
        if len(nearly) < 2:
            return nearly
        timed = {one.trunk: one for one in self._timed(nearly)}
        found = [timed[one.trunk] for one in nearly]
        first = fastest_if_certain(found)
        return [first, *(one for one in found if one is not first)]

    def _promised_bytes(self, candidate: Candidate) -> float:
        """What a trunk may take on disk in the end, as far as can be told before it is probed.

        A bit less for each number makes four times the squared error, and the drop is in proportion
        to that: so the fewer bits, the more of the drop is left.
        """
        room = max(1 - candidate.gauged.drop / self.limit, ROOM_MINIMUM) if self.limit else 1.0
        bits = min(BITS - math.log2(room) / 2, BITS_MAXIMUM)
        treated = self._layers(loading.load(candidate.built.path))
        layers = {one.name: one for found in treated.values() for one in found}
        now_bytes = sum(one.stored_bytes for one in layers.values())
        then_bytes = sum(one.elements for one in layers.values()) * bits / 8
        return candidate.built.stored_bytes - max(now_bytes - then_bytes, 0.0)

    def _timed(self, trunks: Sequence[Candidate]) -> list[Candidate]:
        """With what the clock says of them, the fastest first."""
        timed = [
            one
            if one.latency_ratio is not None
            else replace(one, latency_ratio=self.latency(one.built.path))
            for one in trunks
        ]
        for old, new in zip(trunks, timed, strict=True):
            self.candidates[self.candidates.index(old)] = new
        return sorted(timed, key=lambda c: (c.latency_ratio, c.built.stored_bytes))

    # -------------------------------------------------------------- layers

    def _growth(self, trunk: Candidate) -> Growth:
        """What the layers of a trunk can have."""
        limit = self.limit - trunk.gauged.drop
        if not self.scenario.treatments:
            return Growth(trunk.built.stored_bytes, [], limit)
        model = loading.load(trunk.built.path)
        folder = self.trial(model, trunk.trunk)
        layers = self._layers(model)
        probes = self.probes[trunk.trunk] = probe(
            folder,
            layers,
            self.workers,
            self.cache,
            self.progress,
            until_s=self._until_s(),
        )
        probed = {(one.treatment, one.layer) for one in probes}
        missing = sum(map(len, layers.values())) - len(probed)
        if missing:
            self.notes.append(f"no time for {missing} layers: more --budget-minutes help")
        return Growth(trunk.built.stored_bytes, probes, limit)

    def _until_s(self) -> float:
        """When there is no time left for probes; a trunk that stands in for another gets some."""
        usual_s = self.started_s + PROBES_SHARE * self.seconds
        return max(usual_s, time.monotonic() + (1 - ROUNDS_SHARE) / 2 * self.seconds)

    def _layers(self, model: ir.Model) -> dict[str, list[Layer]]:
        found = {name: treatment(name).layers(model) for name in self.scenario.treatments}
        return {name: layers for name, layers in found.items() if layers}

    def _grow(self, trunk: Candidate) -> None:
        """Build points of the front of a trunk's layers, nearer and nearer to the limit."""
        growth = self._growths[trunk.trunk] = self._growth(trunk)
        if not growth.choices:
            return
        for number in range(ROUNDS):
            if number and self._is_late(ROUNDS_SHARE):
                self.notes.append("no time for another round of points: more --budget-minutes help")
                break
            aims = growth.aims(self._room(trunk))[: self._evaluations_left]
            if not self._round(trunk, growth, aims) or self._is_near(growth):
                break
        for at in front(growth.choices):
            drop = trunk.gauged.drop + growth.per_divergence * growth.divergence(at)
            self.predicted.append(Predicted(trunk.trunk, growth.stored_bytes(at), drop))

    def _room(self, trunk: Candidate) -> float:
        """The drop that is aimed at for what layers add to a trunk."""
        return MARGIN * (self.limit - trunk.gauged.drop)

    def _round(self, trunk: Candidate, growth: Growth, aims: Sequence[float]) -> list[Candidate]:
        """Build points of these divergences, and learn of them."""
        found = self._built_points(trunk, growth, aims)
        for candidate in found:
            growth.learn(candidate.chosen, candidate.gauged.drop - trunk.gauged.drop)
        self._find_offenders(trunk, growth, found)
        self._compare(trunk, growth)
        return found

    def _compare(self, trunk: Candidate, growth: Growth) -> None:
        """Take each candidate of a trunk to have lost what all of them together tell."""
        self.candidates = [
            replace(
                one, gauged=replace(one.gauged, drop=trunk.gauged.drop + growth.drop_of(one.chosen))
            )
            if one.trunk == trunk.trunk and one.chosen
            else one
            for one in self.candidates
        ]

    def _is_near(self, growth: Growth) -> bool:
        """The best candidate takes most of the drop, or there is little between it and the next."""
        within = [c for c in self.candidates if c.chosen and c.gauged.drop <= self.limit]
        best = min(within, key=cost_of(self.scenario.objective), default=None)
        if best is None:
            return False
        return best.gauged.drop >= ENOUGH * self.limit or growth.is_narrow

    def _built_points(
        self, trunk: Candidate, growth: Growth, aims: Sequence[float]
    ) -> list[Candidate]:
        """Points of the front that were not built before."""
        known = {c.built.passes for c in self.candidates}
        wanted = {}
        for aim in aims:
            chosen = growth.options(growth.smallest(aim))
            if not chosen:
                continue
            passes = ",".join(filter(None, (growth.passes_of(chosen), self.scenario.finish)))
            if passes not in known:
                wanted[passes] = chosen
        found = []
        for passes, built in self._built(trunk, list(wanted)).items():
            gauged = self.gauge(built)
            self.progress(f"{trunk.trunk}: {built.stored_bytes:,} bytes, drop {gauged.drop:.3g}")
            found.append(
                Candidate(
                    trunk.trunk,
                    built,
                    gauged,
                    wanted[passes],
                    trunk.trunk_passes,
                    trunk.latency_ratio,
                )
            )
        self.candidates += found
        return found

    def _built(self, trunk: Candidate, passes: Sequence[str]) -> dict[str, Built]:
        """What passes make of a trunk, built side by side; without what cannot be built."""
        folder, found = self.trial_of(trunk), {}
        running = {
            text: build(folder, text, self.models, self.workers, self.cache) for text in passes
        }
        for text, one in running.items():
            try:
                found[text] = one.wait()
            except SearchStopped:
                raise
            except GraphoptError as error:
                self.notes.append(f"a point of {trunk.trunk} cannot be built: {error}")
        return found

    def _find_offenders(self, trunk: Candidate, growth: Growth, found: Sequence[Candidate]) -> None:
        """Where layers diverge by more together than alone, see by how much each one does."""
        for candidate in found:
            added = candidate.built.divergence - trunk.built.divergence
            if added <= SURPRISE * growth.expected(candidate.chosen):
                continue
            rests = {}
            for layer in growth.suspects(candidate.chosen, OFFENDERS):
                rest = {k: v for k, v in candidate.chosen.items() if k != layer}
                if rest:
                    rests[growth.passes_of(rest)] = layer
            for passes, without in self._built(trunk, list(rests)).items():
                layer = rests[passes]
                divergence = candidate.built.divergence - without.divergence
                growth.blame(layer, candidate.chosen[layer], divergence)
            return

    # -------------------------------------------------------------- what they share

    def trial(self, model: ir.Model, name: str, refit: bool = False) -> Path:
        """The folder of a trial on a model.

        Args:
            model: its base.
            name: under which it is known.
            refit: fitted on all samples of the search.
        """
        if (name, refit) not in self._trials:
            folder = self.folder / f"trial{len(self._trials)}"
            folder.mkdir()
            self._trials[name, refit] = write_trial(
                folder,
                self.subject.source.model,
                self.subject.given,
                model,
                self.parts.searched if refit else self.parts.fitted,
                self.parts.judged,
                self.subject.provider,
                self.subject.source.external_data(),
                self._scales,
                self._glanced,
            )
        return self._trials[name, refit]

    @cached_property
    def _glanced(self) -> int:
        """By so many samples single layers are compared, in all trials: that these compare."""
        layers = self._layers(self.base)
        tried = sum(len(treatment(name).probed) * len(of) for name, of in layers.items())
        return glanced_samples(tried, self.sample_s, self.seconds)

    @cached_property
    def _scales(self) -> dict[str, Scale]:
        """How the losses of each output are measured, in all trials."""
        source, given = self.subject.source.model, self.subject.given
        judged, provider = self.parts.judged, self.subject.provider
        return scales_of(source, given, judged, provider, self.sureness)

    def trial_of(self, trunk: Candidate, refit: bool = False) -> Path:
        """The folder of the trial on a trunk."""
        if (trunk.trunk, refit) in self._trials:
            return self._trials[trunk.trunk, refit]
        model = loading.load(self.trunk_of(trunk).built.path)
        return self.trial(model, trunk.trunk, refit)

    def trunk_of(self, candidate: Candidate) -> Candidate:
        """The trunk of a candidate, with its layers as they are."""
        (found,) = (c for c in self.candidates if c.trunk == candidate.trunk and not c.chosen)
        return found

    def refitted(self, candidate: Candidate) -> Built:
        """The same, fitted on all samples of the search; its trunk stays as it is.

        Where it was fitted on many, it is taken as it was judged: more hardly help.
        """
        if not candidate.chosen or self.parts.capped:
            return candidate.built
        folder = self.trial_of(candidate, refit=True)
        return build(folder, candidate.built.passes, self.models, self.workers, self.cache).wait()

    @property
    def _evaluations_left(self) -> int:
        maximum = EVALUATIONS
        if self._rejected:
            # What is taken next is looked at, too.
            maximum = EVALUATIONS_MAXIMUM - len(self._rejected) - 1
        return max(maximum - self.gauge.evaluations, 0)

    def _is_late(self, share: float) -> bool:
        return time.monotonic() - self.started_s > share * self.seconds
