"""The weights of a model that can be pruned, and what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from graphopt.contract import Change
from graphopt.observe import Question
from graphopt.operators import RECURRENT, is_onnx
from graphopt.rewriting import only_reader
from graphopt_passes.prune.masks import Pattern
from graphopt_passes.quantize.layers import GRAM_INPUTS_MAXIMUM
from graphopt_passes.quantize.narrow_weights import Target, targets_of


def prunable_weights(
    model: ir.Model, min_elements: int, pattern: Pattern, change: Change
) -> list[Target]:
    """The float weights that can lose entries, in the order in which their readers run.

    Args:
        model: not modified.
        min_elements: smaller weights are not looked at.
        pattern: in which entries are to stay.
        change: told what is left alone.
    """
    found = []
    for target in targets_of(model, min_elements, change):
        reason = _why_not(target, pattern)
        if reason is None:
            found.append(replace(target, others=target.others or _recurrent_inputs(target)))
        else:
            change.skip(target.value, reason)
    return sorted(found, key=_order(model))


def taps_of(target: Target) -> int:
    """Inputs of a row that belong to one channel; they are adjacent."""
    return target.inputs // target.channels


def _why_not(target: Target, pattern: Pattern) -> str | None:
    if not target.value.is_initializer():
        return "it is packed, or on codes; prune before it is quantized"
    if target.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return "it is float16; widen-halves or unpack-weights makes it float32"
    if target.in_body:
        return "it is in the body of an If, Loop or Scan, which is not looked into"
    if target.is_looked_up and not target.asked:
        return "it is a table whose rows are looked up"
    return pattern.why_not(target.rows, target.channels, taps_of(target))


def _recurrent_inputs(target: Target) -> tuple[Question, ...]:
    """What is multiplied with the weights of an LSTM, GRU or RNN: its input, and its states."""
    node = only_reader(target.value)
    if node is None or not is_onnx(node, *RECURRENT) or target.inputs > GRAM_INPUTS_MAXIMUM:
        return ()
    read = node.inputs[0] if target.value is node.inputs[1] else node.outputs[0]
    if read is None or not read.name or (read.producer() is None and not read.is_graph_input()):
        return ()
    return (Question(read.name, "gram"),)


def _order(model: ir.Model) -> Callable[[Target], int]:
    places = {node: place for place, node in enumerate(model.graph)}
    return lambda target: min(
        (places.get(use.node, len(places)) for use in target.value.uses()), default=0
    )
