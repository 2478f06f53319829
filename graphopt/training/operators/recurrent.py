"""Recurrent networks: LSTM, GRU and RNN.

Equations as the operators' text in ONNX has them. torch's own kernels run where they compute the
same and no transform of `torch.func` is on, for which they have no rules; else a loop over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from graphopt.errors import ModelError
from graphopt.training.operators.elementwise import ACTIVATIONS
from graphopt.training.operators.movement import reversed_within
from graphopt.training.operators.operator_types import Table

Activation = Callable[[Tensor], Tensor]
_State = tuple[Tensor, ...]
_Step = Callable[[Tensor, _State], _State]
"""From what the input gives to the gates, and the state before, to the state after."""

Prepare = Callable[[Tensor], Tensor]
"""What is done to the numbers that are multiplied with weights."""

_TORCH_ORDER = {"GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1), "RNN": (0,)}
"""The gates as torch has them, by their places in ONNX: rzh of zrh, ifco of iofc."""

_DEFAULTS = {
    "GRU": ("Sigmoid", "Tanh"),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "RNN": ("Tanh",),
}


def _same(x: Tensor) -> Tensor:
    return x


def _affine(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return alpha * x + beta


def _scaled_tanh(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    **ACTIVATIONS,
    "Affine": _affine,
    "ScaledTanh": _scaled_tanh,
}
_PARAMETERS = {
    "Affine": ("alpha", "beta"),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "ScaledTanh": ("alpha", "beta"),
    "ThresholdedRelu": ("alpha",),
}


@dataclass(frozen=True)
class Recurrence:
    """What the attributes of a recurrent node say.

    Attributes:
        kind: GRU, LSTM or RNN.
        direction: forward, reverse or bidirectional.
        activations: by direction, each function with its parameters.
        are_default: these are the functions that the operator has where none are stated.
        clip: of the sums before the functions; None where there is none.
        is_batch_first: states and sequences begin with the batch.
        couples: the forget gate of an LSTM is one less the input gate.
        resets_after: the reset gate of a GRU multiplies what the hidden weights give.
        prepare: what is done to the sequence, and to the hidden state of each step, before they
            are multiplied with weights.
    """

    kind: str
    direction: str
    activations: tuple[tuple[Activation, ...], ...]
    are_default: bool
    clip: float | None
    is_batch_first: bool
    couples: bool = False
    resets_after: bool = False
    prepare: Prepare = _same

    @property
    def reverses(self) -> tuple[bool, ...]:
        """For each direction, whether it runs from the end."""
        return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[
            self.direction
        ]


def recurrence(
    kind: str,
    direction: str,
    activations: Sequence[str] | None,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
    layout: int,
    couples: bool = False,
    resets_after: bool = False,
    prepare: Prepare = _same,
) -> Recurrence:
    """What the attributes of a recurrent node say; see `Recurrence`.

    Raises:
        ModelError: an activation is not known.
    """
    count = 2 if direction == "bidirectional" else 1
    names = list(activations or _DEFAULTS[kind] * count)
    left = {"alpha": list(alphas or ()), "beta": list(betas or ())}
    functions: list[Activation] = []
    for name in names:
        if name not in _FUNCTIONS:
            raise ModelError(f"the activation {name!r} of {kind} cannot be computed in torch")
        stated = {p: left[p].pop(0) for p in _PARAMETERS.get(name, ()) if left[p]}
        functions.append(partial(_FUNCTIONS[name], **stated) if stated else _FUNCTIONS[name])
    each = len(_DEFAULTS[kind])
    return Recurrence(
        kind,
        direction,
        tuple(tuple(functions[d * each : (d + 1) * each]) for d in range(count)),
        names == list(_DEFAULTS[kind] * count),
        clip,
        bool(layout),
        couples,
        resets_after,
        prepare,
    )


@dataclass(frozen=True)
class Weights:
    """Of a recurrent node, all directions in the first axis; gates in the order of ONNX.

    Attributes:
        inputs: of shape [directions, gates * hidden, features].
        hidden: of shape [directions, gates * hidden, hidden].
        bias: of shape [directions, 2 * gates * hidden]: what goes with the inputs, then the rest.
        peepholes: of an LSTM, of shape [directions, 3 * hidden].
    """

    inputs: Tensor
    hidden: Tensor
    bias: Tensor | None
    peepholes: Tensor | None = None


def run(
    what: Recurrence,
    x: Tensor,
    weights: Weights,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The outputs of a recurrent node: of all steps, then the last state.

    Args:
        what: the node computes.
        x: of shape [steps, batch, features], or [batch, steps, features].
        weights: of the node.
        lengths: of each sequence, of shape [batch]; None where all are of all steps.
        initial: the hidden state, and for an LSTM that of the cells; None stands for zeros.
    """
    if what.is_batch_first:
        x = x.transpose(0, 1)
        initial = [None if part is None else part.transpose(0, 1) for part in initial]
    directions, size = weights.hidden.shape[0], weights.hidden.shape[2]
    zeros = x.new_zeros(directions, x.shape[1], size)
    state = tuple(zeros if part is None else part for part in initial)
    has_kernel = _has_kernel(what, weights, lengths, (x, *state))
    y, state = (_in_torch if has_kernel else _in_steps)(what, x, weights, lengths, state)
    if what.is_batch_first:
        return y.permute(2, 0, 1, 3), *(part.transpose(0, 1) for part in state)
    return y, *state


