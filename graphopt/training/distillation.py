"""Distillation: a student learns to give what a teacher gives, with labels or without.

The table `[distill]` of a configuration names the teacher and weighs what is made small::

    loss = label_weight * (loss against labels) + teacher_weight * (loss against logits)
         + feature_weight * (mean over features of what adapters leave of their differences)

The teacher sees the inputs that the student sees, augmented as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphopt.contract import Bounds
from graphopt.errors import ConfigError, GraphoptError, did_you_mean
from graphopt.training import distillation_losses as losses
from graphopt.training.config import INFINITE, Config, Section, Table
from graphopt.training.features import Adapter, adapter_of
from graphopt.training.importing import is_path, made_by
from graphopt.training.objectives import UNLABELED, Loss, in_float32
from graphopt.training.reading import section_of
from graphopt.training.teachers import (
    Lesson,
    ModuleTeacher,
    OnnxTeacher,
    Teacher,
    captured,
    check_layers,
    logits_of,
)


@dataclass(frozen=True)
class Distill(Section):
    """What a student learns from a teacher.

    Attributes:
        teacher: import path of what makes a torch module, or the path of an ONNX file, which
            onnxruntime runs on the CPU. The first output of each is its logits, [samples, classes,
            ...].
        options: keyword arguments of the former.
        weights: path of its state, as `torch.save(module.state_dict(), path)` writes it; None for
            a module that is made with its weights.
        loss: hinton, dkd (which needs labels) or mse; see `graphopt.training.distillation_losses`.
        temperature: of hinton and dkd.
        standardize: logits are brought to mean 0 and deviation 1 first.
        target_weight: alpha of dkd.
        other_weight: beta of dkd.
        label_weight: of the loss against labels, `training.loss`, where the data has targets. Where
            these are whole numbers, a sample of -100 has no label, and adds nothing to this loss.
        teacher_weight: of the loss against the teacher's logits.
        features: names of modules of the student, each with what it learns from: a module of the
            teacher, or a value of the ONNX file.
        feature_weight: of the mean loss of these.
    """

    section: ClassVar[str] = "distill"
    teacher: str
    options: Table = field(default_factory=dict)
    weights: str | None = None
    loss: Literal["hinton", "dkd", "mse"] = "hinton"
    temperature: Annotated[float, Bounds(1e-3, 1e3)] = 4.0
    standardize: bool = False
    target_weight: Annotated[float, INFINITE] = 1.0
    other_weight: Annotated[float, INFINITE] = 8.0
    label_weight: Annotated[float, INFINITE] = 0.5
    teacher_weight: Annotated[float, INFINITE] = 0.5
    features: dict[str, str] = field(default_factory=dict)
    feature_weight: Annotated[float, INFINITE] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.label_weight or self.teacher_weight or self.features):
            raise ConfigError(
                "distill.label_weight and distill.teacher_weight are 0, and there are no "
                "distill.features; nothing would be learnt"
            )


class Distillation:
    """The objective of a student; see `graphopt.training.objectives.Objective`.

    Args:
        config: what is made small.
        teacher: gives logits, and the features that the configuration names.
        loss: against labels.
        adapters: by module of the student.
    """

    def __init__(
        self, config: Distill, teacher: Teacher, loss: Loss, adapters: dict[str, Adapter]
    ) -> None:
        self.config = config
        self._teacher = teacher
        self._loss = loss
        self._adapters = adapters

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The loss of a student, over labels, logits and features."""
        with captured(module, tuple(self.config.features)) as features:
            outputs = module(*inputs)
        lesson = self._teacher(inputs)
        loss = self._of_outputs(outputs, lesson, targets)
        if not features:
            return loss
        parts = [
            adapter(features[name], lesson.features[self.config.features[name]])
            for name, adapter in self._adapters.items()
        ]
        return loss + self.config.feature_weight * torch.stack(parts).mean()

    def on_outputs(
        self, outputs: Any, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The loss of a student's outputs, over labels and logits.

        Raises:
            ConfigError: features are to be learnt too.
        """
        if self.config.features:
            raise ConfigError(NO_FEATURES)
        return self._of_outputs(outputs, self._teacher(inputs), targets)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the adapters."""
        return [p for adapter in self._adapters.values() for p in adapter.parameters()]

    def _of_outputs(self, outputs: Any, lesson: Lesson, targets: Tensor | None) -> Tensor:
        config, student = self.config, logits_of(outputs)
        loss = student.new_zeros(())
        if config.label_weight and targets is not None:
            loss = loss + config.label_weight * labeled(self._loss, in_float32(outputs), targets)
        if config.teacher_weight:
            loss = loss + config.teacher_weight * self._of_logits(student, lesson.logits, targets)
        return loss

    def _of_logits(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        config = self.config
        if config.standardize:
            student, teacher = losses.standardized(student), losses.standardized(teacher)
        if config.loss == "mse":
            return losses.squared(student, teacher)
        if config.loss == "hinton":
            return losses.hinton(student, teacher, config.temperature)
        if targets is None or bool((targets == UNLABELED).any()):
            raise ConfigError(
                "distill.loss is 'dkd', which sets the right class apart, and there are samples "
                "without a label; use 'hinton'"
            )
        return losses.decoupled(
            student,
            teacher,
            targets,
            config.temperature,
            config.target_weight,
            config.other_weight,
        )


NO_FEATURES = (
    "distill.features cannot be learnt by a pipeline, whose last stage has the outputs alone; "
    "leave them out, or use another strategy"
)


def labeled(loss: Loss, outputs: Any, targets: Tensor) -> Tensor:
    """A loss against labels, the mean over all samples; those without a label add nothing to it.

    Args:
        loss: the mean over the samples that it is given.
        outputs: of the module.
        targets: [samples, ...]; of those of whole numbers, `UNLABELED` is none.

    Raises:
        ConfigError: some samples have no label, and there is more than one output.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        return loss(outputs, targets)
    known = targets != UNLABELED
    if bool(known.all()):
        return loss(outputs, targets)
    if not isinstance(outputs, Tensor):
        raise ConfigError("samples without a label need a module of one output")
    if not bool(known.any()):
        return outputs.sum() * 0.0
    return loss(outputs[known], targets[known]) * known.float().mean()


# ------------------------------------------------------------------ of a configuration


def objective_of(
    config: Config,
    loss: Loss,
    student: nn.Module,
    inputs: tuple[Tensor, ...],
    device: torch.device,
) -> Distillation:
    """The objective that the table `[distill]` of a configuration states.

    Args:
        config: of the run.
        loss: against labels.
        student: whole, on the CPU.
        inputs: of a few samples, on the CPU, on which teacher and student are compared.
        device: where training will be.

    Raises:
        ConfigError: the table is wrong, the teacher cannot be used, or does not fit the student.
    """
    options = section_of(Distill, config.distill)
    if options.features and "pipeline" in config.strategy.name.split():
        raise ConfigError(NO_FEATURES)
    check_layers(student, tuple(options.features), "student")
    teacher = _teacher_of(options, config, device)
    try:
        lesson = teacher(tuple(tensor.to(device) for tensor in inputs))
    except ConfigError:
        raise
    except Exception as error:
        # What a teacher raises on inputs that it was not made for may be anything.
        raise ConfigError(
            f"distill.teacher: {options.teacher} does not take {len(inputs[0])} samples at once: "
            f"{type(error).__name__}: {error}"
        ) from error
    outputs, features = _taken(student, inputs, tuple(options.features))
    logits = logits_of(outputs)
    if logits.shape != lesson.logits.shape:
        raise ConfigError(
            f"[distill]: the student's logits are of shape {list(logits.shape)} and the teacher's "
            f"of {list(lesson.logits.shape)}; they must be alike"
        )
    adapters = {
        name: adapter_of(name, features[name], lesson.features[of_teacher]).to(device)
        for name, of_teacher in options.features.items()
    }
    return Distillation(options, teacher, loss, adapters)


def _taken(
    student: nn.Module, inputs: tuple[Tensor, ...], layers: Sequence[str]
) -> tuple[Any, dict[str, Tensor]]:
    """The student's outputs and features, in evaluation mode; its mode stays."""
    modes = {module: module.training for module in student.modules()}
    student.eval()
    try:
        with torch.no_grad(), captured(student, layers) as features:
            outputs = student(*inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for layer in layers:
        if layer not in features:
            raise ConfigError(f"distill.features: the student does not call {layer!r}")
    return outputs, features


def _teacher_of(options: Distill, config: Config, device: torch.device) -> Teacher:
    values = tuple(dict.fromkeys(options.features.values()))
    if is_path(options.teacher):
        made = made_by(options.teacher, options.options, "distill.teacher")
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"distill.teacher: {options.teacher} returned {type(made).__name__}; it must "
                "return a torch.nn.Module"
            )
        if options.weights is not None:
            _load(made, config.path(options.weights))
        return ModuleTeacher(made, values, device)
    if options.weights is not None or options.options:
        raise ConfigError(
            "distill.weights and distill.options are for a teacher made by an import path; an ONNX "
            "file has its weights"
        )
    try:
        return OnnxTeacher(config.path(options.teacher), values)
    except ConfigError:
        raise
    except GraphoptError as error:
        raise ConfigError(f"distill.teacher: {error}") from error


def _load(module: nn.Module, path: Path) -> None:
    """Give a module the state in a file."""
    where = f"distill.weights: {path}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except Exception as error:
        # The format is torch's own, and so is what it raises.
        raise ConfigError(
            f"{where} holds no state of a module, as torch.save(module.state_dict(), path) writes "
            f"it: {type(error).__name__}"
        ) from error
    if not isinstance(state, dict):
        raise ConfigError(f"{where} holds {type(state).__name__}; it must hold a state_dict()")
    known = module.state_dict()
    for name in (*known.keys() - state.keys(), *state.keys() - known.keys()):
        near = did_you_mean(name, known) if name not in known else ""
        kind = "lacks" if name in known else "has too much:"
        raise ConfigError(f"{where} {kind} {name!r}{near}; is it of another module?")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{where} does not fit the teacher: {error}") from None
