"""The smallest models that still show an error.

They are what is between the last values that are right and the first that is wrong, cut out of both
models, with the real values that it reads.

Nodes that can go, go: by halves and quarters, then one by one (delta debugging; Zeller and
Hildebrandt, Simplifying and isolating failure-inducing input, 2002).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import saving
from graphopt.contract import Effect
from graphopt.cutting import (
    Given,
    cut_out,
    depend_on_inputs,
    given_like,
    names_in,
    reads,
    stretch_to,
    values_of,
)
from graphopt.deviations import Divergence, Tolerance, compared
from graphopt.errors import ModelError
from graphopt.matching import Pair
from graphopt.operators import node_count
from graphopt.rewriting import become_initializer, remove_node, tensor_of
from graphopt.runtime import Reference, Session
from graphopt.sample_files import write_npz
from graphopt.validation import ROUNDING_LIMITS, Budget, why_over, worst

NODES_MAXIMUM = 10
"""What has more nodes is not small, and is told as such."""

TRIES_MAXIMUM = 150
"""A set of nodes is made smaller by so many tries at most."""

SAME_ERROR = 1e-3
"""Two values that are so close, as a relative L2 error, are taken for the same."""


@dataclass(frozen=True)
class Reproducer:
    """Two small models with the same inputs and outputs, of which one is wrong.

    Attributes:
        before: a part of the original.
        after: what became of it; None where the pass gives nothing that can be run.
        inputs: real values, by input.
        expected: what the first model makes of them, by output.
        max_error: a budget that the second model is over.
        error: relative L2 of its worst output; infinite for NaN, or where it does not run.
        passes: in text form, with which `before` alone shows the fault; None where it does not.
        budget: of the passes, if they are lossy.
    """

    before: ir.Model
    after: ir.Model | None
    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    max_error: str
    error: float
    passes: str | None = None
    budget: str | None = None

    @property
    def nodes(self) -> int:
        """Of the larger of the models; see `graphopt.operators.node_count`."""
        models = [self.before] if self.after is None else [self.before, self.after]
        return max(map(node_count, models))

    @property
    def is_small(self) -> bool:
        """It has no more nodes than can be read."""
        return self.nodes <= NODES_MAXIMUM

    def commands(self, folder: Path) -> tuple[str, ...]:
        """What shows the error, once the models are in the folder."""
        before, after, samples = (folder / n for n in ("before.onnx", "after.onnx", "inputs.npz"))
        found = []
        if self.after is not None:
            budget = f"--max-error {self.max_error}"
            found.append(f"graphopt validate {before} {after} --samples {samples} {budget}")
        if self.passes is not None:
            budget = "" if self.budget is None else f" --max-error {self.budget}"
            passes = f"--passes '{self.passes}'"
            found.append(f"graphopt bisect {before} {passes} --samples {samples}{budget}")
        return tuple(found)

    def save(self, folder: Path) -> None:
        """Write before.onnx, after.onnx, inputs.npz and expected.npz.

        Raises:
            ModelError: the folder cannot be made or written to.
        """
        check_folder(folder, ())
        folder.mkdir(exist_ok=True)
        (folder / "after.onnx").unlink(missing_ok=True)
        saving.save(self.before, folder / "before.onnx")
        if self.after is not None:
            saving.save(self.after, folder / "after.onnx")
        write_npz(folder / "inputs.npz", self.inputs)
        write_npz(folder / "expected.npz", self.expected)


def check_folder(folder: Path, models: Iterable[Path]) -> None:
    """Raise ModelError when a reproducer cannot be written to a folder, before any work is done.

    Args:
        folder: to be made where it is not there.
        models: that are read, and must not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"cannot write to {folder}: it is a file; give a folder")
    if not folder.parent.is_dir():
        raise ModelError(f"cannot write to {folder}: there is no folder {folder.parent}")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise ModelError(f"cannot write to {folder}: it is not writable")
    written = {(folder / name).resolve() for name in ("before.onnx", "after.onnx")}
    for model in models:
        if model.resolve() in written:
            raise ModelError(f"{model} would be overwritten by the reproducer; give another folder")


@dataclass(frozen=True)
class Cut:
    """The same stretch of two models.

    Attributes:
        before: of the original.
        after: of the other model.
        inputs: values of the original, by input.
        sources: the pairs at which it begins.
        nodes: of the other model, in order.
    """

    before: ir.Model
    after: ir.Model
    inputs: Mapping[str, np.ndarray]
    sources: tuple[Pair, ...]
    nodes: tuple[ir.Node, ...]


