"""The command line: arguments in, calls, exit code out.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 a budget, a requirement
or a strict check failed, every lossy pass was dropped, or a search stopped (what it found is kept);
2 the user's input is at fault.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

import graphopt
from graphopt import bisection_report, json_report, report, saving, search_commands, sharing
from graphopt import demo as demonstration
from graphopt.collection import no_collection
from graphopt.command_line import (
    BenchmarkThreads,
    Json,
    KernelThreads,
    MaxError,
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
from graphopt.errors import CheckFailed, GraphoptError, SpecError
from graphopt.recipes import recipe as recipe_of
from graphopt.recipes import recipe_names
from graphopt.registry import pass_class, pass_names
from graphopt.reproducer import check_folder
from graphopt.scenarios import scenario, scenario_names
from graphopt.treatments import treatment, treatment_names

app = typer.Typer(
    help="Optimize exported ONNX models, with proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def optimize(
    model: Model,
    output: Output,
    recipe: Annotated[str | None, typer.Option(help="A recipe; default: basic.")] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Passes, e.g. fold-constants,drop-unused.")
    ] = None,
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    provider: Provider = "cpu",
    max_error: MaxError = None,
    require: Require = None,
    state: States = None,
    opset: Annotated[int | None, typer.Option(min=7, max=25, help="Raise to this opset.")] = None,
    gate_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples kept for the gate alone.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first rejected pass; write nothing.")
    ] = False,
    standard_ops_only: Annotated[
        bool, typer.Option("--standard-ops-only", help="Reject passes that write other operators.")
    ] = False,
    keep_overridable: Annotated[
        bool, typer.Option("--keep-overridable", help="Leave initializers that are inputs open.")
    ] = False,
    drop_training_info: Annotated[
        bool, typer.Option("--drop-training-info", help="Drop a training graph.")
    ] = False,
    reuse_data: Annotated[
        bool,
        typer.Option(
            "--reuse-data",
            help="Leave weights that do not change in the data file of MODEL: the result reads it "
            "too, so it must stay where it is, and OUT must be in its folder.",
        ),
    ] = False,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Run the model to judge passes.")
    ] = True,
    benchmark: Annotated[
        bool, typer.Option("--benchmark/--no-benchmark", help="Time the result.")
    ] = True,
    threads: BenchmarkThreads = 1,
    json: Json = None,
    page: Page = None,
) -> None:
    """Optimize MODEL: run passes, keep what the samples prove harmless, measure the result."""
    saving.check_target(output, source=model, reuse_data=reuse_data)
    check_json(json, [model], [output, samples])
    check_page(page, json, [model], [output, samples])
    pairs = state_pairs(state)
    # Without snapshots of the model there is no garbage to collect.
    with watched() as progress, nullcontext() if validate else no_collection():
        run = graphopt.optimize(
            model,
            recipe=recipe,
            passes=passes,
            samples=samples,
            random_samples=random_samples,
            provider=provider,
            max_error=max_error,
            require=require,
            state=pairs,
            opset=opset,
            gate_samples=gate_samples,
            strict=strict,
            standard_ops_only=standard_ops_only,
            keep_overridable=keep_overridable,
            drop_training_info=drop_training_info,
            validate=validate,
            benchmark=benchmark,
            threads=threads,
            hash_ahead=not reuse_data,
            details=page is not None,
            progress=progress,
        )
        if not (strict and run.failures):
            progress("saving")
            run = run.save(output, reuse_data=reuse_data)
        if not validate:
            # All of it stays to the end; looking through it for garbage takes a second.
            gc.freeze()
    write_page(page, run, model)
    show(report.render_run(run), json, lambda: json_report.run_to_json(run))
    if run.failures:
        raise CheckFailed("; ".join(run.failures))


app.command()(search_commands.tune)
app.command()(search_commands.sensitivity)


@app.command()
def validate(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="The reference.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The model compared with it.")],
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    provider: Provider = "cpu",
    max_error: MaxError = None,
    state: States = None,
    json: Json = None,
    page: Page = None,
) -> None:
    """Compare the outputs of two models on samples; with --max-error, exit 1 when over it."""
    check_json(json, [first, second], [samples])
    check_page(page, json, [first, second], [samples])
    with watched() as progress:
        found = graphopt.validate(
            first,
            second,
            samples=samples,
            random_samples=random_samples,
            provider=provider,
            max_error=max_error,
            state=state_pairs(state),
            details=page is not None,
            progress=progress,
        )
    write_page(page, found, first, second)
    show(report.render_validation(found), json, lambda: json_report.validation_to_json(found))
    if found.failure is not None:
        raise CheckFailed(found.failure)


@app.command()
def bisect(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model that is right.")],
    optimized: Annotated[
        Path | None, typer.Argument(metavar="OPTIMIZED", help="What became of it, and is wrong.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Run this recipe, pass by pass.")] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Run these passes, one by one.")
    ] = None,
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    provider: Provider = "cpu",
    max_error: MaxError = None,
    state: States = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for the smallest models that show it."
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Find the pass, and the node, that makes a model wrong; exit 1 when something is.

    Give OPTIMIZED, or passes or a recipe, which run without being rolled back. Without --max-error
    OPTIMIZED must equal ORIGINAL but for rounding, and each lossy pass has its own budget.
    """
    models = [original, *([] if optimized is None else [optimized])]
    check_json(json, models, [samples])
    if output is not None:
        check_folder(output, models)
    with watched() as progress:
        found = graphopt.bisect(
            original,
            optimized,
            recipe=recipe,
            passes=passes,
            samples=samples,
            random_samples=random_samples,
            provider=provider,
            max_error=max_error,
            state=state_pairs(state),
            progress=progress,
        )
    if output is not None:
        found.save(output)
    shown = bisection_report.render_bisection(found, output)
    show(shown, json, lambda: json_report.bisection_to_json(found))
    if found.reason is not None:
        culprit = "" if found.guilty is None else f"{found.guilty}: "
        raise CheckFailed(f"{culprit}{found.reason}")


