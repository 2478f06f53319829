"""What a run leaves behind: the exported file, and what `graphopt.optimize` makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

import graphopt
from graphopt import saving
from graphopt.errors import ConfigError
from graphopt.json_report import run_to_json
from graphopt.ledger import Run
from graphopt.recipes import plan
from graphopt.requirements import parse_requirements
from graphopt.training import exporting
from graphopt.training.batches import Samples, first_of
from graphopt.training.config import Config, Optimize
from graphopt.training.export_check import array_of
from graphopt.training.recorder import Recorder
from graphopt.validation import OutputError, parse_budget


@dataclass(frozen=True)
class Delivery:
    """The files of a run.

    Attributes:
        exported: the ONNX file; None where none was asked for.
        numerics: the errors of its outputs against the module's.
        optimized: the file that `graphopt.optimize` made of it, or None.
        run: that run, or None.
    """

    exported: Path | None = None
    numerics: tuple[OutputError, ...] = ()
    optimized: Path | None = None
    run: Run | None = None


def check_targets(config: Config) -> None:
    """Raise GraphoptError where something cannot be delivered, before any work is done."""
    optimize = config.optimize
    if config.export.path is None:
        if optimize is not None:
            raise ConfigError(
                "[optimize] works on the exported file, and there is none; state export.path"
            )
        return
    if find_spec("onnxscript") is None:
        raise ConfigError("the export needs onnxscript: pip install 'graphopt[train]'")
    target = config.path(config.export.path)
    # One folder is made, such as for all files of a run; more may be a slip.
    if target.parent.parent.is_dir():
        target.parent.mkdir(exist_ok=True)
    saving.check_target(target)
    if optimize is None:
        return
    output = _output_of(config, optimize, target)
    saving.check_target(output)
    if output.resolve() == target.resolve():
        raise ConfigError(f"optimize.output is {output}, the exported file itself; give another")
    plan(optimize.recipe, optimize.passes, None)
    for text in optimize.max_error:
        parse_budget(text)
    if optimize.require is not None:
        parse_requirements(optimize.require)


def _output_of(config: Config, optimize: Optimize, exported: Path) -> Path:
    if optimize.output is not None:
        return config.path(optimize.output)
    return exported.with_name(f"{exported.stem}.optimized{exported.suffix}")


def deliver(
    config: Config,
    module: nn.Module,
    samples: Samples,
    names: tuple[str, ...],
    recorder: Recorder,
    progress: Callable[[str], None],
) -> Delivery:
    """Export a trained module, and optimize what was exported, as far as is asked for.

    Args:
        config: says what is wanted.
        module: trained, in evaluation mode.
        samples: real ones, that were not trained on where there are any.
        names: of the inputs.
        recorder: keeps the record.
        progress: told what goes on.

    Raises:
        GraphoptError: the module cannot be exported, or the file not be optimized.
    """
    if config.export.path is None:
        return Delivery()
    progress("exporting")
    target = config.path(config.export.path)
    inputs, _ = first_of(samples, config.export.samples)
    axes = exporting.axes_of(config.export, names, inputs)
    model = exporting.exported(
        module, inputs, names, config.export.output_names, axes, config.export.opset
    )
    batches = [dict(zip(names, inputs, strict=True))]
    if all(0 in axes.get(name, {}) for name in names):
        # That the number of samples is free shows with another one.
        batches.append({name: tensor[:1] for name, tensor in batches[0].items()})
    checked = exporting.write_checked(model, target, module, batches)
    numerics = checked.outputs
    done: dict[str, object] = {
        "path": str(target),
        "bytes": target.stat().st_size,
        "outputs": {e.name: {"rel_l2": e.rel_l2, "max_abs": e.max_abs} for e in numerics},
    }
    if checked.codes:
        done["codes"] = {"compared": checked.codes, "ties": checked.ties}
    recorder.add("export", done)
    if config.optimize is None:
        return Delivery(target, numerics)
    output = _output_of(config, config.optimize, target)
    run = _optimized(config.optimize, target, samples, names, progress).save(output)
    recorder.add("optimize", {"path": str(output), "result": run_to_json(run)})
    return Delivery(target, numerics, output, run)


def _optimized(
    optimize: Optimize,
    target: Path,
    samples: Samples,
    names: tuple[str, ...],
    progress: Callable[[str], None],
) -> Run:
    return graphopt.optimize(
        target,
        recipe=optimize.recipe,
        passes=optimize.passes,
        samples=_feeds(samples, names, optimize.samples),
        max_error=optimize.max_error or None,
        require=optimize.require,
        benchmark=optimize.benchmark,
        progress=progress,
    )


def _feeds(samples: Samples, names: tuple[str, ...], count: int) -> Iterator[dict[str, np.ndarray]]:
    """Samples as `graphopt.optimize` takes them, each a batch of one."""
    inputs, _ = first_of(samples, count)
    for number in range(inputs[0].shape[0]):
        yield {
            name: array_of(tensor[number : number + 1])
            for name, tensor in zip(names, inputs, strict=True)
        }
