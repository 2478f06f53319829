"""How far a student is from its teacher: losses between logits, and between features.

Logits are of shape [samples, classes, ...], as those of `torch.nn.functional.cross_entropy`; what
lies behind the classes (positions, pixels) counts like samples. All losses are means over these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_DEVIATION = 1e-7
"""Is added to the deviation of logits, which are all alike where it is nothing."""


def hinton(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q) of the softmax p of the teacher and q of the student, both at temperature T.

    Hinton et al. 2015, Distilling the knowledge in a neural network (arXiv:1503.02531). The factor
    keeps gradients of one size as T grows.

    Args:
        student: logits, float32 [samples, classes, ...].
        teacher: logits of that shape.
        temperature: T, above 0.

    Returns:
        A scalar.
    """
    divergence = _divergence(
        functional.log_softmax(teacher / temperature, 1),
        functional.log_softmax(student / temperature, 1),
    )
    return temperature**2 * divergence.mean()


def decoupled(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    target_weight: float,
    other_weight: float,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): what Hinton's loss is made of, weighed apart.

    With p_t the teacher's probability of the target, KL = TCKD + (1 - p_t) NCKD: the divergence of
    target against all others, and that among the others, which a sure teacher drowns in the first.
    Zhao et al. 2022, Decoupled knowledge distillation (arXiv:2203.08679).

    Args:
        student: logits, float32 [samples, classes, ...].
        teacher: logits of that shape.
        targets: int64 [samples, ...], the right class of each.
        temperature: T, above 0.
        target_weight: alpha.
        other_weight: beta.

    Returns:
        A scalar.
    """
    pairs = [_target_and_others(_rows(z) / temperature, targets) for z in (teacher, student)]
    (target, others), (student_target, student_others) = pairs
    of_target = _divergence(target, student_target).mean()
    of_others = _divergence(others, student_others).mean()
    return temperature**2 * (target_weight * of_target + other_weight * of_others)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of logits; Ba and Caruana 2014 (arXiv:1312.6184)."""
    return functional.mse_loss(student, teacher)


def standardized(logits: Tensor) -> Tensor:
    """Logits of mean 0 and deviation 1 over the classes.

    So the student need not have the teacher's range of logits, and a temperature fits all samples.
    Sun et al. 2024, Logit standardization in knowledge distillation (arXiv:2403.01427).

    Args:
        logits: float32 [samples, classes, ...].
    """
    mean = logits.mean(1, keepdim=True)
    deviation = logits.std(1, keepdim=True, correction=0)
    return (logits - mean) / (deviation + SMALLEST_DEVIATION)


def normalized_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """|f - g|^2 / |g|^2 of the features of each sample, the mean over samples.

    Of Romero et al. 2015, FitNets (arXiv:1412.6550), over the size of what is to be learnt: layers
    of large numbers count like others.

    Args:
        student: f, in the shape of the teacher's, float32 [samples, ...].
        teacher: g.

    Returns:
        A scalar.
    """
    change = (student - teacher).flatten(1).square().sum(1)
    size = teacher.flatten(1).square().sum(1)
    return (change / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()


def _rows(logits: Tensor) -> Tensor:
    """Logits as [rows, classes], each sample and position a row."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _target_and_others(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of probabilities: of target and not target [rows, 2], and among the others.

    Args:
        rows: logits over temperature, [rows, classes].
        targets: int64, as many as rows.
    """
    places = targets.reshape(-1, 1)
    is_other = torch.ones_like(rows, dtype=torch.bool).scatter(1, places, False)
    others = rows[is_other].reshape(len(rows), -1)
    whole = rows.logsumexp(1, keepdim=True)
    binary = torch.cat([rows.gather(1, places), others.logsumexp(1, keepdim=True)], 1) - whole
    return binary, functional.log_softmax(others, 1)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p || q) over axis 1 of the logarithms of p and q."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
