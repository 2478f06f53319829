"""What a training run is told: one frozen dataclass for each section of its TOML file.

The fields are the keys; types, bounds and defaults are checked and printed from them alone.
`graphopt.training.reading` makes a `Config` of a file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from graphopt.errors import ConfigError
from graphopt.spec import Bounds, describe_type, has_type, options_of

Precision = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Bounds(1)]
Table = dict[str, Any]

INFINITE = Bounds(0, 3.4e38)
"""Of a number that must not be negative nor infinite."""


@dataclass(frozen=True)
class Section:
    """One section of the file.

    Raises:
        ConfigError: a value has the wrong type or is out of its bounds.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            value = getattr(self, option.field)
            where = f"{self.section}.{option.field}"
            if not has_type(value, option.type):
                kind = describe_type(option.type)
                raise ConfigError(f"{where} is {value!r}; it must be {kind}")
            if option.bounds is not None and value is not None and value not in option.bounds:
                raise ConfigError(f"{where} is {value}; it must be {option.bounds}")


@dataclass(frozen=True)
class Model(Section):
    """What is trained.

    Attributes:
        factory: import path `package.module:callable` of what makes the untrained torch module.
        options: its keyword arguments.
    """

    section: ClassVar[str] = "model"
    factory: str
    options: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Data(Section):
    """What it is trained on.

    Attributes:
        factory: import path of what makes the two data sets, `(train, validation)`; validation may
            be None. Each has a length, and items `(inputs, target)`: an array, a tensor or a tuple
            of them, in the order of the arguments of the module's forward; and a number, an array,
            a tensor or None.
        options: its keyword arguments, as they are; paths in them are its own matter.
        batch_size: samples of one optimizer step over all processes, whatever the strategy.
        drop_last: leave out the last batch of an epoch where it is smaller than the others; batch
            normalization, for one, cannot train on a single sample.
        workers: processes that load samples ahead, for each training process; 0 loads in place.
    """

    section: ClassVar[str] = "data"
    factory: str
    options: Table = field(default_factory=dict)
    batch_size: Count = 64
    drop_last: bool = False
    workers: Annotated[int, Bounds(0)] = 0


@dataclass(frozen=True)
class Optimizer(Section):
    """What turns gradients into steps.

    Attributes:
        name: a class of `torch.optim` in small letters, or an import path.
        learning_rate: the highest one that the schedule reaches.
        weight_decay: the optimizer's own default if None.
        options: further keyword arguments of the class.
    """

    section: ClassVar[str] = "optimizer"
    name: str = "adamw"
    learning_rate: Annotated[float, INFINITE] = 1e-3
    weight_decay: Annotated[float | None, INFINITE] = None
    options: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule(Section):
    """How the learning rate changes from step to step.

    Attributes:
        name: constant; linear or cosine, which fall to `final_factor`; or one-cycle, which rises
            and falls in half cosines (Smith and Topin, arXiv:1708.07120).
        warmup_steps: steps of rising at the start; of one-cycle, 30 % of all if None.
        final_factor: the last learning rate as a share of the highest.
    """

    section: ClassVar[str] = "schedule"
    name: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    warmup_steps: Annotated[int | None, Bounds(0)] = None
    final_factor: Annotated[float, Bounds(0, 1)] = 0.0


