"""Trained modules out: to ONNX, and checked there against PyTorch."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphopt import saving
from graphopt.errors import ConfigError, ModelError, did_you_mean
from graphopt.training.config import Export
from graphopt.training.export_check import Checked, check

DynamicAxes = Mapping[str, Mapping[int, str]]


def names_of_inputs(module: nn.Module, config: Export, count: int) -> tuple[str, ...]:
    """The names that the inputs get.

    Args:
        module: names them after its arguments, where the configuration does not.
        config: of the export.
        count: of the inputs.

    Raises:
        ConfigError: the configuration names another number of them.
    """
    named = config.input_names
    if named and len(named) != count:
        raise ConfigError(
            f"export.input_names is {list(named)}; the samples have {count} inputs, so name {count}"
        )
    for key, names in (("input_names", named), ("output_names", config.output_names)):
        if len(set(names)) != len(names):
            raise ConfigError(f"export.{key} is {list(names)}; each name may be there once")
    if named:
        return _apart(named, config)
    arguments = list(inspect.signature(module.forward).parameters)
    if len(arguments) < count:
        raise ConfigError(
            f"the samples have {count} inputs, and the module's forward takes "
            f"{', '.join(arguments)}; state export.input_names"
        )
    return _apart(tuple(arguments[:count]), config)


def _apart(names: tuple[str, ...], config: Export) -> tuple[str, ...]:
    """The names of the inputs, where no output has one of them."""
    both = [name for name in names if name in config.output_names]
    if both:
        raise ConfigError(
            f"export.output_names has {both[0]!r}, which is the name of an input; give another"
        )
    return names


def axes_of(config: Export, names: Sequence[str], inputs: Sequence[Tensor]) -> DynamicAxes:
    """The dimensions of inputs that may have any size, by input and axis.

    Raises:
        ConfigError: an input or axis is not there.
    """
    if not config.dynamic_axes:
        return {name: {0: "batch"} for name in names}
    found: dict[str, dict[int, str]] = {}
    ranks = {name: tensor.ndim for name, tensor in zip(names, inputs, strict=True)}
    for name, axes in config.dynamic_axes.items():
        if name not in ranks:
            near = did_you_mean(name, names)
            raise ConfigError(f"export.dynamic_axes: there is no input {name!r}{near}")
        for axis in axes:
            if not axis.isdecimal() or int(axis) >= ranks[name]:
                raise ConfigError(
                    f"export.dynamic_axes: {name!r} has no axis {axis!r}; its axes are 0 to "
                    f"{ranks[name] - 1}"
                )
        for dimension in axes.values():
            if not dimension.isidentifier():
                raise ConfigError(
                    f"export.dynamic_axes: {dimension!r} is no name of a dimension; it must be of "
                    "letters, digits and _"
                )
        found[name] = {int(axis): dimension for axis, dimension in axes.items()}
    return found


def exported(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: DynamicAxes,
    opset: int,
) -> ir.Model:
    """A module as an ONNX model, left as PyTorch translates it, without where it comes from.

    Args:
        module: put into evaluation mode.
        inputs: of two samples or more: a dimension of 1 would be taken for a constant.
        input_names: in the order of the inputs.
        output_names: may be empty for the exporter's own.
        axes: dimensions that may have any size, by input and axis.
        opset: of the default operators.

    Returns:
        The model; initializers have the names of the parameters.

    Raises:
        ModelError: PyTorch cannot export the module.
    """
    dimensions: dict[str, Any] = {}
    shapes = tuple(
        {
            axis: dimensions.setdefault(name, torch.export.Dim(name))
            for axis, name in axes.get(input_name, {}).items()
        }
        for input_name in input_names
    )
    try:
        with _unmoved():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs),
                input_names=list(input_names),
                output_names=list(output_names) or None,
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(f"PyTorch cannot export the module: {_cause(error)}") from error
    if program is None:
        raise ModelError("PyTorch returned no program for the module")
    clear_provenance(program.model)
    return program.model


@contextmanager
def _unmoved() -> Iterator[None]:
    """Within, the exporter keeps to itself what it deprecates and what it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """What the exporter stumbled over, under what it wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def write_checked(
    model: ir.Model, path: Path, module: nn.Module, batches: Sequence[Mapping[str, Tensor]]
) -> Checked:
    """Write a model if it computes what the module does, as closely as rounding allows.

    Args:
        model: of the module.
        path: of the file; it is the old one or the new one, whole, at every moment.
        module: in evaluation mode.
        batches: inputs by name, in the order of the module's arguments.

    Returns:
        What was compared; see `graphopt.training.export_check`.

    Raises:
        ModelError: the outputs differ, onnxruntime does not run the model, or the path cannot be
            written.
    """
    checked: list[Checked] = []
    saving.save(model, path, verify=lambda to: checked.append(check(to, module, batches)))
    return checked[-1]


def clear_provenance(model: ir.Model) -> None:
    """Remove what the exporter notes about its origin: stack traces hold paths of the machine."""
    model.doc_string = None
    model.metadata_props.clear()
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for graph in graphs:
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _clear(value)
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _clear(value)


def _clear(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()
    if value.const_value is not None:
        value.const_value.doc_string = None
        value.const_value.metadata_props.clear()
