"""Treatments: what can be done to single layers, from the entry-point group `graphopt.probes`.

The engine knows no pass by name. A treatment says which layers of a model it is for and what each
of them can be given, and makes passes, in text form, of what each is to get. So what was found for
a model is a pipeline that anyone can run again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.registry import entry_points_by_name, registered

TREATMENTS_GROUP = "graphopt.probes"


@dataclass(frozen=True)
class Layer:
    """A layer that a treatment is for.

    Attributes:
        name: by which `Treatment.passes` knows it: that of its weight.
        operator: that reads the weight.
        elements: of the weight.
        stored_bytes: that the weight takes in the file.
    """

    name: str
    operator: str
    elements: int
    stored_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What an option is expected to do to a layer, before it is tried.

    Attributes:
        stored_bytes: that the layer takes in the file then.
        square: the squared error of the layer's own output, in any unit that its options share.
    """

    stored_bytes: int
    square: float


class Treatment(ABC):
    """Something that can be done to single layers.

    Attributes:
        summary: one line for a user.
        options: what a layer can be given, the mildest first.
        probed: those of them that are tried; what others do follows from the estimates.
        provider: on which it is of use; None for any.
    """

    summary: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    probed: ClassVar[tuple[str, ...]]
    provider: ClassVar[str | None] = None

    @abstractmethod
    def layers(self, model: ir.Model) -> list[Layer]:
        """The layers of a model that it is for, in order.

        Args:
            model: not modified.
        """

    @abstractmethod
    def passes(self, chosen: Mapping[str, str]) -> str:
        """The passes, in text form, that give layers what is chosen, and leave all others alone.

        Args:
            chosen: options by the names of layers; one at least.
        """

    def estimates(
        self, model: ir.Model, layers: Sequence[str], context: Context
    ) -> dict[str, dict[str, Estimate]]:
        """What options are expected to do: by layer, then by option.

        Args:
            model: not modified.
            layers: names of some of its layers.
            context: with samples.

        Returns:
            Nothing of layers all of whose options are to be tried.
        """
        return {}


def treatment_names() -> list[str]:
    """The names of all registered treatments, sorted."""
    return list(entry_points_by_name(TREATMENTS_GROUP))


def treatment(name: str) -> Treatment:
    """A registered treatment.

    Raises:
        SpecError: there is none of that name, or what is registered is none.
    """
    found: type[Treatment] = registered(
        TREATMENTS_GROUP,
        name,
        "treatment",
        lambda one: isinstance(one, type) and issubclass(one, Treatment),
    )
    return found()
