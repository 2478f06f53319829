"""Weights that are trained in the form in which a pass will store them.

Each chosen weight W gets a parametrization of `torch.nn.utils.parametrize`: what is trained is
another tensor, and the module computes with a form of it: masked, on a grid, of few values. In
training a form may be soft; in evaluation it is the one that stays, so that epochs are judged by
what will be exported. Several forms of one weight are applied in the order of the configuration.

Gradients pass what has none by the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432): the derivative of a rounding is taken to be that of what was rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Final

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from graphopt.contract import Bounds
from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.config import Section

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding

KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Modules whose weight has its outputs along axis 0."""


class Form(nn.Module, ABC):
    """What a weight is computed as."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The form of a weight, float32, in its shape."""


@dataclass(frozen=True)
class Placed:
    """A form in its place.

    Attributes:
        layer: that computes with the weight.
        form: of the weight.
    """

    layer: nn.Module
    form: Form

    def trained(self) -> Tensor:
        """What is trained, whole also where processes hold parts of it; without gradients."""
        tensor = self.layer.get_parameter("parametrizations.weight.original").detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class WeightOptions(Section):
    """What all preparations of weights are told.

    Attributes:
        name: of the preparation.
        layers: patterns of the names of modules, as the shell has them. Of those that match, the
            weights of Linear, Conv and Embedding are prepared.
        skip: patterns of those that are not.
        min_elements: smaller weights are not; passes leave them alone too.
    """

    section: ClassVar[str] = "prepare"
    name: str
    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    min_elements: Annotated[int, Bounds(1)] = 256

    @abstractmethod
    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """A form for each weight, by the name of its module.

        Raises:
            ConfigError: a weight cannot have this form.
        """

    def advance(self, placed: Sequence[Placed], step: int, steps: int) -> None:
        """What changes from step to step; see `Preparation`. Nothing, if not said otherwise."""

    def is_settled(self, step: int, steps: int) -> bool:
        """See `Preparation`."""
        return True

    @property
    def sees_all_weights(self) -> bool:
        """One weight's form depends on the others."""
        return False


class PreparedWeights:
    """Weights that are trained in a form; see `graphopt.training.preparation.Preparation`."""

    def __init__(self, options: WeightOptions) -> None:
        self.options = options
        self._placed: dict[str, Placed] = {}

    def attach(self, module: nn.Module) -> None:
        """Give the chosen weights their forms.

        Raises:
            ConfigError: no weight is chosen, or one cannot have the form.
        """
        layers = chosen_layers(module, self.options)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        for name, form in self.options.forms(weights).items():
            layer = layers[name]
            parametrize.register_parametrization(layer, "weight", form)
            self._placed[name] = Placed(layer, form)

    def advance(self, step: int, steps: int) -> None:
        """See `Preparation`."""
        self.options.advance(tuple(self._placed.values()), step, steps)

    def gather(self) -> None:
        """See `Preparation`: what weights become is the same on all processes."""

    def is_settled(self, step: int, steps: int) -> bool:
        """See `Preparation`."""
        return self.options.is_settled(step, steps)

    def finish(self, module: nn.Module) -> None:
        """Leave the weights in their last forms, as plain parameters."""
        for name in self._placed:
            layer = module.get_submodule(name)
            if not parametrize.is_parametrized(layer, "weight"):
                # Another preparation of the same weight was first; that took all forms away.
                continue
            layer.get_submodule("parametrizations").eval()
            parametrize.remove_parametrizations(layer, "weight")


def chosen_layers(module: nn.Module, options: WeightOptions) -> dict[str, Layer]:
    """The modules whose weights are prepared, by name.

    Raises:
        ConfigError: a pattern matches none, all are left out, or a chosen weight is shared.
    """
    matching = matching_layers(module, options)
    chosen = {n: m for n, m in matching.items() if m.weight.numel() >= options.min_elements}
    if not chosen:
        raise ConfigError(
            f"[[prepare]] {options.name!r} has no weight: none of those that layers and skip "
            f"leave has {options.min_elements} elements; lower min_elements"
        )
    _check_own(module, chosen)
    return chosen


def matching_layers(module: nn.Module, options: WeightOptions) -> dict[str, Layer]:
    """The modules that layers and skip leave, by name, whatever the size of their weights.

    Raises:
        ConfigError: a pattern matches none.
    """
    named = {name: m for name, m in module.named_modules() if name and isinstance(m, KINDS)}
    for key, patterns in (("layers", options.layers), ("skip", options.skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                near = did_you_mean(pattern, named)
                raise ConfigError(
                    f"prepare.{key} of {options.name!r}: {pattern!r} is no Linear, Conv or "
                    f"Embedding{near}"
                )
    return {
        name: layer
        for name, layer in named.items()
        if _matches(name, options.layers) and not _matches(name, options.skip)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_own(module: nn.Module, chosen: Mapping[str, Layer]) -> None:
    """A weight that two modules share would become two."""
    holders: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            continue
        names = holders[id(layer.weight)]
        if len(names) > 1:
            raise ConfigError(
                f"[[prepare]]: the weight of {name!r} is shared, as {' and '.join(names)}; name it "
                "in skip"
            )


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The numbers of the first, exactly, with the gradient of the second."""
    return hard.detach() + (soft - soft.detach())


def in_half(scales: Tensor) -> Tensor:
    """Scales rounded to numbers of float16, of the same sign, with straight-through gradients.

    Passes store them so; and the product with a number of 13 bits is then exact in float32.
    """
    limits = (2.0**-14, 65504.0)
    sizes = scales.abs().clamp(*limits)
    return straight_through(sizes.half().float(), sizes) * scales.detach().sign()
