"""Weights of few values each: 2^bits numbers, shared by a whole weight, which are trained too.

They are for `cluster-weights` and `pack-constants`, which store which of them each number is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graphopt.contract import Bounds
from graphopt.training.prepared_weights import Form, Placed, WeightOptions

LLOYD_STEPS = 30
"""Of k-means, for the values to begin with."""

SOFT_STEPS = 5
"""Of soft k-means, in each step of training: the paper's."""

Temperature = Annotated[float, Bounds(1e-6, 1e3)]


class Shared(Form):
    """A weight whose numbers are those of a codebook.

    Args:
        weight: to begin with.
        bits: the codebook has 2^bits numbers.
        keeps_zeros: one of them is 0, and what is 0 stays so; nothing else becomes 0.
    """

    start: Tensor

    def __init__(self, weight: Tensor, bits: int, keeps_zeros: bool) -> None:
        super().__init__()
        self.keeps_zeros = keeps_zeros
        numbers = weight[weight != 0] if keeps_zeros else weight.flatten()
        self.register_buffer("start", clustered(numbers, (1 << bits) - keeps_zeros))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in numbers of the codebook, exactly so in evaluation."""
        shared = self.shared(weight.flatten()).view_as(weight)
        if not self.keeps_zeros:
            return shared
        return torch.where(weight != 0, shared, torch.zeros_like(weight))

    @abstractmethod
    def shared(self, weight: Tensor) -> Tensor:
        """Numbers of shape [numbers] in those of the codebook."""


class Assigned(Shared):
    """Each number is the nearest one of a codebook, which is trained by the gradients of its own.

    The weight itself gets the gradients of what stands for it (straight-through), so that numbers
    change over. Han et al. 2016, Deep compression (arXiv:1510.00149), whose numbers stay where they
    were first.
    """

    def __init__(self, weight: Tensor, bits: int, keeps_zeros: bool) -> None:
        super().__init__(weight, bits, keeps_zeros)
        # Weight decay draws the codebook to where it began.
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def shared(self, weight: Tensor) -> Tensor:
        """See `Shared`."""
        codebook = self.start + self.moved
        values = codebook[nearest(weight.detach(), codebook.detach())]
        return values + (weight - weight.detach())


class Attended(Shared):
    """Each number is a mean of a codebook, the nearer an entry the more it counts.

    That is differentiable k-means. With attention a of numbers w to entries c, softmax over the
    entries of -(w - c)^2 / T, entries become the means of what attends to them, a few times over,
    and numbers become a c. As T falls, this becomes k-means; in evaluation it is. Cho et al. 2022,
    DKM (arXiv:2108.12659), with the square of the distance.

    T is stated in squares of what would lie between entries, were they spread evenly over two
    standard deviations to both sides.

    Attributes:
        begun: what a step begins with, however many parts of a batch it computes.
        codebook: what it finds; the next one begins with it.
        temperature: T.
    """

    begun: Tensor
    codebook: Tensor
    temperature: Tensor

    def __init__(self, weight: Tensor, bits: int, keeps_zeros: bool, temperature: float) -> None:
        super().__init__(weight, bits, keeps_zeros)
        self.register_buffer("begun", self.start.clone())
        self.register_buffer("codebook", self.start.clone())
        self.register_buffer("temperature", torch.tensor(temperature))

    def shared(self, weight: Tensor) -> Tensor:
        """See `Shared`."""
        if not self.training:
            return self.codebook[nearest(weight, self.codebook)] + (weight - weight.detach())
        numbers = weight[weight != 0] if self.keeps_zeros else weight
        spread = 4 * numbers.detach().std(correction=0) / len(self.codebook)
        temperature = self.temperature * spread.square().clamp_min(1e-30)
        codebook = self.begun.clone()
        for _ in range(SOFT_STEPS):
            codebook = soft_means(numbers, codebook, temperature)
        self.codebook.copy_(codebook.detach())
        return (attention(weight, codebook, temperature) * codebook).sum(1)


@dataclass(frozen=True)
class Codebook(WeightOptions):
    """Numbers of a weight become few while they are trained.

    Attributes:
        bits: a weight has 2^bits numbers.
        method: dkm (soft k-means that hardens), or straight-through (nearest numbers).
        temperature: of dkm, in the first step; see `Attended`.
        last_temperature: in the last; between them it falls evenly in its logarithm.
        keep_zeros: what is 0, as after masks, stays so.
    """

    bits: Annotated[int, Bounds(1, 8)] = 4
    method: Literal["dkm", "straight-through"] = "dkm"
    temperature: Temperature = 0.5
    last_temperature: Temperature = 0.01
    keep_zeros: bool = False

    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """See `WeightOptions`."""
        if self.method == "dkm":
            return {
                name: Attended(weight, self.bits, self.keep_zeros, self.temperature)
                for name, weight in weights.items()
            }
        return {name: Assigned(w, self.bits, self.keep_zeros) for name, w in weights.items()}

    def advance(self, placed: Sequence[Placed], step: int, steps: int) -> None:
        """Lower the temperature."""
        done = step / max(steps - 1, 1)
        now = self.temperature ** (1 - done) * self.last_temperature**done
        for one in placed:
            if isinstance(one.form, Attended):
                one.form.temperature.fill_(now)
                one.form.begun.copy_(one.form.codebook)


def nearest(weight: Tensor, codebook: Tensor) -> Tensor:
    """Which entry is nearest to each number, int64 [numbers].

    Args:
        weight: [numbers].
        codebook: [entries], in any order.
    """
    levels, order = codebook.sort()
    return order[torch.bucketize(weight.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def attention(weight: Tensor, codebook: Tensor, temperature: Tensor) -> Tensor:
    """How much each entry counts for each number, [numbers, entries]; the sum over entries is 1."""
    return (-(weight[:, None] - codebook).square() / temperature).softmax(1)


def soft_means(weight: Tensor, codebook: Tensor, temperature: Tensor) -> Tensor:
    """The means of the numbers that attend to each entry; an entry that none attends to stays."""
    counts = attention(weight, codebook, temperature)
    total = counts.sum(0)
    # Not as a product of matrices, which may be told to compute in fewer bits.
    means = (weight[:, None] * counts).sum(0) / total.clamp_min(1e-6)
    return torch.where(total > 1e-6, means, codebook)


def clustered(numbers: Tensor, count: int) -> Tensor:
    """So many centroids of numbers, increasing: k-means from quantiles; of fewer numbers, repeats.

    Args:
        numbers: [numbers]; there may be none.
        count: of centroids.
    """
    if not numbers.numel():
        return torch.zeros(count)
    ordered = numbers.sort().values
    places = (torch.arange(count) + 0.5) / count * len(ordered)
    centroids = ordered[places.long()]
    for _ in range(LLOYD_STEPS):
        codes = nearest(ordered, centroids)
        sums = torch.zeros_like(centroids).scatter_add(0, codes, ordered)
        counts = torch.bincount(codes, minlength=count)
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids.sort().values