def _has_kernel(
    what: Recurrence, weights: Weights, lengths: Tensor | None, operands: tuple[Tensor, ...]
) -> bool:
    if not what.are_default or what.couples or what.clip is not None or lengths is not None:
        return False
    if (what.kind == "GRU" and not what.resets_after) or weights.peepholes is not None:
        return False
    if what.prepare is not _same:
        return False
    # These kernels have no rules for what `torch.func` transforms.
    parts = (*operands, weights.inputs, weights.hidden, weights.bias)
    return not any(part is not None and is_functorch_wrapped_tensor(part) for part in parts)


def _in_torch(
    what: Recurrence, x: Tensor, weights: Weights, lengths: Tensor | None, state: _State
) -> tuple[Tensor, _State]:
    order = _TORCH_ORDER[what.kind]
    flat: list[Tensor] = []
    for direction in range(weights.hidden.shape[0]):
        flat += [_ordered(w[direction], order) for w in (weights.inputs, weights.hidden)]
        if weights.bias is not None:
            flat += [_ordered(part, order) for part in weights.bias[direction].chunk(2)]
    is_both = what.direction == "bidirectional"
    is_turned = what.direction == "reverse"
    arguments = flat, weights.bias is not None, 1, 0.0, False, is_both, False
    steps, batch = x.shape[:2]
    x = x.flip(0) if is_turned else x
    if what.kind == "LSTM":
        y, *after = torch.lstm(x, state, *arguments)
    else:
        kernel = torch.gru if what.kind == "GRU" else torch.rnn_tanh
        y, *after = kernel(x, state[0], *arguments)
    y = y.flip(0) if is_turned else y
    y = y.reshape(steps, batch, len(what.reverses), -1).transpose(1, 2)
    return y, tuple(after)


def _ordered(weight: Tensor, order: Sequence[int]) -> Tensor:
    if len(order) == 1:
        return weight
    gates = weight.chunk(len(order))
    return torch.cat([gates[place] for place in order])


def _in_steps(
    what: Recurrence, x: Tensor, weights: Weights, lengths: Tensor | None, state: _State
) -> tuple[Tensor, _State]:
    outputs, lasts = [], []
    for direction, is_reversed in enumerate(what.reverses):
        own = tuple(part[direction] for part in state)
        turned = _turned(x, lengths) if is_reversed else x
        y, last = _one_direction(what, direction, turned, weights, lengths, own)
        outputs.append(_turned(y, lengths) if is_reversed else y)
        lasts.append(last)
    return torch.stack(outputs, 1), tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))


def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    return x.flip(0) if lengths is None else reversed_within(x, lengths)


