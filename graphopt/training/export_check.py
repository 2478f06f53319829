"""Whether an exported model computes what the module does, as closely as rounding allows.

Where activations are rounded to codes, a value at a tie between two of them becomes either, by its
last bit, and outputs then differ by what a code is worth. So three things are demanded instead of
one, and no tolerance is another than for other models. The model rounds at the places of the module
by the same scales and zero points, to the bit. Without rounding, both agree on their outputs. With
it, the module is computed once more with the codes of the model in the place of its own: each of
them must be its own or, where its own lies at a tie, the neighbour; and then both agree on their
outputs too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphopt import loading
from graphopt.content import read_array
from graphopt.contract import Effect
from graphopt.errors import ModelError, SampleError
from graphopt.rewriting import constant_tensor
from graphopt.roundings import Rounding, roundings_of, without_rounding
from graphopt.runtime import Reference, Session
from graphopt.training.activations import NAME, FixedRounding
from graphopt.validation import ROUNDING_LIMITS, Comparison, OutputError, why_over

Batch = Mapping[str, Tensor]

TIE = ROUNDING_LIMITS["float32"][1]
"""How far from a tie a number may be that becomes the other code: the largest difference that is
rounding, as a share of the range of all codes."""


@dataclass(frozen=True)
class Checked:
    """An export that computes what the module does.

    Attributes:
        outputs: their errors against those of the module.
        codes: of activations, that were compared.
        ties: of those, that are the neighbours of what the module has.
    """

    outputs: tuple[OutputError, ...]
    codes: int = 0
    ties: int = 0


def check(path: Path, module: nn.Module, batches: Sequence[Batch]) -> Checked:
    """Compare an exported model with the module.

    Args:
        path: of the model.
        module: in evaluation mode.
        batches: inputs by name, in the order of the module's arguments.

    Raises:
        ModelError: they do not compute the same, or onnxruntime does not run the model.
    """
    places = {n: m for n, m in module.named_modules() if isinstance(m, FixedRounding)}
    if not places:
        return Checked(_equal(path, module, batches))
    model = loading.load(path)
    at = _roundings_at(model, places)
    with _exchanged(module, places, Clipped):
        _equal(without_rounding(model), module, batches, " where activations are not rounded")
    return _followed(model, at, module, places, batches)


def _equal(
    model: Path | ir.Model, module: nn.Module, batches: Sequence[Batch], where: str = ""
) -> tuple[OutputError, ...]:
    session, comparison = Session(model, Reference.AS_WRITTEN), Comparison()
    for batch in batches:
        _add(comparison, _outputs(module, batch), _run(session, batch))
    return _judged(comparison, where)


def _judged(comparison: Comparison, where: str = "") -> tuple[OutputError, ...]:
    errors = comparison.outputs()
    reason = why_over(Effect.ROUNDING, errors)
    if reason is not None:
        raise ModelError(
            f"the exported model does not compute what the module does: {reason}{where}"
        )
    return errors


def _add(
    comparison: Comparison, expected: Sequence[np.ndarray], found: Mapping[str, np.ndarray]
) -> None:
    if len(expected) != len(found):
        raise ModelError(
            f"the exported model has {len(found)} outputs, and the module {len(expected)}"
        )
    comparison.add(dict(zip(found, expected, strict=True)), found)


def _run(session: Session, batch: Batch) -> dict[str, np.ndarray]:
    try:
        return session.run({name: array_of(tensor) for name, tensor in batch.items()})
    except SampleError as error:
        raise ModelError(f"the exported model does not run on real samples: {error}") from error


def _outputs(module: nn.Module, batch: Batch) -> list[np.ndarray]:
    with torch.no_grad():
        return list(_arrays(module(*batch.values())))


def _arrays(outputs: Any) -> Iterator[np.ndarray]:
    if isinstance(outputs, Tensor):
        yield array_of(outputs)
        return
    for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
        yield from _arrays(value)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor as an array of its own."""
    return tensor.detach().cpu().numpy().copy()


# ------------------------------------------------------------------ rounded activations


