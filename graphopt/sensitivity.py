"""Which layers bear what: each option of each treatment, given to each layer alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphopt import saving
from graphopt.errors import SpecError
from graphopt.executors import open_workers
from graphopt.loading import ModelLike
from graphopt.preparing import lossless
from graphopt.probe_cache import ProbeCache, default_folder
from graphopt.probing import Probe, probe
from graphopt.recording import Feed
from graphopt.subject import Progress, SamplesLike, State, open_subject
from graphopt.treatments import Layer, treatment, treatment_names
from graphopt.trial import scales_of, tried_on, write_trial

FITTED_MAXIMUM, JUDGED_MAXIMUM = 64, 16
"""Samples by which layers are fitted, and samples by which the outputs are judged, at most."""


@dataclass(frozen=True)
class Sensitivity:
    """What each option does to the outputs, given to one layer alone.

    Attributes:
        probes: for each layer, in order, each option of each treatment.
        treatments: what these are, one line each, by name.
        stored_bytes: of the model after the recipe basic, on which they were tried.
        samples: by how many the layers were fitted, and by how many the outputs were judged.
        notes: what else a user should know.
    """

    probes: tuple[Probe, ...]
    treatments: dict[str, str]
    stored_bytes: int
    samples: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def layers(self) -> list[str]:
        """The names of the layers, the most sensitive first: by the largest divergence seen."""
        worst: dict[str, float] = {}
        for one in self.probes:
            worst[one.layer] = max(worst.get(one.layer, 0.0), one.divergence)
        return sorted(worst, key=lambda name: -worst[name])

    def _repr_html_(self) -> str:
        """What was found as tables, for notebooks."""
        from graphopt import html_sections

        return html_sections.sensitivity(self)


def sensitivity(
    model: ModelLike,
    *,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    treatments: Sequence[str] | None = None,
    every: bool = False,
    provider: str = "cpu",
    state: State = (),
    cache: str | Path | None = None,
    executor: str | Executor | None = None,
    jobs: int | None = None,
    progress: Progress = lambda _: None,
) -> Sensitivity:
    """Try treatments on each layer alone, after the recipe basic, and measure the outputs.

    Args:
        model: see `graphopt.optimize`.
        samples: likewise.
        random_samples: likewise.
        treatments: their names; by default all that are for the provider.
        every: all options of each; else a few, from which the others are estimated.
        provider: "cpu" or "cuda".
        state: see `graphopt.optimize`.
        cache: folder of what was found before; by default the user's folder for caches.
        executor: see `graphopt.executors.open_workers`.
        jobs: processes, of the default executor.
        progress: called with a few words on what goes on.

    Raises:
        SpecError: there is no such treatment, or no such executor.
        SearchStopped: a worker was lost, or there is no room; what was found is kept.
        GraphoptError: the input is at fault.
    """
    store = ProbeCache(Path(cache) if cache is not None else default_folder())
    store.check()
    chosen = _chosen(treatments, provider)
    subject = open_subject(model, provider, True, True, progress)
    feed = subject.feed(samples, random_samples, state)
    fitted, judged = parted(feed)
    base, _ = lossless(subject, progress)
    layers = layers_of(base, chosen)
    with (
        tempfile.TemporaryDirectory(prefix="graphopt-") as folder,
        open_workers(executor, jobs) as workers,
    ):
        original = subject.source.model
        write_trial(
            Path(folder),
            original,
            subject.given,
            base,
            fitted,
            judged,
            provider,
            subject.source.external_data(),
            scales_of(original, subject.given, judged, provider),
        )
        probes = probe(Path(folder), layers, workers, store, progress, every)
    return Sensitivity(
        tuple(probes),
        {name: treatment(name).summary for name in layers},
        saving.stored_bytes(base, subject.source.external_data()),
        (len(fitted.samples), len(judged.samples)),
        tuple(subject.notes),
    )


def layers_of(base: ir.Model, treatments: Sequence[str]) -> dict[str, list[Layer]]:
    """The layers that treatments are for, by their names; without treatments that have none."""
    found = {name: treatment(name).layers(base) for name in treatments}
    return {name: layers for name, layers in found.items() if layers}


def parted(feed: Feed) -> tuple[Feed, Feed]:
    """Samples to fit layers by, and samples to judge by; the same where there are too few."""
    few, judged = feed.split(None)
    if few is judged:
        return feed, feed
    return (
        tried_on(few.samples, range(min(FITTED_MAXIMUM, len(few.samples.sequences))), feed),
        tried_on(judged.samples, range(min(JUDGED_MAXIMUM, len(judged.samples.sequences))), feed),
    )


def _chosen(treatments: Sequence[str] | None, provider: str) -> list[str]:
    if treatments is not None:
        for name in treatments:
            other = treatment(name).provider
            if other not in (None, provider):
                raise SpecError(f"the treatment {name!r} is for {other}, and not for {provider}")
        return list(treatments)
    return [n for n in treatment_names() if treatment(n).provider in (None, provider)]
