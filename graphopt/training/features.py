"""Features of a student beside those of its teacher: adapters to the teacher's width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from graphopt.errors import ConfigError
from graphopt.training.distillation_losses import normalized_squared
from graphopt.training.objectives import in_float32


class Adapter(nn.Module):
    """How far features of a student are from the teacher's, after a linear map to its width.

    The map is a 1x1 convolution where channels lie along axis 1, and is trained with the student:
    its width need not be the teacher's, nor its basis (Romero et al. 2015, arXiv:1412.6550). Images
    of two sizes are compared at the smaller one, on means over what becomes one pixel.

    Args:
        width: of the student.
        teacher_width: of the teacher.
        channels_last: channels lie along the last axis.
    """

    def __init__(self, width: int, teacher_width: int, channels_last: bool) -> None:
        super().__init__()
        self.map = nn.Linear(width, teacher_width)
        self.channels_last = channels_last

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features, each [samples, ...]; a scalar."""
        student, teacher = in_float32(student), in_float32(teacher)
        if student.ndim == 4 and not self.channels_last:
            student, teacher = _of_one_size(student, teacher)
        if self.channels_last:
            return normalized_squared(in_float32(self.map(student)), teacher)
        mapped = in_float32(self.map(student.movedim(1, -1))).movedim(-1, 1)
        return normalized_squared(mapped, teacher)


def adapter_of(name: str, student: Tensor, teacher: Tensor) -> Adapter:
    """The adapter for features of these shapes.

    Args:
        name: of the student's layer, for messages.
        student: its features for a few samples: [samples, channels, height, width], [samples,
            positions, channels], [samples, channels, positions] or [samples, channels].
        teacher: the teacher's.

    Raises:
        ConfigError: they cannot be compared.
    """
    mismatch = ConfigError(
        f"distill.features: {name!r} gives shape {list(student.shape)} and the teacher "
        f"{list(teacher.shape)}; they must agree but for channels and the size of images"
    )
    if not 2 <= student.ndim <= 4 or student.ndim != teacher.ndim:
        raise mismatch
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise mismatch
    if student.ndim == 4:
        return Adapter(student.shape[1], teacher.shape[1], channels_last=False)
    if student.shape[:-1] == teacher.shape[:-1]:
        return Adapter(student.shape[-1], teacher.shape[-1], channels_last=True)
    if student.shape[2:] == teacher.shape[2:] and len(student) == len(teacher):
        return Adapter(student.shape[1], teacher.shape[1], channels_last=False)
    raise mismatch


def _of_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Images [samples, channels, height, width] at the smaller height and width of both."""
    height, width = map(min, zip(student.shape[2:], teacher.shape[2:], strict=True))
    size = (height, width)
    pool = functional.adaptive_avg_pool2d
    return pool(student, size), pool(teacher, size)