def _one_direction(
    what: Recurrence,
    direction: int,
    x: Tensor,
    weights: Weights,
    lengths: Tensor | None,
    state: _State,
) -> tuple[Tensor, _State]:
    step = _STEPS[what.kind](what, direction, weights)
    from_inputs = what.prepare(x) @ weights.inputs[direction].T
    outputs = []
    for place, part in enumerate(from_inputs.unbind()):
        after = step(part, state)
        if lengths is None:
            state = after
            outputs.append(after[0])
            continue
        goes_on = (place < lengths)[:, None]
        state = tuple(torch.where(goes_on, *pair) for pair in zip(after, state, strict=True))
        outputs.append(torch.where(goes_on, after[0], torch.zeros_like(after[0])))
    return torch.stack(outputs), state


def _clipping(what: Recurrence) -> Activation:
    limit = what.clip
    return _same if limit is None else partial(torch.clamp, min=-limit, max=limit)


def _biases(weights: Weights, direction: int) -> tuple[Tensor | float, Tensor | float]:
    if weights.bias is None:
        return 0.0, 0.0
    first, second = weights.bias[direction].chunk(2)
    return first, second


def _lstm_step(what: Recurrence, direction: int, weights: Weights) -> _Step:
    f, g, h = what.activations[direction]
    clip, hidden = _clipping(what), weights.hidden[direction].T
    one, other = _biases(weights, direction)
    bias = one + other
    peepholes = None if weights.peepholes is None else weights.peepholes[direction].chunk(3)

    def step(part: Tensor, state: _State) -> _State:
        before, cell = state
        i, o, forget, c = (part + what.prepare(before) @ hidden + bias).chunk(4, -1)
        if peepholes is not None:
            i, forget = i + peepholes[0] * cell, forget + peepholes[2] * cell
        i = f(clip(i))
        forget = 1 - i if what.couples else f(clip(forget))
        cell = forget * cell + i * g(clip(c))
        if peepholes is not None:
            o = o + peepholes[1] * cell
        return f(clip(o)) * h(cell), cell

    return step


def _gru_step(what: Recurrence, direction: int, weights: Weights) -> _Step:
    f, g = what.activations[direction]
    clip, hidden = _clipping(what), weights.hidden[direction]
    size = hidden.shape[1]
    gates, candidate = hidden[: 2 * size].T, hidden[2 * size :].T
    one, other = _biases(weights, direction)
    of_gates: Tensor | float = 0.0
    of_input: Tensor | float = 0.0
    of_hidden: Tensor | float = 0.0
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        of_gates = (one + other)[: 2 * size]
        of_input, of_hidden = one[2 * size :], other[2 * size :]

    def step(part: Tensor, state: _State) -> _State:
        (before,) = state
        prepared = what.prepare(before)
        sums = part[..., : 2 * size] + prepared @ gates + of_gates
        z, r = f(clip(sums)).chunk(2, -1)
        inner = part[..., 2 * size :] + of_input
        if what.resets_after:
            inner = inner + r * (prepared @ candidate + of_hidden)
        else:
            inner = inner + what.prepare(r * before) @ candidate + of_hidden
        return ((1 - z) * g(clip(inner)) + z * before,)

    return step


def _rnn_step(what: Recurrence, direction: int, weights: Weights) -> _Step:
    (f,) = what.activations[direction]
    clip, hidden = _clipping(what), weights.hidden[direction].T
    one, other = _biases(weights, direction)

    def step(part: Tensor, state: _State) -> _State:
        return (f(clip(part + what.prepare(state[0]) @ hidden + one + other)),)

    return step


_STEPS = {"GRU": _gru_step, "LSTM": _lstm_step, "RNN": _rnn_step}


def _lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    what = recurrence(
        "LSTM",
        direction,
        activations,
        activation_alpha,
        activation_beta,
        clip,
        layout,
        couples=bool(input_forget),
    )
    return run(what, x, Weights(w, r, b, peepholes), lengths, (initial_h, initial_c))


def _gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    what = recurrence(
        "GRU",
        direction,
        activations,
        activation_alpha,
        activation_beta,
        clip,
        layout,
        resets_after=bool(linear_before_reset),
    )
    return run(what, x, Weights(w, r, b), lengths, (initial_h,))


def _rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    what = recurrence(
        "RNN", direction, activations, activation_alpha, activation_beta, clip, layout
    )
    return run(what, x, Weights(w, r, b), lengths, (initial_h,))


OPERATORS: Table = {"GRU": _gru, "LSTM": _lstm, "RNN": _rnn}
"""Of the standard domain."""
