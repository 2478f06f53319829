"""If, Loop and Scan: operators that run graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import ModelError
from graphopt.training.operators.arguments import integer
from graphopt.training.operators.operator_types import Body, Table

_FIRST_SCAN_OPSET = 9
"""Before it, Scan had a batch axis of its own."""


def _if(
    condition: Tensor, *outer: Tensor, then_branch: Body, else_branch: Body
) -> tuple[Tensor, ...]:
    branch = then_branch if bool(condition) else else_branch
    return tuple(branch((), outer))


def _loop(
    trips: Tensor | None,
    condition: Tensor | None,
    *rest: Tensor,
    output_count: int,
    device: torch.device,
    body: Body,
    input_count: int,
) -> tuple[Tensor, ...]:
    carried_count = input_count - 2
    state, outer = list(rest[:carried_count]), rest[carried_count:]
    trip, goes_on = 0, condition is None or bool(condition)
    scanned: list[list[Tensor]] = [[] for _ in range(output_count - carried_count)]
    while goes_on and (trips is None or trip < integer(trips)):
        before = torch.tensor(True, device=device) if condition is None else condition
        number = torch.tensor(trip, device=device)
        condition, *results = body((number, before, *state), outer)
        state, goes_on = results[:carried_count], bool(condition)
        for kept, result in zip(scanned, results[carried_count:], strict=True):
            kept.append(result)
        trip += 1
    stacked = [torch.stack(kept) if kept else torch.zeros(0, device=device) for kept in scanned]
    return (*state, *stacked)


def _scan(
    *inputs: Tensor,
    body: Body,
    input_count: int,
    opset: int,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    if opset < _FIRST_SCAN_OPSET:
        raise ModelError("Scan of opset 8 cannot be computed in torch: raise the opset first")
    carried_count = input_count - num_scan_inputs
    state, outer = list(inputs[:carried_count]), inputs[input_count:]
    axes = scan_input_axes or [0] * num_scan_inputs
    turned = scan_input_directions or [0] * num_scan_inputs
    sequences = [
        (x.flip(axis) if is_reversed else x).movedim(axis, 0)
        for x, axis, is_reversed in zip(
            inputs[carried_count:input_count], axes, turned, strict=True
        )
    ]
    steps = []
    for parts in zip(*(sequence.unbind() for sequence in sequences), strict=True):
        results = body((*state, *parts), outer)
        state = results[:carried_count]
        steps.append(results[carried_count:])
    outputs = [torch.stack(parts) for parts in zip(*steps, strict=True)]
    axes = scan_output_axes or [0] * len(outputs)
    turned = scan_output_directions or [0] * len(outputs)
    return (
        *state,
        *(
            (x.flip(0) if is_reversed else x).movedim(0, axis)
            for x, axis, is_reversed in zip(outputs, axes, turned, strict=True)
        ),
    )


OPERATORS: Table = {"If": _if, "Loop": _loop, "Scan": _scan}
"""Of the standard domain."""