@dataclass(frozen=True)
class Training(Section):
    """How long, and in which numbers.

    Attributes:
        epochs: passes over the training data.
        seed: of the initial weights, the order of samples and dropout.
        loss: cross-entropy (a target of -100 has no label, and adds nothing to the mean), mse, l1,
            smooth-l1, binary-cross-entropy (of logits), or the import path of a callable of outputs
            and targets that gives the mean over the batch.
        precision: of the arithmetic; weights are float32 in any case.
        accumulation: parts that each process computes its share of a batch in, one by one.
        gradient_clip_norm: the largest norm of all gradients together; None leaves them as they
            are.
        threads: of one process on the CPU; torch's own choice if None.
        device: auto takes CUDA where it is there.
    """

    section: ClassVar[str] = "training"
    epochs: Count = 1
    seed: Annotated[int, Bounds(0, 2**62)] = 0
    loss: str = "cross-entropy"
    precision: Precision = "float32"
    accumulation: Count = 1
    gradient_clip_norm: Annotated[float | None, Bounds(1e-30)] = None
    threads: Annotated[int | None, Bounds(1)] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Strategy(Section):
    """How the work is divided between processes.

    Attributes:
        name: single, ddp, fsdp, tensor, pipeline, or two of them as in "ddp x tensor".
        sizes: processes along each word of the name; their product is the number of processes.
            May be left out for one word.
        plan: of tensor: how modules are divided, by pattern of their names; column,
            column-whole, row or sequence (see `graphopt.training.tensor`).
        layers: of fsdp: patterns of the names of modules that are gathered one at a time; the
            elements of the outermost lists of modules if empty.
        stages: of pipeline: the names of the modules that each stage but the first begins with.
        schedule: of pipeline: gpipe (all forwards, then all backwards) or 1f1b (alternating).
        microbatches: of pipeline: parts that a batch passes the stages in.
        timeout_s: how long a process waits for the others before the run fails.
    """

    section: ClassVar[str] = "strategy"
    name: str = "single"
    sizes: tuple[int, ...] = ()
    plan: dict[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    microbatches: Count = 4
    timeout_s: Annotated[float, Bounds(1, 86400)] = 300.0


@dataclass(frozen=True)
class Checkpoint(Section):
    """What a run that was killed can go on from.

    Attributes:
        folder: where checkpoints are written; None writes none.
        every_steps: optimizer steps between them; one at the end of each epoch if None.
        keep: so many, the newest, stay.
    """

    section: ClassVar[str] = "checkpoint"
    folder: str | None = None
    every_steps: Annotated[int | None, Bounds(1)] = None
    keep: Count = 2


@dataclass(frozen=True)
class Validation(Section):
    """What tells how good the model is after each epoch.

    Attributes:
        metric: accuracy (of what has a label), loss, or the import path of a callable of outputs
            and targets that gives the mean over the batch.
        goal: whether the metric should be large ("max") or small ("min"); by the metric's name if
            None, and "max" for an import path.
        keep_best: in the end, the model is that of the best epoch; the last one on a tie.
        batch_size: samples that are computed at once; that of the training if None.
    """

    section: ClassVar[str] = "validation"
    metric: str = "accuracy"
    goal: Literal["max", "min"] | None = None
    keep_best: bool = True
    batch_size: Annotated[int | None, Bounds(1)] = None


@dataclass(frozen=True)
class Export(Section):
    """The ONNX file that is made in the end.

    Attributes:
        path: of the file; None exports nothing.
        input_names: the names of the arguments of the module's forward if empty.
        output_names: the exporter's own if empty.
        dynamic_axes: names of the dimensions of inputs that may have any size, by input and axis,
            for example `{image = {0 = "batch"}}`; the first axis of each input if empty.
        opset: of the default operators.
        samples: validation samples on which the file is compared with the module.
    """

    section: ClassVar[str] = "export"
    path: str | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    dynamic_axes: dict[str, dict[str, str]] = field(default_factory=dict)
    opset: Annotated[int, Bounds(18, 25)] = 18
    samples: Annotated[int, Bounds(2)] = 32


@dataclass(frozen=True)
class Optimize(Section):
    """What `graphopt.optimize` does to the exported file; it runs if the section is there.

    Attributes:
        output: the file to write; beside the exported one, with `.optimized` in its name, if None.
        recipe: its name; basic if neither this nor `passes` is given.
        passes: in text form.
        samples: validation samples that it calibrates and judges with.
        max_error: error budgets of lossy passes, in text form.
        require: what must hold in the end, in text form.
        benchmark: time the result.
    """

    section: ClassVar[str] = "optimize"
    output: str | None = None
    recipe: str | None = None
    passes: str | None = None
    samples: Annotated[int, Bounds(2)] = 64
    max_error: tuple[str, ...] = ()
    require: str | None = None
    benchmark: bool = True


@dataclass(frozen=True)
class Log(Section):
    """The record of a run, one JSON object a line.

    Attributes:
        path: of the file; None writes none.
        every_steps: steps between two lines on a step.
    """

    section: ClassVar[str] = "log"
    path: str | None = None
    every_steps: Count = 1


@dataclass(frozen=True)
class Config:
    """A whole training run.

    Attributes:
        folder: that relative paths are relative to; import paths may name modules in it.
        distill: the table `[distill]` as it was written; None if it is not there.
        prepare: the tables `[[prepare]]` as they were written.
        optimize: None if the run ends with the export.
    """

    model: Model
    data: Data
    folder: Path = Path()
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    strategy: Strategy = field(default_factory=Strategy)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    export: Export = field(default_factory=Export)
    optimize: Optimize | None = None
    log: Log = field(default_factory=Log)
    distill: Table | None = None
    prepare: tuple[Table, ...] = ()

    def path(self, text: str) -> Path:
        """A path of the file, from where the process is."""
        return self.folder / text

    def as_table(self) -> Table:
        """All values by section and key, without the folder: what JSON can hold."""
        table = dataclasses.asdict(self)
        del table["folder"]
        return table

    def curve(self) -> Table:
        """What the numbers of every step depend on: a checkpoint of one serves no other."""
        table = self.as_table()
        for name in ("checkpoint", "export", "optimize", "log"):
            del table[name]
        del table["strategy"]["timeout_s"]
        del table["data"]["workers"]
        return table
