"""What each operator says of the indices along the axes of its inputs and outputs.

A rule mentions the axes that it ties, sums over or lets pass (see `graphopt.couplings.Site`); all
others are frozen. Rules of operators that move elements are in `graphopt.movement_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from graphopt.couplings import End, Site, broadcast_to
from graphopt.movement_rules import MOVEMENTS
from graphopt.operators import dropout_is_off, is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import input_of, small_integers, stated_integers

Rule = Callable[[Site], None]

SOFTMAX_IS_OF_ONE_AXIS = 13
"""Before this opset it takes all axes from the one given on together."""


# ------------------------------------------------------------------ element by element


def tie_all(site: Site, first: End, second: End, but: Collection[int] = ()) -> None:
    """Tie all axes of two ends of the same shape, but for some."""
    if first.rank != second.rank:
        return
    for axis in range(first.rank):
        if axis not in but:
            site.tie(first, axis, second, axis)


def _unary(site: Site) -> None:
    """Inputs after the first are scalars."""
    source, target = site.input(0), site.output()
    if source is not None and target is not None:
        tie_all(site, source, target)


def _broadcast(site: Site) -> None:
    target = site.output()
    if target is None:
        return
    for axis in range(target.rank):
        site.passes(target, axis)
    for source in site.inputs():
        broadcast_to(site, source, target)


def _cast_like(site: Site) -> None:
    """Of the second input, only the type is read."""
    _unary(site)
    like = site.input(1)
    for axis in range(like.rank) if like is not None else ():
        site.passes(like, axis)  # type: ignore[arg-type]


def _dropout(site: Site) -> None:
    source = site.input(0)
    if source is None or not dropout_is_off(site.node):
        return
    for index in range(len(site.node.outputs)):
        target = site.output(index)
        if target is not None:
            tie_all(site, source, target)


# ------------------------------------------------------------------ normalization and pooling


def _batch_normalization(site: Site) -> None:
    source, target = site.input(0), site.output()
    if source is None or target is None or target.rank < 2 or site.output(1) is not None:
        return
    tie_all(site, source, target)
    for vector in site.inputs()[1:]:
        site.tie(vector, 0, target, 1)


def _instance_normalization(site: Site) -> None:
    source, target = site.input(0), site.output()
    if source is None or target is None or target.rank < 2:
        return
    tie_all(site, source, target, range(2, source.rank))
    for vector in site.inputs()[1:]:
        site.tie(vector, 0, target, 1)


def _first_axes(count: int, site: Site) -> None:
    """The first axes stay apart; the others are worked along. One output only."""
    source, target = site.input(0), site.output()
    if source is not None and target is not None and site.output(1) is None:
        tie_all(site, source, target, range(count, source.rank))


def _all_but(axis_default: int, to_the_end: bool, site: Site) -> None:
    """All axes stay apart, but one that is worked along, or that and those that follow."""
    source, target = site.input(0), site.output()
    if source is None or target is None or site.output(1) is not None:
        return
    axis = site.node.attributes.get_int("axis", axis_default) % max(source.rank, 1)
    tie_all(site, source, target, range(axis, source.rank) if to_the_end else (axis,))


def _mean_variance(site: Site) -> None:
    source, target = site.input(0), site.output()
    axes = site.node.attributes.get_ints("axes", (0, 2, 3))
    if source is not None and target is not None:
        tie_all(site, source, target, {axis % source.rank for axis in axes})


def _softmax(site: Site) -> None:
    if site.opset >= SOFTMAX_IS_OF_ONE_AXIS:
        _all_but(-1, False, site)
    else:
        _all_but(1, True, site)


def _cumsum(site: Site) -> None:
    source, target = site.input(0), site.output()
    axes = small_integers(input_of(site.node, 1))
    if source is not None and target is not None and axes:
        tie_all(site, source, target, [axis % source.rank for axis in axes])


def _reduce(site: Site) -> None:
    source, target = site.input(0), site.output()
    axes = stated_integers(site.node, "axes", 1)
    if source is None or target is None or axes is None:
        return
    if not axes and site.node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        tie_all(site, source, target)
        return
    _tie_kept(site, source, target, {axis % source.rank for axis in axes or range(source.rank)})


def _arg_reduce(site: Site) -> None:
    source, target = site.input(0), site.output()
    if source is not None and target is not None and source.rank:
        axis = site.node.attributes.get_int("axis", 0) % source.rank
        _tie_kept(site, source, target, {axis})


def _tie_kept(site: Site, source: End, target: End, reduced: set[int]) -> None:
    keeps = site.node.attributes.get_int("keepdims", 1) != 0
    kept = [axis for axis in range(source.rank) if axis not in reduced]
    for place, axis in enumerate(kept):
        site.tie(source, axis, target, axis if keeps else place)


def _depth_and_space(site: Site) -> None:
    """One channel on the side of space is block * block channels on the side of depth.

    These lie apart, each block of which holds all channels (DCR), or together (CRD).
    """
    source, target = site.input(0), site.output()
    if source is None or target is None or target.rank != 4:
        return
    site.tie(source, 0, target, 0)
    deep, wide = (source, target) if is_onnx(site.node, "DepthToSpace") else (target, source)
    many, few = deep.size(1), wide.size(1)
    if many is not None and few is not None:
        index = np.arange(many)
        together = site.node.attributes.get_string("mode", "DCR") == "CRD"
        site.tie(deep, 1, wide, 1, index, index // (many // few) if together else index % few)


# ------------------------------------------------------------------ weighted sums


def _contract(site: Site, first: End, first_axis: int, second: End, second_axis: int) -> None:
    """Two ends are summed over an axis of each; one of them is to be constant."""
    ends = ((first, first_axis), (second, second_axis))
    weights = [is_constant(end.value) for end, _ in ends]
    if weights == [False, True]:
        site.sink(first, first_axis, second, second_axis)
    elif weights == [True, False]:
        site.sink(second, second_axis, first, first_axis)
    else:
        for end, axis in ends:
            site.freeze(end, axis, "sums over it, weighted by no constant")


def _matmul(site: Site) -> None:
    first, second, target = site.input(0), site.input(1), site.output()
    if first is None or second is None or target is None or min(first.rank, second.rank) < 2:
        return
    for end in (first, second):
        for axis in range(end.rank - 2):
            site.tie(end, axis, target, target.rank - end.rank + axis)
    site.tie(first, -2, target, -2)
    site.tie(second, -1, target, -1)
    _contract(site, first, -1, second, -2)
    for end, axis in ((first, -2), (second, -1)):
        if is_constant(end.value):
            site.makes(end, axis)


def _gemm(site: Site) -> None:
    first, second, target = site.input(0), site.input(1), site.output()
    if first is None or second is None or target is None:
        return
    rows = 1 if site.node.attributes.get_int("transA", 0) else 0
    columns = 0 if site.node.attributes.get_int("transB", 0) else 1
    site.tie(first, rows, target, 0)
    site.tie(second, columns, target, 1)
    _contract(site, first, 1 - rows, second, 1 - columns)
    for end, axis in ((first, rows), (second, columns)):
        if is_constant(end.value):
            site.makes(end, axis)
    added = site.input(2)
    if added is not None:
        broadcast_to(site, added, target)


def _einsum(site: Site) -> None:
    """Axes of one letter are one; what is not in the result is summed over."""
    operands, target = site.inputs(), site.output()
    equation = site.node.attributes.get_string("equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if target is None or not arrow or "." in equation or len(letters) != len(operands):
        return
    ends = [*zip(operands, letters, strict=True), (target, result)]
    if any(end.rank != len(term) or len(set(term)) < len(term) for end, term in ends):
        return
    for letter in sorted(set(terms) - {","}):
        places = [(end, term.index(letter)) for end, term in ends if letter in term]
        if letter not in result:
            if len(places) == len(operands) == 2:
                _contract(site, *places[0], *places[1])
            continue
        for end, axis in places[:-1]:
            site.tie(end, axis, target, result.index(letter))
        if len(places) == 2 and is_constant(places[0][0].value):
            site.makes(*places[0])


def _conv(site: Site) -> None:
    """W is [outputs, inputs / group, ...]: an index of its axis 1 is a place in each group."""
    source, weight, target = site.input(0), site.input(1), site.output()
    if source is None or weight is None or target is None or not is_constant(weight.value):
        return
    outputs, inputs = (weight.size(axis) for axis in (0, 1))
    group = site.node.attributes.get_int("group", 1)
    channels = source.size(1)
    if outputs is None or inputs is None or channels != inputs * group or outputs % group:
        return
    site.tie(source, 0, target, 0)
    site.tie(weight, 0, target, 1)
    _bias(site, target)
    if group == 1:
        site.sink(source, 1, weight, 1)
        site.makes(weight, 0)
    elif inputs == 1:
        site.tie(source, 1, target, 1, np.arange(outputs) // (outputs // group), np.arange(outputs))
    else:
        site.takes(source, 1, weight, 1)
        site.tie(source, 1, weight, 1, np.arange(channels), np.arange(channels) % inputs)
        _same_in_groups(site, weight, 0, group)
        site.makes(weight, 0)


def _conv_transpose(site: Site) -> None:
    """W is [inputs, outputs / group, ...]."""
    source, weight, target = site.input(0), site.input(1), site.output()
    if source is None or weight is None or target is None or not is_constant(weight.value):
        return
    inputs, outputs = (weight.size(axis) for axis in (0, 1))
    group = site.node.attributes.get_int("group", 1)
    channels = target.size(1)
    if inputs is None or outputs is None or channels != outputs * group or inputs % group:
        return
    site.tie(source, 0, target, 0)
    site.passes(target, 1)
    _bias(site, target)
    if group == inputs:
        site.tie(source, 1, weight, 0)
        site.tie(weight, 0, target, 1, np.arange(channels) // outputs, np.arange(channels))
        return
    site.sink(source, 1, weight, 0)
    site.makes(weight, 1)
    site.tie(target, 1, weight, 1, np.arange(channels), np.arange(channels) % outputs)
    if group == 1:
        site.tie(target, 1, weight, 1)
        return
    _same_in_groups(site, weight, 0, group)


def _bias(site: Site, target: End) -> None:
    bias = site.input(2)
    if bias is not None:
        site.tie(bias, 0, target, 1)


def _same_in_groups(site: Site, end: End, axis: int, group: int) -> None:
    """The same places in each group are one, so that groups stay equally large."""
    size = end.size(axis) or 0
    index = np.arange(size)
    site.tie(end, axis, end, axis, index, index % (size // group))


def _recurrent(gates: int, site: Site) -> None:
    """GRU, LSTM and RNN: unit j is the j-th row of each gate, and a column of R.

    X [steps, batch, inputs], W [directions, gates * units, inputs],
    R [directions, gates * units, units], B [directions, 2 * gates * units],
    P [directions, 3 * units], states [directions, batch, units],
    Y [steps, directions, batch, units].
    """
    data, weight, recurrent = (site.input(index) for index in range(3))
    attributes = site.node.attributes
    if data is None or weight is None or recurrent is None or attributes.get_int("layout", 0) != 0:
        return
    units = recurrent.size(-1)
    if not is_constant(weight.value) or not is_constant(recurrent.value) or units is None:
        return
    if attributes.get_int("hidden_size", units) != units or weight.size(1) != gates * units:
        return
    site.sink(data, 2, weight, 2)
    site.takes(None, 0, recurrent, 2)
    site.makes(weight, 1)
    for index, times in ((1, gates), (2, gates), (3, 2 * gates), (7, 3)):
        end = site.input(index)
        if end is not None:
            rows = np.arange(times * units)
            site.tie(end, 1, recurrent, 2, rows, rows % units)
    states = [site.input(5), site.input(6), *(site.output(index) for index in range(3))]
    for end in states:
        if end is not None:
            site.tie(end, -1, recurrent, 2)


_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip

_BROADCAST = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul",
    "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip

_REDUCE = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip

_POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_POOLS, partial(_first_axes, 2)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_reduce),
    **dict.fromkeys(("LogSoftmax", "Hardmax", "Softmax"), _softmax),
    **MOVEMENTS,
    "BatchNormalization": _batch_normalization,
    "CastLike": _cast_like,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_and_space,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GRU": partial(_recurrent, 3),
    "GroupNormalization": partial(_first_axes, 1),
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": partial(_all_but, -1, True),
    "LpNormalization": partial(_all_but, -1, False),
    "LRN": partial(_first_axes, 1),
    "LSTM": partial(_recurrent, 4),
    "MatMul": _matmul,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": partial(_all_but, -1, True),
    "RNN": partial(_recurrent, 1),
    "SpaceToDepth": _depth_and_space,
}  # fmt: skip
"""By operator of the standard domain."""