def _roundings_at(
    model: ir.Model, places: Mapping[str, FixedRounding]
) -> dict[str, list[Rounding]]:
    """The roundings of the model by the module's that they are of.

    Raises:
        ModelError: they are not the same, to the bit.
    """
    names = {f"{name}.scale": name for name in places}
    found: dict[str, list[Rounding]] = defaultdict(list)
    for rounding in roundings_of(model):
        scale = rounding.quantize.inputs[1]
        name = names.get("" if scale is None or scale.name is None else scale.name)
        if name is None or not _is_of(rounding.quantize, places[name]):
            raise ModelError(
                f"the exported model rounds {rounding.source.name!r} in another way than the module"
            )
        found[name].append(rounding)
    for name in places:
        if name not in found:
            raise ModelError(f"the exported model does not round as {name!r} of the module does")
    return found


def _is_of(node: ir.Node, place: FixedRounding) -> bool:
    """A QuantizeLinear has the scale and the zero point of a rounding, bit for bit."""
    expected = array_of(place.scale), array_of(place.zero_point)
    tensors = [constant_tensor(value) for value in node.inputs[1:3]]
    return len(tensors) == len(expected) and all(
        tensor is not None and read_array(tensor).tobytes() == array.tobytes()
        for tensor, array in zip(tensors, expected, strict=True)
    )


class Clipped(nn.Module):
    """A rounding that does not round, but clips to the range of its codes."""

    def __init__(self, place: FixedRounding) -> None:
        super().__init__()
        self.limits = place.limits

    def forward(self, inputs: Tensor) -> Tensor:
        """The clipped input."""
        return inputs.clamp(*self.limits)


class Following(nn.Module):
    """A rounding that takes codes for its own that differ from these at ties alone.

    Args:
        place: the rounding.
        name: of it.

    Attributes:
        codes: those of each call that is to come.
        compared: how many codes were.
        ties: how many differed.
    """

    def __init__(self, place: FixedRounding, name: str) -> None:
        super().__init__()
        self.place = place
        self.name = name
        self.codes: list[Tensor] = []
        self.compared = self.ties = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """What the codes that are followed stand for.

        Raises:
            ModelError: some of them are others than ties explain.
        """
        followed, own = self.codes.pop(0).float(), self.place.codes(inputs)
        differs = followed != own
        middle = (followed + own) / 2
        is_tie = (followed - own).abs() == 1
        is_tie &= (self.place.places(inputs) - middle).abs() <= TIE * self.place.levels
        wrong = int((differs & ~is_tie).sum())
        if wrong:
            raise ModelError(
                f"the exported model rounds {wrong} of {own.numel()} numbers at {self.name!r} to "
                "other codes than the module, and not at ties"
            )
        self.compared += own.numel()
        self.ties += int(differs.sum())
        return self.place.numbers(followed)


def _followed(
    model: ir.Model,
    at: Mapping[str, Sequence[Rounding]],
    module: nn.Module,
    places: Mapping[str, FixedRounding],
    batches: Sequence[Batch],
) -> Checked:
    """Compare the outputs where the module follows the codes of the model."""
    watched = {n: [r.quantize.outputs[0] for r in roundings] for n, roundings in at.items()}
    outputs = [value.name or "" for value in model.graph.outputs]
    for values in watched.values():
        model.graph.outputs.extend(values)
    session, comparison = Session(model, Reference.AS_WRITTEN), Comparison()
    following = {name: Following(place, name) for name, place in places.items()}
    with _exchanged(module, places, {p: following[n] for n, p in places.items()}.__getitem__):
        for batch in batches:
            found = _run(session, batch)
            for name, values in watched.items():
                following[name].codes = [torch.from_numpy(found[v.name or ""]) for v in values]
            _add(comparison, _outputs(module, batch), {name: found[name] for name in outputs})
    return Checked(
        _judged(comparison),
        sum(one.compared for one in following.values()),
        sum(one.ties for one in following.values()),
    )


@contextmanager
def _exchanged(
    module: nn.Module,
    places: Mapping[str, FixedRounding],
    exchange: Callable[[FixedRounding], nn.Module],
) -> Iterator[None]:
    """Within, other modules stand in the places of roundings."""
    readers = {name: module.get_submodule(name.removesuffix(NAME).rstrip(".")) for name in places}
    for name, place in places.items():
        setattr(readers[name], NAME, exchange(place))
    try:
        yield
    finally:
        for name, place in places.items():
            setattr(readers[name], NAME, place)
