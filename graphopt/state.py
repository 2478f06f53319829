"""State that a model carries from run to run: an output that the caller feeds back as an input."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.errors import SampleError, did_you_mean

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_OLD = frozenset({"past", "prev", "previous", "last", "old", "initial", "init"})
_NEW = frozenset({"present", "next", "new", "updated", "curr", "current"})
_INPUT_ENDINGS = frozenset({"in", "input", "0"})
_OUTPUT_ENDINGS = frozenset({"out", "output", "n", "1"})
_STATE_WORDS = frozenset(
    {"state", "states", "hidden", "cell", "memory", "mem", "cache", "buffer", "h", "c", "hx", "cx"}
)
_FILLER = ("key", "values")


def guess_state(model: ir.Model) -> tuple[tuple[str, str], ...]:
    """Pairs of an output and an input that look like carried state, in the order of the outputs.

    The two agree in element type and rank, in every dimension that both know, and in name:
    `stateN` and `state`, `hn` and `h0`, `present.0.key` and `past_key_values.0.key`, `cache_out`
    and `cache_in`. Names like `image_in` and `image_out` say nothing of state and are not taken.
    An output or input that has more than one partner is left out.
    """
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    pairs = [(o, i) for o in model.graph.outputs for i in inputs if o is not i and _agree(o, i)]
    unique = [
        (o, i)
        for o, i in pairs
        if sum(o is other for other, _ in pairs) == sum(i is other for _, other in pairs) == 1
    ]
    return tuple((o.name or "", i.name or "") for o, i in unique)


def _agree(output: ir.Value, source: ir.Value) -> bool:
    if output.type != source.type or output.shape is None or source.shape is None:
        return False
    if len(output.shape) != len(source.shape):
        return False
    pairs = zip(output.shape, source.shape, strict=True)
    same = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return same and _names_agree(_words(output.name or ""), _words(source.name or ""))


def _words(name: str) -> tuple[str, ...]:
    """`past_key_values.0.keyN` as ("past", "key", "values", "0", "key", "n")."""
    words = [word.lower() for word in _WORD.findall(name)]
    # `hn` and `cn` are how PyTorch's documentation calls the last states of an LSTM.
    if words and words[-1] in ("hn", "cn"):
        words[-1:] = [words[-1][0], "n"]
    return tuple(words)


def _names_agree(new: tuple[str, ...], old: tuple[str, ...]) -> bool:
    marked = bool(_OLD & {*old[:1], *old[-1:]})
    new_stem, old_stem = _stem(new, _NEW, _OUTPUT_ENDINGS), _stem(old, _OLD, _INPUT_ENDINGS)
    if not new_stem or new == old:
        return False
    if marked and old_stem[:2] == _FILLER:
        old_stem = old_stem[2:]
        new_stem = new_stem[2:] if new_stem[:2] == _FILLER else new_stem
    return new_stem == old_stem and (marked or bool(_STATE_WORDS & {*new_stem}))


def _stem(
    words: tuple[str, ...], marks: frozenset[str], endings: frozenset[str]
) -> tuple[str, ...]:
    """The words without the one that tells old from new, at either end."""
    if words and words[0] in marks:
        return words[1:]
    if len(words) > 1 and words[-1] in marks | endings:
        return words[:-1]
    return words


def check_state(model: ir.Model, state: Sequence[tuple[str, str]]) -> None:
    """Raise SampleError when pairs of output and input cannot carry state in the model."""
    outputs = {o.name or "": o for o in model.graph.outputs}
    inputs = {i.name or "": i for i in model.graph.inputs}
    for output, name in state:
        what = f"state {output}={name}"
        if output not in outputs:
            near = did_you_mean(output, outputs)
            raise SampleError(f"{what}: the model has no output {output!r}{near}")
        if name not in inputs:
            near = did_you_mean(name, inputs)
            raise SampleError(f"{what}: the model has no input {name!r}{near}")
        made, taken = outputs[output], inputs[name]
        if made.type != taken.type:
            raise SampleError(
                f"{what}: the output is a {made.type} and the input a {taken.type}; state needs "
                "one type"
            )
        if not _may_equal(made.shape, taken.shape):
            raise SampleError(
                f"{what}: the output has shape {made.shape} and the input {taken.shape}; state "
                "needs one shape"
            )
    if len({name for _, name in state}) < len(state):
        raise SampleError("an input can take its state from one output only; one is given twice")


def _may_equal(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    """No dimension of the two is known to be different."""
    if first is None or second is None:
        return True
    known = [(a, b) for a, b in zip(first, second, strict=False)]
    unequal = any(a != b for a, b in known if isinstance(a, int) and isinstance(b, int))
    return len(first) == len(second) and not unequal