@app.command()
def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="The .onnx files; ratios are to the first."),
    ],
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    provider: Provider = "cpu",
    threads: KernelThreads = 1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Batch at which to measure throughput.")
    ] = None,
    json: Json = None,
    page: Page = None,
) -> None:
    """Time models against each other, interleaved, each as onnxruntime runs it by default."""
    check_json(json, models, [samples])
    check_page(page, json, models, [samples])
    with watched() as progress:
        found = graphopt.benchmark(
            models,
            samples=samples,
            random_samples=random_samples,
            provider=provider,
            threads=threads,
            batch_size=batch_size,
            progress=progress,
        )
    write_page(page, found, *models)
    show(report.render_benchmark(found), json, lambda: json_report.benchmark_to_json(found))


@app.command()
def share(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="The .onnx files, two or more.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ],
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Run the models before and after.")
    ] = True,
    json: Json = None,
) -> None:
    """Store the weights of several models once: all graphs and one data file go into DIR.

    Each graph keeps its file name. Any of them can be deleted, or moved together with a copy of the
    data file, without harm to the others, as long as DIR/graphopt-shared.*.data stays where it is.
    """
    check_json(json, models, [output / model.name for model in models])
    with watched() as progress:
        found = sharing.share(models, output, validate=validate, progress=progress)
    show(report.render_sharing(found), json, lambda: json_report.sharing_to_json(found))


