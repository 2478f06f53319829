"""What healing compares of two models: their outputs, or values that these are made of.

An output may say nothing about which way weights should go: it is a label or other integers, it has
as many rows as the sample happens to need, or an operator that torch has not (NonMaxSuppression, a
map of strings) lies before it. Then the nearest values that it is made of, and that both models
compute, take its place. What both compute is known by content, as it is on the way to the outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.errors import ModelError
from graphopt.operators import nodes_within
from graphopt.rewriting import is_read, remove_node
from graphopt.training.common_values import counterparts
from graphopt.training.interpreter import Interpreter, inlined, why_not_run
from graphopt.training.program import reads_of
from graphopt.training.sample_batches import Tensors
from graphopt.training.stored_weights import stored_weights


@dataclass(frozen=True)
class End:
    """A value that takes the place of an output, or of several.

    Attributes:
        name: of the output that it becomes.
        original: its name in the original.
        optimized: its name in the optimized model.
        is_integer: it is given as float32.
    """

    name: str
    original: str
    optimized: str
    is_integer: bool = False


@dataclass(frozen=True)
class Learnable:
    """Two models, and what is compared of them.

    Attributes:
        original: as healing runs it: its outputs are what is compared, and what carries state.
        optimized: the same of the other model. Its constants are called as in the whole model.
        names: of what is compared.
        ends: what of this are no outputs of the whole models.
        replaced: outputs that cannot be learnt.
    """

    original: ir.Model
    optimized: ir.Model
    names: tuple[str, ...]
    ends: tuple[End, ...] = ()
    replaced: tuple[str, ...] = ()

    def of_original(self, whole: ir.Model) -> ir.Model:
        """The whole original, with all that is compared as outputs; itself where there are."""
        return _ended(whole, [(end, end.original) for end in self.ends])

    def of_optimized(self, whole: ir.Model) -> ir.Model:
        """The whole optimized model, in the same way."""
        return _ended(whole, [(end, end.optimized) for end in self.ends])


def learnable(
    original: ir.Model, optimized: ir.Model, looks: Sequence[Tensors], state: Sequence[str] = ()
) -> Learnable:
    """What healing can compare of two models.

    Args:
        original: not modified.
        optimized: not modified; without functions.
        looks: a few samples.
        state: outputs that carry state.

    Raises:
        ModelError: an operator that torch has not lies between the weights and all outputs.
    """
    known = (_computable(inlined(original)), _computable(optimized))
    teacher = Interpreter(known[0], wide=True)
    student = Interpreter(known[1], straight_through=True, wide=True)
    names = [value.name or "" for value in original.graph.outputs]
    seen = _Values(known[1], student, looks)
    good = [name for name in _alike(teacher, student, looks) if seen.has_gradient(name)]
    kept = [name for name in good if _is_float(original, name)]
    ends = [End(f"value {name}", name, name, True) for name in good if name not in kept]
    bad = [name for name in names if name not in good]
    if bad:
        twins = counterparts(student, teacher, student.computed(), looks)
        values = _values(optimized)
        places = (
            place.name or ""
            for name in bad
            for place in _before(
                values[name], lambda v: v.name in twins and seen.has_gradient(v.name)
            )
        )
        ends += [End(f"value {twins[n]}", twins[n], n) for n in seen.distinct(places, good)]
    if not ends and _is_whole(known[0], original) and _is_whole(known[1], optimized):
        return Learnable(original, optimized, tuple(kept or names))
    if not kept and not ends:
        for model in (original, optimized):
            # Says what it does not know.
            Interpreter(model)
    _cut(known, kept, ends, state)
    return Learnable(*known, (*kept, *(end.name for end in ends)), tuple(ends), tuple(bad))


# ------------------------------------------------------------------ what can be learnt


def _computable(model: ir.Model) -> ir.Model:
    """A copy without the nodes that cannot be run in torch, and without what hangs on them."""
    copy = model.clone()
    lost: set[ir.Value] = set()
    unknown = []
    for node in copy.graph:
        if any(value in lost for value in reads_of(node)) or any(
            why_not_run(inner) is not None for inner in nodes_within(node)
        ):
            unknown.append(node)
            lost.update(node.outputs)
    _keep_outputs(copy, [value for value in copy.graph.outputs if value not in lost])
    for node in reversed(unknown):
        remove_node(node)
    _drop_unread(copy)
    return copy


def _is_whole(known: ir.Model, model: ir.Model) -> bool:
    """Nothing is left out of it."""
    parts = ((m.graph, m.graph.initializers) for m in (known, model))
    first, second = ([len(part) for part in pair] for pair in parts)
    return first == second


def _keep_outputs(model: ir.Model, kept: Sequence[ir.Value]) -> None:
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)


def _drop_unread(model: ir.Model) -> None:
    """Leave out constants that nothing reads: they may be of a type that torch has not."""
    for name, value in list(model.graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del model.graph.initializers[name]


class _Values:
    """What an optimized model computes for samples, and in what its weights have a part."""

    def __init__(self, model: ir.Model, student: Interpreter, looks: Sequence[Tensors]) -> None:
        self._student, self._looks = student, looks
        weights = stored_weights(model.graph)
        self._latent = [weight.numbers.clone().requires_grad_() for weight in weights]
        pairs = zip(weights, self._latent, strict=True)
        self._fed = {weight.value.name or "": weight.fed(numbers) for weight, numbers in pairs}
        self._runs: list[Tensors] = []
        self._known: dict[str, bool] = {}

    def has_gradient(self, name: str | None) -> bool:
        """Some weight has a part in the value, and can make it larger or smaller."""
        if not name or name not in self._run(0):
            return False
        if name not in self._known:
            # Of zeros, as silence is, there may be no gradient.
            values = (self._run(index)[name] for index in range(len(self._looks)))
            hanging = takewhile(lambda value: value.requires_grad, values)
            self._known[name] = any(self._reaches_weights(value) for value in hanging)
        return self._known[name]

    def _run(self, index: int) -> Tensors:
        while len(self._runs) <= index:
            sample = self._looks[len(self._runs)]
            self._runs.append(self._student.run({**sample, **self._fed}, self._student.computed()))
        return self._runs[index]

    def _reaches_weights(self, value: Tensor) -> bool:
        if not value.numel():
            return False
        # Of a sum of probabilities there is none: each number has a weight of its own.
        shares = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
        total = (value.float() * shares).sum()
        found = torch.autograd.grad(total, self._latent, retain_graph=True, allow_unused=True)
        return any(g is not None and bool((g != 0).any()) for g in found)

    def distinct(self, names: Iterable[str], besides: Iterable[str]) -> list[str]:
        """Those values that are no other one in another shape or order."""
        seen = {self._content(name) for name in besides}
        kept = []
        for name in names:
            content = self._content(name)
            if content not in seen:
                seen.add(content)
                kept.append(name)
        return kept

    def _content(self, name: str) -> bytes:
        runs = (self._run(index)[name] for index in range(len(self._looks)))
        numbers = (value.detach().reshape(-1).double().sort().values for value in runs)
        return torch.cat(list(numbers)).numpy().tobytes()


def _alike(teacher: Interpreter, student: Interpreter, looks: Sequence[Tensors]) -> list[str]:
    """The outputs that both models compute, of shapes that those of the inputs decide on alone."""
    common = [name for name in teacher.outputs() if name in student.outputs()]
    given: defaultdict[object, defaultdict[str, set[torch.Size]]]
    given = defaultdict(lambda: defaultdict(set))
    with torch.no_grad():
        for sample in looks:
            shapes = given[tuple(value.shape for value in sample.values())]
            for model in (teacher, student):
                for name, value in model.run(sample, common).items():
                    shapes[name].add(value.shape)
    return [name for name in common if all(len(shapes[name]) == 1 for shapes in given.values())]


def _before(value: ir.Value, is_good: Callable[[ir.Value], bool]) -> Iterator[ir.Value]:
    """The nearest values that are good on all ways to one."""
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        for read in () if node is None else reads_of(node):
            if read is None or read in seen:
                continue
            seen.add(read)
            if is_good(read):
                yield read
            else:
                waiting.append(read)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    made = (value for node in model.graph for value in node.outputs)
    return {value.name: value for value in (*model.graph.inputs, *made) if value.name}


def _is_float(model: ir.Model, name: str) -> bool:
    dtype = next(value.dtype for value in model.graph.outputs if value.name == name)
    return dtype is None or dtype.is_floating_point()


# ------------------------------------------------------------------ the models that are compared


def _cut(
    models: tuple[ir.Model, ir.Model],
    kept: Sequence[str],
    ends: Sequence[End],
    state: Sequence[str],
) -> None:
    """Leave nothing in both models but what makes these outputs and ends."""
    for model in models:
        there = {value.name: value for value in model.graph.outputs}
        lost = [name for name in state if name not in there]
        if lost:
            raise ModelError(
                f"the state {lost[0]!r} hangs on an operator that cannot be computed in torch, so "
                "that there are no roll-outs to learn from"
            )
        _keep_outputs(model, [there[name] for name in dict.fromkeys((*kept, *state))])
    _add(models[0], [(end, end.original) for end in ends])
    _add(models[1], [(end, end.optimized) for end in ends])
    for model in models:
        for node in reversed(model.graph):
            if not is_read(node):
                remove_node(node)
        _drop_unread(model)


def _ended(whole: ir.Model, ends: Sequence[tuple[End, str]]) -> ir.Model:
    if not ends:
        return whole
    copy = inlined(whole).clone()
    _add(copy, ends)
    return copy


def _add(model: ir.Model, ends: Sequence[tuple[End, str]]) -> None:
    """Let values of the model be outputs, too."""
    values = _values(model)
    for end, name in ends:
        value = values[name]
        if end.is_integer:
            to = ir.AttrInt64("to", ir.DataType.FLOAT)
            node = ir.node("Cast", [value], {"to": to}, name=end.name)
        else:
            node = ir.node("Identity", [value], name=end.name)
        output = node.outputs[0]
        output.name = end.name
        output.type = ir.TensorType(ir.DataType.FLOAT) if end.is_integer else value.type
        model.graph.append(node)
        model.graph.outputs.append(output)