def cut_pair(
    before: ir.Model, after: ir.Model, found: Divergence, pairs: Sequence[Pair], target: Pair
) -> Cut | None:
    """What leads to a value in both models from values that both have; None where nothing does.

    Args:
        before: the original.
        after: the other model.
        found: has the values of the original.
        pairs: the values that both have.
        target: the value that is wrong.
    """
    olds, news = values_of(before.graph), values_of(after.graph)
    usable = [p for p in pairs if p.after != target.after and p.before in found.values]
    known = {news[pair.after]: pair for pair in usable}
    later = stretch_to([news[target.after]], known)
    if not later.sources or not all(value in known for value in later.sources):
        return None
    read = [known[value] for value in later.sources]
    begins = {pair.before: pair for pair in read}
    if target.before not in begins:
        begins.update(_further(olds, begins, usable, target))
    names = _input_names(begins.values(), names_in(after))
    output = _free(target.before, {*names.values(), *(names_in(after) - {target.after})})
    arrays = {name: found.values[name] for name in begins}
    faces = {name: given_like(names[name], array) for name, array in arrays.items()}
    if target.before in begins:
        first = _identity(before, faces, target.before, output)
    else:
        first = cut_out(before, faces, {target.before: output})
    every = {pair.after: pair.before for pair in (*begins.values(), *read)}
    types = {name: news[name].dtype or faces[old].dtype for name, old in every.items()}
    given = {name: replace(faces[old], dtype=types[name]) for name, old in every.items()}
    second = cut_out(after, given, {target.after: output})
    inputs = {names[name]: array for name, array in arrays.items()}
    nodes = tuple(node for node in after.graph if node in later.nodes)
    return Cut(first, second, inputs, tuple(begins.values()), nodes)


def _further(
    olds: Mapping[str, ir.Value], begins: Mapping[str, Pair], usable: Sequence[Pair], target: Pair
) -> dict[str, Pair]:
    """What else the original's stretch begins with, where it does not begin as the other's does."""
    wrong = olds[target.before]
    stretch = stretch_to([wrong], {olds[name] for name in begins})
    if all(value.name in begins for value in stretch.sources):
        return {}
    every = {pair.before: pair for pair in usable if pair.before != target.before}
    stretch = stretch_to([wrong], {olds[name] for name in every})
    return {v.name: every[v.name] for v in stretch.sources if v.name in every and v.name}


def _input_names(begins: Iterable[Pair], taken: set[str]) -> dict[str, str]:
    """Names that both models can give to these values: those of the original, if they are free."""
    names: dict[str, str] = {}
    for pair in begins:
        names[pair.before] = _free(pair.before, {*names.values(), *(taken - {pair.after})})
    return names


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _identity(before: ir.Model, faces: Mapping[str, Given], name: str, output: str) -> ir.Model:
    """The model of a value that is to stay as it is."""
    values = {n: ir.Value(name=f.name, type=ir.TensorType(f.dtype)) for n, f in faces.items()}
    for key, face in faces.items():
        values[key].shape = None if face.dims is None else ir.Shape(face.dims)
    node = ir.node("Identity", [values[name]], outputs=[ir.Value(name=output)])
    node.outputs[0].type = values[name].type
    imports = dict(before.opset_imports)
    graph = ir.Graph(
        list(values.values()), node.outputs, nodes=[node], name="before", opset_imports=imports
    )
    return ir.Model(graph, ir_version=before.ir_version)


def with_constants_computed(model: ir.Model) -> ir.Model:
    """A clone in which constants take the place of the nodes that compute them.

    Raises:
        GraphoptError: they do not run.
    """
    computed = model.clone()
    graph = computed.graph
    moving = depend_on_inputs(graph)
    read = [v for node in graph if moving.intersection(node.outputs) for v in reads(node)]
    values = {v.name: v for v in read if v.name and v not in moving and v.producer() is not None}
    if not values:
        return computed
    session = Session(cut_out(computed, {}, {n: n for n in values}), Reference.AS_WRITTEN)
    for name, array in session.run({}).items():
        become_initializer(values[name], tensor_of(array, name))
    for node in reversed([node for node in graph if not moving.intersection(node.outputs)]):
        remove_node(node)
    for value in [v for v in graph.initializers.values() if not v.uses()]:
        del graph.initializers[value.name or ""]
    return computed


def closer_pairs(cut: Cut, tolerance: Tolerance, provider: str) -> list[tuple[str, str]]:
    """Values inside a cut that are the same number by number, though nothing else tells so.

    Names as in the models of the cut; that of the original first.
    """
    first, second = (
        _inner_values(m, cut.inputs, tolerance, provider) for m in (cut.before, cut.after)
    )
    found = []
    for name, wrong in second.items():
        for other, right in first.items():
            if right.shape == wrong.shape and right.size > 1 and _are_close(right, wrong):
                found.append((other, name))
                break
    return found


