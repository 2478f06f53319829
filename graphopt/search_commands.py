"""The commands that search: tune, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import graphopt
from graphopt import json_report, saving, search_report
from graphopt.command_line import (
    BenchmarkThreads,
    Json,
    Model,
    Output,
    Page,
    Provider,
    RandomSamples,
    Require,
    SamplesPath,
    States,
    check_json,
    check_page,
    show,
    state_pairs,
    watched,
    write_page,
)
from graphopt.errors import CheckFailed

Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of what was found before; default: the user's for caches."
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help=r"processes, or dask://HOST:PORT of a scheduler; needs graphopt\[dask].",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Processes side by side; default: one for each core."),
]


def tune(
    model: Model,
    output: Output,
    samples: Annotated[
        Path, typer.Option("--samples", help="Folder of .npz files keyed by input name, or one.")
    ],
    max_drop: Annotated[
        str,
        typer.Option(
            metavar="X", help="Drop of the metric in its unit, as 1.0; 2% is of its value."
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help=r"agreement, accuracy\[+1]\[:OUTPUT] or FILE.py:FUNCTION; default: accuracy where "
            "there are labels, else agreement with MODEL.",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels; default: labels.json in the folder of samples.")
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help="edge, server-cpu, server-gpu or llm-decode; see graphopt passes."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="size, latency or memory; default: that of the scenario, or size."),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: that of the scenario, or cpu.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of what is said of the drop.")] = 0.95,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Take only what is proven to be within the drop, or write nothing."
        ),
    ] = False,
    budget_minutes: Annotated[float, typer.Option(help="About how long it may take.")] = 10.0,
    threads: BenchmarkThreads = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of another division of the samples.")] = 0,
    state: States = None,
    cache: Cache = None,
    executor: Executor = "processes",
    jobs: Jobs = None,
    require: Require = None,
    json: Json = None,
    page: Page = None,
) -> None:
    """Find the best of MODEL within a drop of its accuracy, and prove it on unseen samples.

    Samples are divided: to fit by, to search by, and to verify by. Labels are optional. What is
    found is kept in the cache: the same command goes on from there.
    """
    saving.check_target(output, source=model)
    files = [output, samples, labels]
    check_json(json, [model], files)
    check_page(page, json, [model], files)
    pairs = state_pairs(state)
    with watched() as progress:
        found = graphopt.tune(
            model,
            samples=samples,
            max_drop=max_drop,
            metric=metric,
            labels=labels,
            scenario=scenario,
            objective=objective,
            provider=provider,
            confidence=confidence,
            certify=certify,
            budget_minutes=budget_minutes,
            threads=threads,
            seed=seed,
            state=pairs,
            cache=cache,
            executor=executor,
            jobs=jobs,
            require=require,
            details=page is not None,
            progress=progress,
        )
        if found.proves_enough:
            progress("saving")
            found = found.save(output)
    write_page(page, found, model)
    show(search_report.render_tuning(found), json, lambda: json_report.tuning_to_json(found))
    if found.run.failures:
        raise CheckFailed("; ".join(found.run.failures))


def sensitivity(
    model: Model,
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    treatments: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these; see graphopt passes. Default: all."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--every", help="Try every option; else a few, from which others are estimated."
        ),
    ] = False,
    provider: Provider = "cpu",
    state: States = None,
    cache: Cache = None,
    executor: Executor = "processes",
    jobs: Jobs = None,
    json: Json = None,
    page: Page = None,
) -> None:
    """Show which layers of MODEL bear what: each option of each treatment, on one layer alone."""
    check_json(json, [model], [samples])
    check_page(page, json, [model], [samples])
    pairs = state_pairs(state)
    names = None if treatments is None else [name.strip() for name in treatments.split(",")]
    with watched() as progress:
        found = graphopt.sensitivity(
            model,
            samples=samples,
            random_samples=random_samples,
            treatments=names,
            every=every,
            provider=provider,
            state=pairs,
            cache=cache,
            executor=executor,
            jobs=jobs,
            progress=progress,
        )
    write_page(page, found, model)
    shown = search_report.render_sensitivity(found)
    show(shown, json, lambda: json_report.sensitivity_to_json(found))
