"""Where the units of a group leave it: sums over what they give, weighted by constants.

What a sum loses without some units is least where the weights of the others make good for it. With
rows z of what is summed, their moments H = E[z z^T] and a weight W, that is, with the columns P of
the units that go and S of those that stay,

    W'_S = W_S + W_P H_PS H_SS^-1
    b' = b + W E[z] - W'_S E[z_S]

(He, Zhang and Sun 2017, arXiv 1707.06168; for one unit after the other, optimal brain surgeon.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Context
from graphopt.groups import Consumer, Group
from graphopt.observe import Question
from graphopt.operators import RECURRENT, is_onnx
from graphopt.rewriting import Names, constant_tensor, input_of
from graphopt.statistics import Gram, Patches
from graphopt_passes.prune.entries import Floats
from graphopt_passes.prune.removal import set_constant
from graphopt_passes.quantize.layers import GRAM_INPUTS_MAXIMUM, Layer, layer_of
from graphopt_passes.quantize.narrow_weights import shift_bias

TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)

GRAM_BYTES_MAXIMUM = 256 << 20
"""Of the moments that are looked at together."""


ROWS_ALIKE = 5
"""Rows of one sample are much alike: so many say as much as one of another sample."""

RIDGES = (0.003, 1.0)
"""Share of the diagonal that is added to moments, at least and at most."""


def shrunk(moments: Floats, rows: int) -> Floats:
    """Moments with a share of their diagonal added to it: more, the fewer rows were seen.

    Where samples are few, a weight that makes good for others on these samples does not on others.

    Args:
        moments: of shape [groups, inputs, inputs].
        rows: of which they are made.
    """
    inputs = moments.shape[-1]
    share = np.clip(ROWS_ALIKE * inputs / max(rows, 1), *RIDGES)
    diagonal = np.einsum("gkk->gk", moments)
    mean = np.maximum(diagonal.mean(axis=1, keepdims=True), 0)
    # Where no input is ever other than zero, any weight will do.
    added = np.where(mean > 0, share * (np.maximum(diagonal, 0) + 0.01 * mean), 1.0)
    return np.asarray(moments + added[:, :, np.newaxis] * np.eye(inputs))


@dataclass(frozen=True, eq=False)
class Sink:
    """A consumer of a group, as a matrix that is applied to rows.

    Attributes:
        consumer: of the group.
        matrix: float64 [groups, outputs, inputs].
        moments: what it is multiplied with, damped, float64 [groups, inputs, inputs].
        means: of the rows, float64 [groups, inputs]; None where no bias can make good for them.
        columns: int64 [units, columns of each]; the inputs that belong to each unit.
    """

    consumer: Consumer
    matrix: Floats
    moments: Floats
    means: Floats | None
    columns: np.ndarray

    @property
    def energy(self) -> float:
        """E |W z|^2, summed over the outputs."""
        pushed = np.matmul(self.matrix, self.moments)
        return max(float(np.einsum("gnk,gnk->", pushed, self.matrix)), 1e-30)

    def shift(self, matrix: Floats) -> np.ndarray:
        """What another matrix takes from the means of the outputs; [groups * outputs]."""
        if self.means is None:
            return np.zeros(matrix.shape[0] * matrix.shape[1])
        return np.asarray(np.einsum("gnk,gk->gn", self.matrix - matrix, self.means)).reshape(-1)

    def without(self, gone: np.ndarray) -> Floats:
        """The matrix with some columns at zero, and others that make good for them.

        Args:
            gone: bool [inputs].
        """
        found = np.zeros_like(self.matrix)
        stays = ~gone
        cross = self.moments[:, gone][:, :, stays]
        within = self.moments[:, stays][:, :, stays]
        made_good = np.linalg.solve(within, cross.transpose(0, 2, 1)).transpose(0, 2, 1)
        found[:, :, stays] = self.matrix[:, :, stays] + self.matrix[:, :, gone] @ made_good
        return found


def why_without_sinks(group: Group) -> str | None:
    """Why what the units of a group are worth cannot be told; None where it can."""
    for consumer in group.consumers:
        tensor = constant_tensor(consumer.weight)
        if tensor is None or tensor.dtype not in TYPES:
            return "weights that read it are packed, on codes or no float32; prune before"
        if _columns(group, consumer) is None:
            return "its units are of different sizes"
    return None


def batches(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups, a few at a time, so that moments take little memory."""
    batch: list[Group] = []
    taken = 0
    for group in groups:
        size = sum(_moments_bytes(consumer) for consumer in group.consumers)
        if batch and taken + size > GRAM_BYTES_MAXIMUM:
            yield batch
            batch, taken = [], 0
        batch.append(group)
        taken += size
    if batch:
        yield batch