def _inner_values(
    model: ir.Model, inputs: Mapping[str, np.ndarray], tolerance: Tolerance, provider: str
) -> dict[str, np.ndarray]:
    ends = {value.name for value in model.graph.outputs}
    moving = depend_on_inputs(model.graph)
    names = [
        name
        for name, value in values_of(model.graph).items()
        if value in moving and value.producer() is not None and name not in ends
    ]
    if not names:
        return {}
    probed = cut_out(model, {}, {name: name for name in names})
    session = Session(probed, tolerance.reference, provider=provider)
    return session.run({name: inputs[name] for name in session.inputs})


def _are_close(right: np.ndarray, wrong: np.ndarray) -> bool:
    if right.dtype.kind in "OSU" or wrong.dtype.kind in "OSU":
        return False
    (error,) = compared([({"value": right}, {"value": wrong})])
    return error.mismatch is None and error.rel_l2 <= SAME_ERROR


def shrunk_cut(
    before: ir.Model,
    after: ir.Model,
    found: Divergence,
    target: Pair,
    tolerance: Tolerance,
    provider: str,
) -> Cut | None:
    """The stretch of both models before a value that is wrong, as short as it can be made.

    The arguments are as of `cut_pair`.
    """
    cut = cut_pair(before, after, found, found.pairs, target)
    if cut is None or max(node_count(cut.before), node_count(cut.after)) <= NODES_MAXIMUM:
        return cut
    cut = _computed(cut)
    same = closer_pairs(cut, tolerance, provider)
    if not same or max(node_count(cut.before), node_count(cut.after)) <= NODES_MAXIMUM:
        return cut
    olds = _inner_values(cut.before, cut.inputs, tolerance, provider)
    found.values.add({name: olds[name] for name, _ in same})
    more = [Pair(old, new, "value") for old, new in same if new != target.after]
    shorter = cut_pair(before, after, found, [*found.pairs, *more], target)
    return cut if shorter is None else _computed(shorter)


def _computed(cut: Cut) -> Cut:
    before, after = (with_constants_computed(model) for model in (cut.before, cut.after))
    return replace(cut, before=before, after=after)


def reproducer(
    before: ir.Model,
    after: ir.Model,
    inputs: Mapping[str, np.ndarray],
    tolerance: Tolerance,
    provider: str,
) -> Reproducer | None:
    """Two models as a reproducer; None where the second is not wrong on these inputs.

    They are run as `graphopt validate` runs them to judge.

    Args:
        before: the reference.
        after: what should give the same.
        inputs: of both.
        tolerance: of the whole model.
        provider: "cpu" or "cuda".
    """
    right, wrong = (outputs_of(model, inputs, provider) for model in (before, after))
    errors = compared([(right, wrong)])
    if all(error.identical for error in errors):
        return None
    error = worst(errors)
    for model, outputs in ((before, right), (after, wrong)):
        for value in model.graph.outputs:
            if value.name in outputs:
                value.shape = ir.Shape(outputs[value.name].shape)
    limit = _limit(tolerance, error)
    if why_over(Effect.LOSSY, errors, (Budget(limit),)) is None:
        return None
    return Reproducer(before, after, inputs, right, str(Budget(limit)), error)


def outputs_of(
    model: ir.Model, inputs: Mapping[str, np.ndarray], provider: str
) -> dict[str, np.ndarray]:
    """The outputs as deployed."""
    session = Session(model, Reference.AS_DEPLOYED, provider=provider)
    return session.run({name: inputs[name] for name in session.inputs})


def _limit(tolerance: Tolerance, error: float) -> float:
    """A budget for the reproducer: that of the model, or less where that is amplified later."""
    if tolerance.effect is Effect.EXACT:
        return 0.0
    kinds = [ROUNDING_LIMITS[kind][0] for kind in ("float32", *tolerance.computed_in.values())]
    own = [b.limit for b in tolerance.budgets if b.metric == "rel-l2"]
    limit = min(own, default=0.0) if tolerance.effect is Effect.LOSSY else max(kinds)
    # The first digit of half the error: the same error on another machine is still over it.
    return limit if limit < error else float(f"{error / 2:.0e}")


# ------------------------------------------------------------------ delta debugging


def fewest(items: Sequence[str], fails: Callable[[Collection[str]], bool]) -> list[str]:
    """A subset of which each item is needed for it to fail, as far as the tries go.

    Args:
        items: with which it fails.
        fails: whether a subset still does.
    """
    kept, parts, tries = list(items), 2, 0
    while len(kept) > 1 and tries < TRIES_MAXIMUM:
        size = -(-len(kept) // parts)
        chunks = [kept[start : start + size] for start in range(0, len(kept), size)]
        for chunk in chunks:
            rest = [item for item in kept if item not in set(chunk)]
            tries += 1
            if rest and fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(len(kept), parts * 2)
    return kept
