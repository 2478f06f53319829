"""What a student learns from: a torch module, or an ONNX file that onnxruntime runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graphopt.errors import ConfigError, did_you_mean
from graphopt.loading import load
from graphopt.runtime import Session


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a batch.

    Attributes:
        logits: its first output, float32 [samples, classes, ...].
        features: intermediate values by name, each [samples, ...].
    """

    logits: Tensor
    features: dict[str, Tensor]


class Teacher(Protocol):
    """Gives its outputs, and values on the way to them, for the student's own inputs."""

    def __call__(self, inputs: tuple[Tensor, ...]) -> Lesson:
        """What it says of inputs, each [samples, ...], without gradients."""


class ModuleTeacher:
    """A torch module, in evaluation mode and never trained.

    It is computed in float32 whatever the precision of the training. Each process has a whole one.

    Args:
        module: the teacher.
        layers: names of the modules in it whose outputs are asked for.
        device: where it is computed.

    Raises:
        ConfigError: a layer is not there.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], device: torch.device) -> None:
        self._module = module.to(device).requires_grad_(False).eval()
        self._layers = tuple(layers)
        check_layers(module, layers, "teacher")

    def __call__(self, inputs: tuple[Tensor, ...]) -> Lesson:
        """See `Teacher`."""
        device = inputs[0].device.type
        with (
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            captured(self._module, self._layers) as features,
        ):
            outputs = self._module(*inputs)
        return Lesson(logits_of(outputs), features)


class OnnxTeacher:
    """An ONNX model, run by onnxruntime on the CPU.

    Args:
        path: of the file.
        values: names of the values in its main graph that are asked for.

    Raises:
        ConfigError: a value is not there, or has no tensors of float.
        GraphoptError: the file is no model, or onnxruntime does not load it.
    """

    def __init__(self, path: Path, values: Sequence[str]) -> None:
        model = load(path).clone()
        self._logits = model.graph.outputs[0].name or ""
        self._values = tuple(values)
        _show(model, values)
        self._session = Session(model)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Lesson:
        """See `Teacher`.

        Raises:
            ConfigError: it has another number of inputs.
            SampleError: onnxruntime does not run it on these.
        """
        names = self._session.inputs
        if len(names) != len(inputs):
            raise ConfigError(
                f"distill.teacher has the inputs {', '.join(names)}, and the samples have "
                f"{len(inputs)}; give a teacher that takes what the student takes"
            )
        feeds = {n: t.detach().cpu().numpy() for n, t in zip(names, inputs, strict=True)}
        found = self._session.run(feeds)
        device = inputs[0].device
        tensors = {
            name: torch.from_numpy(found[name]).float().to(device)
            for name in (self._logits, *self._values)
        }
        return Lesson(tensors[self._logits], {name: tensors[name] for name in self._values})


def _show(model: ir.Model, values: Sequence[str]) -> None:
    """Make values of the main graph outputs of the model."""
    outputs = {value.name: value for value in model.graph.outputs}
    made = {v.name: v for node in model.graph for v in node.outputs if v.name is not None}
    for name in values:
        if name not in made:
            raise ConfigError(
                f"distill.features: the teacher computes no value {name!r}"
                f"{did_you_mean(name, made)}"
            )
        if name not in outputs:
            model.graph.outputs.append(made[name])


def check_layers(module: nn.Module, layers: Sequence[str], whose: str) -> None:
    """Raise ConfigError where a name is that of no module within a module."""
    names = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in names:
            raise ConfigError(
                f"distill.features: the {whose} has no module {layer!r}{did_you_mean(layer, names)}"
            )


@contextmanager
def captured(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within, what layers of a module give when it is called, by name; the last call counts.

    Args:
        module: the whole.
        layers: names of modules in it, which give a tensor, or several of which the first counts.
    """
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = _whole(_first(output))

        return keep

    handles = [module.get_submodule(n).register_forward_hook(keeper(n)) for n in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def logits_of(outputs: Any) -> Tensor:
    """The first output, in float32.

    Raises:
        ConfigError: it is no tensor of floats.
    """
    first = _first(outputs)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        kind = first.dtype if isinstance(first, Tensor) else type(first).__name__
        raise ConfigError(
            f"[distill] works on the first output of student and teacher; one is {kind}, and must "
            "be a tensor of floats, [samples, classes, ...]"
        )
    return first.float()


def _first(outputs: Any) -> Any:
    """The first of several outputs."""
    while isinstance(outputs, tuple | list | dict) and outputs:
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs


def _whole(tensor: Any) -> Any:
    """A tensor that processes hold in parts, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