def sinks_of(groups: Iterable[Group], model: ir.Model, context: Context) -> dict[Group, list[Sink]]:
    """The consumers of groups as matrices, with what the samples say of their inputs.

    Args:
        groups: of the model; see `why_without_sinks`.
        model: not modified.
        context: with samples.
    """
    groups = list(groups)
    asked = {c: q for g in groups for c in g.consumers if (q := _question(c, model)) is not None}
    answers = context.observe(model, asked.values(), remembers=False) if asked else {}
    found = {}
    for group in groups:
        of_group = []
        for consumer in group.consumers:
            columns = _columns(group, consumer)
            assert columns is not None
            question = asked.get(consumer)
            gram = answers[question] if question is not None else None
            of_group.append(_sink(consumer, columns, gram if isinstance(gram, Gram) else None))
        found[group] = of_group
    return found


def _sink(consumer: Consumer, channels: np.ndarray, gram: Gram | None) -> Sink:
    matrix, taps = _matrix_of(consumer)
    columns = channels[:, :, np.newaxis] * taps + np.arange(taps)
    columns = columns.reshape(len(channels), -1)
    inputs = matrix.shape[2]
    if gram is None or not gram.rows or not np.isfinite(gram.total).all():
        identity = np.broadcast_to(np.eye(inputs), (len(matrix), inputs, inputs))
        return Sink(consumer, matrix, np.array(identity), None, columns)
    central = _corrects_bias(consumer)
    moments = shrunk(gram.covariance if central else gram.mean, gram.rows)
    return Sink(consumer, matrix, moments, gram.means if central else None, columns)


def _matrix_of(consumer: Consumer) -> tuple[Floats, int]:
    """The weight, float64 [groups, outputs, inputs], and how many inputs a channel has."""
    layer = _layer(consumer)
    if layer is not None and layer.has_gram:
        return layer.matrix(), layer.taps
    tensor = constant_tensor(consumer.weight)
    assert tensor is not None
    array = np.asarray(read_array(tensor), np.float64)
    return np.moveaxis(array, consumer.axis, -1).reshape(1, -1, array.shape[consumer.axis]), 1


def _layer(consumer: Consumer) -> Layer | None:
    node = consumer.node
    if not is_onnx(node, "Conv", "Gemm", "MatMul") or consumer.weight is not node.inputs[1]:
        return None
    rank = consumer.weight.shape.rank() if consumer.weight.shape is not None else 0
    return layer_of(node) if is_onnx(node, "Conv") or rank == 2 else None


def _question(consumer: Consumer, model: ir.Model) -> Question | None:
    """What to ask for the moments of what the consumer sums over."""
    node, layer = consumer.node, _layer(consumer)
    tensor = constant_tensor(consumer.weight)
    assert tensor is not None
    data = consumer.data
    if data is None:
        # The state of a recurrent layer is what it gives.
        data = next((o for o in node.outputs[:2] if o.name), None)
    if node.graph is not model.graph or data is None or constant_tensor(data) is not None:
        return None
    if data.producer() is None and not data.is_graph_input():
        return None
    inputs = int(tensor.shape.numpy()[consumer.axis])
    if layer is not None and layer.has_gram:
        if node.attributes.get_int("transA", 0):
            return None
        return layer.ask("gram")
    if inputs > GRAM_INPUTS_MAXIMUM:
        return None
    if is_onnx(node, "Conv", "ConvTranspose") and node.attributes.get_int("group", 1) == 1:
        # Taps apart: what channels have in common they mostly have at the same place.
        rank = len(tensor.shape) - 2
        once = (1,) * rank
        return Question(data.name or "", "gram", patches=Patches(once, once, once, (0,) * 2 * rank))
    is_last = data.shape is not None and consumer.data_axis in (-1, data.shape.rank() - 1)
    if is_onnx(node, *RECURRENT) or is_last:
        return Question(data.name or "", "gram")
    return None