@app.command()
def inspect(
    model: Model,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Size of a dimension of the inputs, for MACs: by name (batch), or by input and "
            "axis (image[0]). Repeatable.",
        ),
    ] = None,
    samples: SamplesPath = None,
    groups: Annotated[
        bool,
        typer.Option(
            "--groups",
            help="Show which channels, heads and hidden units go together, and which must stay.",
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Show what is in MODEL, what each layer costs, and what the recipe basic would do.

    Of layers the terminal shows those with the most multiply-accumulates (MACs; each is two
    FLOPs), and JSON all.
    """
    check_json(json, [model], [samples])
    sizes = _sizes(size)
    with watched() as progress:
        found, tried = graphopt.inspect(model, sizes=sizes, samples=samples, progress=progress)
    shown = report.render_inspection(found, tried, groups)
    show(shown, json, lambda: json_report.inspection_to_json(found, tried))


@app.command()
def explain(
    model: Model,
    samples: SamplesPath = None,
    random_samples: RandomSamples = None,
    threads: KernelThreads = 1,
    provider: Provider = "cpu",
    json: Json = None,
    page: Page = None,
) -> None:
    """Show in which kernels onnxruntime runs MODEL, what they take, and why it is not less."""
    check_json(json, [model], [samples])
    check_page(page, json, [model], [samples])
    with watched() as progress:
        found = graphopt.explain(
            model,
            samples=samples,
            random_samples=random_samples,
            provider=provider,
            threads=threads,
            progress=progress,
        )
    write_page(page, found, model)
    show(report.render_explanation(found), json, lambda: json_report.explanation_to_json(found))


@app.command()
def heal(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model to learn from.")],
    optimized: Annotated[
        Path, typer.Argument(metavar="OPTIMIZED", help="What passes made of it; it is not changed.")
    ],
    output: Output,
    samples: Annotated[
        Path, typer.Option("--samples", help="Folder of .npz files, or one file; no labels.")
    ],
    minutes: Annotated[float, typer.Option(help="How long to learn.")] = 10.0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Learn for so many steps instead: the same result each time."),
    ] = None,
    state: States = None,
    gate_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples that judge, and are not learnt from.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[
        int, typer.Option(min=1, help="Learn side by side, each from its share of every batch.")
    ] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the samples.")] = 0,
    json: Json = None,
) -> None:
    r"""Let OPTIMIZED learn again from ORIGINAL what it lost, without labels, in the same bytes.

    Zeros stay zeros, and what is stored as integers or codes keeps its grid or its codebook; which
    of these numbers each weight is, learns. Needs graphopt\[train].
    """
    for source in (original, optimized):
        saving.check_target(output, source=source)
    check_json(json, [original, optimized], [output, samples])
    pairs = state_pairs(state)
    training = _training()
    with watched() as progress:
        found = training.heal(
            original,
            optimized,
            samples=samples,
            state=pairs,
            minutes=minutes,
            steps=steps,
            gate_samples=gate_samples,
            device=device,
            processes=processes,
            threads=threads,
            seed=seed,
            progress=progress,
        ).save(output)
    show(report.render_healed(found), json, lambda: json_report.healed_to_json(found))


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A pass, to see its options.")
    ] = None,
    json: Json = None,
) -> None:
    """List passes, recipes, treatments of layers and scenarios, or describe one pass."""
    check_json(json)
    if name is not None:
        one = pass_class(name)
        show(report.render_pass(one), json, lambda: json_report.passes_to_json([one], {}, {}, {}))
        return
    listed = (
        [pass_class(n) for n in pass_names()],
        {n: recipe_of(n) for n in recipe_names()},
        {n: treatment(n) for n in treatment_names()},
        {n: scenario(n) for n in scenario_names()},
    )
    show(report.render_passes(*listed), json, lambda: json_report.passes_to_json(*listed))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The .toml file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="A value in place of that in CONFIG, in TOML; words need no quotes. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    json: Json = None,
) -> None:
    """Train a PyTorch model as CONFIG says, export it, and optimize what was exported.

    With several processes: torchrun --nproc_per_node=N -m graphopt.training CONFIG.
    """
    check_json(json, others=[config])
    training = _training()
    read = training.read_config(config, settings or ())
    with watched() as progress:
        trained = training.train(read, resume=resume, progress=progress)
    # One of several processes speaks for all.
    if trained.module is not None:
        shown = training.render_trained(trained)
        show(shown, json, lambda: training.trained_to_json(trained))
    run = trained.delivery.run
    if run is not None and run.failures:
        raise CheckFailed("; ".join(run.failures))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to write the optimized model.")
    ] = Path("digits_cnn.optimized.onnx"),
    files: Annotated[
        Path | None,
        typer.Option(
            "--files",
            metavar="DIR",
            help="Instead write the model, its samples and labels there, to try commands on.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Optimize the digits classifier that comes with graphopt, and score it before and after."""
    check_json(json, others=[output])
    if files is not None:
        written = demonstration.write_files(files)
        shown_files = report.render_demo_files(written)
        show(shown_files, json, lambda: json_report.demo_files_to_json(written))
        return
    with watched() as progress:
        shown = demonstration.demonstrate(output, progress)
    show(report.render_demo(shown), json, lambda: json_report.demo_to_json(shown))


# ------------------------------------------------------------------ what they need


def _training() -> ModuleType:
    """The training side, which needs more than the rest."""
    try:
        from graphopt import training
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise GraphoptError("training needs torch: pip install 'graphopt[train]'") from None
    return training


def _sizes(texts: list[str] | None) -> dict[str, int]:
    sizes = {}
    for text in texts or []:
        name, _, number = text.rpartition("=")
        if not (name and number.isdecimal()):
            raise SpecError(f"--size {text!r} is not of the form NAME=N")
        sizes[name] = int(number)
    return sizes


def _drop_stdout() -> None:
    """What stdout did not take is not written again at exit, which would end in a traceback."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _end(code: int) -> NoReturn:
    """End the process; one of several ends at once.

    Its collectives may still wait for a process that is lost. Their thread needs the interpreter to
    end, and the interpreter, as it ends, waits for that thread.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Run the command line."""
    # A graph of many nodes takes a second to take apart, and the process is ending.
    atexit.register(gc.freeze)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and values may have characters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.getLogger("graphopt").addHandler(handler)
    try:
        app()
    except GraphoptError as error:
        kind = "failed" if isinstance(error, CheckFailed) else "error"
        # One line: the tools whose messages are passed on wrap theirs.
        sys.stderr.write(f"graphopt: {kind}: {' '.join(str(error).split())}\n")
        _end(error.exit_code)
    except OSError as error:
        # A full disk, under the temporary files or under stdout, is no fault of the code.
        where = f": {error.filename}" if error.filename is not None else ""
        sys.stderr.write(f"graphopt: error: {error.strerror or error}{where}\n")
        _drop_stdout()
        _end(GraphoptError.exit_code)
    finally:
        logging.getLogger("graphopt").removeHandler(handler)
