"""What a layer should give so that the model does what it did, of what it reads now.

Where the output of a layer is added to another value, the layer can also make good for what the
other value has lost: it should give the sum as it was, less the other value as it is now.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.observe import Question, Statistics
from graphopt.operators import is_onnx
from graphopt.regression import Regression
from graphopt.rewriting import Names, add_initializer, only_reader, tensor_of
from graphopt_passes.prune.entries import ROUNDING
from graphopt_passes.prune.tails import averaged
from graphopt_passes.quantize.layers import GRAM_INPUTS_MAXIMUM, Layer, is_scaled
from graphopt_passes.quantize.narrow_weights import shift_bias
from graphopt_passes.quantize.twins import side_by_side, values_of

GAIN_MAXIMUM = 2.0
GAIN_ROWS = 16
"""Of so few rows half of the gain is believed: how outputs vary on one row is no variance."""

Kept = Mapping[str, Mapping[int, np.ndarray]]
"""By the name of a value and an axis: int64 [n], the indices that stay, rising."""

EVERYTHING: Kept = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Aim:
    """A least-squares problem: the weight W with the least E |W z + b - t|^2.

    Attributes:
        moments: E[z z^T], about the means where there may be a bias; [group, inputs, inputs].
        cross: E[t z^T], likewise; [group, outputs, inputs].
        squares: E[t^2], likewise; [group, outputs].
        read_means: of z, [group, inputs].
        given_means: of t, [group, outputs].
        rows: that were seen.
        makes_good: t also holds what another operand of a sum has lost.
    """

    moments: np.ndarray
    cross: np.ndarray
    squares: np.ndarray
    read_means: np.ndarray
    given_means: np.ndarray
    rows: int
    makes_good: bool = False

    def weight(self, near: np.ndarray, damped: np.ndarray) -> np.ndarray:
        """The solution without zeros, drawn to a weight by what was added to the moments.

        Args:
            near: of shape [group, outputs, inputs].
            damped: the moments with something added to the diagonal.
        """
        rest = self.cross - np.matmul(near, self.moments)
        return np.asarray(
            near + np.linalg.solve(damped, rest.transpose(0, 2, 1)).transpose(0, 2, 1)
        )

    def with_variance(self, weight: np.ndarray) -> np.ndarray:
        """The weight with a gain for each output, so that it varies as it should.

        Least squares with few entries give what they can foretell, which varies less; later layers
        were made for what varied as before. That is the repair of activation statistics (arXiv
        2605.21426): cifar_resnet20 with 70 % zeros loses 5.2 points with it, 7.6 without.

        Args:
            weight: of shape [group, outputs, inputs].
        """
        power = np.einsum("gnk,gnk->gn", np.matmul(weight, self.moments), weight)
        usable = (power > self._rounding(weight)) & (self.squares > 0)
        ratio = np.divide(self.squares, power, out=np.ones_like(power), where=usable)
        gain = np.sqrt(np.minimum(ratio, GAIN_MAXIMUM**2))
        believed = 1 + (gain - 1) * (self.rows / (self.rows + GAIN_ROWS))
        return np.asarray(weight * believed[:, :, np.newaxis])

    def missed(self, weight: np.ndarray) -> float:
        """E |W z + b - t|^2 with the best bias, if there is one; summed over the outputs."""
        given = np.einsum("gnk,gnk->", np.matmul(weight, self.moments), weight)
        return float(self.squares.sum() - 2 * np.einsum("gnk,gnk->", weight, self.cross) + given)

    def _rounding(self, weight: np.ndarray) -> np.ndarray:
        """What may be seen of the variance of outputs where inputs do not vary at all."""
        power = np.einsum("gkk->g", self.moments) + np.square(self.read_means).sum(axis=1)
        return np.asarray(ROUNDING * power[:, np.newaxis] * np.square(weight).sum(axis=2))

    def bias(self, weight: np.ndarray) -> np.ndarray:
        """With which the means of the outputs are as they should be; [group * outputs]."""
        given = np.einsum("gnk,gk->gn", weight, self.read_means)
        return np.asarray((self.given_means - given).reshape(-1))


def give(layer: Layer, weight: np.ndarray, aim: Aim, names: Names, context: Context) -> None:
    """Let a layer have another weight, and the bias with which its means are right.

    Args:
        layer: rewritten in place.
        weight: of shape [group, outputs, inputs].
        aim: of the layer.
        names: of its model.
        context: keeps what is large.
    """
    value, tensor = layer.weight, layer.weight.const_value
    assert tensor is not None
    array = layer.stored(weight).astype(tensor.dtype.numpy())
    value.const_value = context.tensor(array, value.name or "")
    if layer.can_correct_bias:
        old = layer.bias()
        shift_bias(layer, aim.bias(weight) - (0.0 if old is None else old), names, context)


def reading_the_same(layers: Sequence[Layer | None]) -> list[list[Layer | None]]:
    """Layers in order, those of one value next to each other together: they need one look.

    But what is added to something makes good for what that has lost until its turn comes. None
    stands for what is no layer, and is by itself.
    """
    found: list[list[Layer | None]] = []
    for layer in layers:
        last = found[-1][-1] if found else None
        alike = last is not None and layer is not None and last.source is layer.source
        if alike and layer is not None and not sum_of(layer)[1]:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def has_aim(layer: Layer) -> bool:
    """What the layer reads and gives can be looked at, as rows of one matrix."""
    if is_scaled(layer.node) or layer.node.attributes.get_int("transA", False):
        return False
    return layer.dimensions[2] <= GRAM_INPUTS_MAXIMUM


def aim_of(
    layer: Layer, model: ir.Model, before: ir.Model, context: Context, kept: Kept = EVERYTHING
) -> Aim | None:
    """What a layer reads now, and what it should give; see `aims_of`."""
    (found,) = aims_of([layer], model, before, context, kept)
    return found


def aims_of(
    layers: Sequence[Layer],
    model: ir.Model,
    before: ir.Model,
    context: Context,
    kept: Kept = EVERYTHING,
    pooled: Container[str] = (),
) -> list[Aim | None]:
    """What layers read now, and what they should give; None where no sample reaches one.

    Args:
        layers: of the model.
        model: as it is now.
        before: the same model, as it was.
        context: with samples.
        kept: where the model has only some indices along an axis of a value, those.
        pooled: the names of values of which the model has the means of neighbours; see `tails`.
    """
    twin, theirs = side_by_side(model, before)
    questions = []
    for layer in layers:
        given, others = sum_of(layer)
        aim = theirs[given.name or ""]
        if given.name in pooled:
            aim = averaged(aim, twin, Names(twin))
        for axis, indices in kept.get(given.name or "", {}).items():
            aim = _picked(aim, axis, indices, twin)
        for other in values_of(twin, [v.name or "" for v in others]):
            aim = _difference(aim, other, twin)
        source = layer.source.name or ""
        questions.append(Question(source, "regression", patches=layer.patches(), aim=aim.name))
    answers = context.observe(twin, questions, remembers=False)
    pairs = zip(layers, questions, strict=True)
    return [_aim(layer, answers[question]) for layer, question in pairs]


def _aim(layer: Layer, seen: Statistics) -> Aim | None:
    if not isinstance(seen, Regression) or not seen.rows or not np.isfinite(seen.total).all():
        return None
    moments, cross, squares = seen.moments(central=layer.can_correct_bias)
    makes_good = bool(sum_of(layer)[1])
    return Aim(moments, cross, squares, seen.means, seen.aim_means, seen.rows, makes_good)


def sum_of(layer: Layer) -> tuple[ir.Value, list[ir.Value]]:
    """The sum that the output of the layer goes into, and what else does; or the output alone."""
    given, others = layer.node.outputs[0], []
    while (node := only_reader(given)) is not None and is_onnx(node, "Add"):
        if node.graph is not layer.node.graph:
            break
        other = node.inputs[1] if node.inputs[0] is given else node.inputs[0]
        if other is None or other is given or not _is_alike(other, given):
            break
        others.append(other)
        given = node.outputs[0]
    return given, others


def _is_alike(other: ir.Value, value: ir.Value) -> bool:
    """A computed value of the same shape."""
    if other.producer() is None or other.shape is None or value.shape is None:
        return False
    return other.shape == value.shape and other.dtype == value.dtype


def _picked(value: ir.Value, axis: int, indices: np.ndarray, model: ir.Model) -> ir.Value:
    names = Names(model)
    picks = add_initializer(model.graph, tensor_of(indices, ""), names.new("picks"))
    node = ir.node("Gather", [value, picks], {"axis": axis}, name="")
    (output,) = node.outputs
    output.name = names.new("aim")
    output.type = value.type
    model.graph.append(node)
    return output


def _difference(first: ir.Value, second: ir.Value, model: ir.Model) -> ir.Value:
    node = ir.node("Sub", [first, second], name="")
    (output,) = node.outputs
    output.name = Names(model).new("aim")
    output.type = second.type
    model.graph.append(node)
    return output