def _corrects_bias(consumer: Consumer) -> bool:
    """A number can be added to each output of the consumer."""
    layer = _layer(consumer)
    if layer is not None:
        return layer.can_correct_bias
    return is_onnx(consumer.node, "LSTM") and _has_own(input_of(consumer.node, 3))


def _has_own(bias: ir.Value | None) -> bool:
    """There is a constant bias that nothing else reads."""
    return bias is not None and constant_tensor(bias) is not None and len(bias.uses()) == 1


def _columns(group: Group, consumer: Consumer) -> np.ndarray | None:
    """int64 [units, of each]: where units lie along the weight; None where some have more."""
    place = group.place(consumer.weight, consumer.axis)
    counts = np.bincount(place.units, minlength=group.units)
    if counts.min() != counts.max() or not counts.min():
        return None
    order = np.argsort(place.units, kind="stable")
    return np.asarray(place.indices[order].reshape(group.units, -1))


def _moments_bytes(consumer: Consumer) -> int:
    matrix_shape = consumer.weight.shape
    assert matrix_shape is not None
    layer = _layer(consumer)
    if layer is not None and layer.has_gram:
        group, _, inputs = layer.dimensions
        return 8 * group * inputs**2
    return 8 * min(int(matrix_shape[consumer.axis]), GRAM_INPUTS_MAXIMUM) ** 2  # type: ignore[arg-type]


# ------------------------------------------------------------------ writing


def write_sink(sink: Sink, consumer: Consumer, matrix: Floats, context: Context) -> None:
    """Let a consumer have another weight, in the place of the one that it has.

    Args:
        sink: of the consumer; or of that of another copy of the model.
        consumer: of the model that is rewritten.
        matrix: of the shape of that of the sink.
        context: keeps the tensors.
    """
    layer, weight = _layer(consumer), consumer.weight
    tensor = constant_tensor(weight)
    assert tensor is not None
    if layer is not None and layer.has_gram:
        array = layer.stored(matrix)
    else:
        moved = list(tensor.shape.numpy())
        inputs = moved.pop(consumer.axis)
        array = np.moveaxis(matrix.reshape(*moved, inputs), -1, consumer.axis)
    _set(weight, array, context)
    if is_onnx(consumer.node, *RECURRENT) and sink.means is not None:
        _shift_recurrent_bias(consumer.node, sink.shift(matrix), context)


def write_shift(
    sink: Sink, consumer: Consumer, shift: np.ndarray, names: Names, context: Context
) -> None:
    """Let the bias of a Conv or Gemm take back what another weight takes from the means."""
    layer = _layer(consumer)
    if layer is not None and sink.means is not None:
        shift_bias(layer, shift, names, context)


def _shift_recurrent_bias(node: ir.Node, shift: np.ndarray, context: Context) -> None:
    """Add to the first half of the bias of an LSTM, [directions, 8 * hidden]."""
    value = node.inputs[3]
    tensor = constant_tensor(value)
    assert value is not None and tensor is not None
    bias = np.array(read_array(tensor), np.float64)
    bias[:, : bias.shape[1] // 2] += shift.reshape(len(bias), -1)
    _set(value, bias, context)


def _set(value: ir.Value, array: np.ndarray, context: Context) -> None:
    """Give an initializer, or the output of a Constant node, other numbers."""
    tensor = constant_tensor(value)
    assert tensor is not None
    typed = np.ascontiguousarray(array).astype(tensor.dtype.numpy())
    set_constant(value, context.tensor(typed, value.name or ""))
