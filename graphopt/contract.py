"""What a pass is: the one file that the author of a pass needs to read.

A pass is a frozen dataclass in a file of its own. Its fields are its options, its `name` is
verb-object in kebab case, and it registers under the entry-point group `graphopt.passes`::

    @dataclass(frozen=True)
    class DropNoise(Pass):
        '''Remove RandomNormal nodes that nothing reads.'''

        name: ClassVar[str] = "drop-noise"
        effect: ClassVar[Effect] = Effect.EXACT

        def apply(self, model: ir.Model, context: Context) -> Change:
            ...

The rules:

- `apply` rewrites the model in place. It never edits a tensor's array in place: snapshots share
  tensors. It never touches a value that it did not make, except to rewire its uses.
- Values carry inferred types and shapes when `apply` is called, as far as ONNX can infer them.
- Inputs, outputs, their order, names, element types and ranks stay.
- A pass holds no state between calls; the options are all it has.
- What it looked at and left alone, it says: `change.skip(node, "why")`.
- A weight that it computes becomes a tensor by `context.tensor`, so that memory does not grow.
- What values are like on the samples it asks `context.observe`.
- Nodes of certain operators it takes from `context.index_of(model)` instead of walking the graph.
- An initializer that loses its last reader to a rewrite is removed by the pipeline.
- Packed weights (`graphopt.packing.is_packed`) stay packed.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import SampleError
from graphopt.memo import Memo
from graphopt.operators import NodeIndex
from graphopt.rewriting import add_initializer, tensor_of
from graphopt.scratch import Scratch
from graphopt.spec import Bounds, check_options, format_pass

if TYPE_CHECKING:
    from graphopt.observe import Answers, Observer, Question
    from graphopt.validation import OutputError

__all__ = ["Bounds", "Change", "Context", "Effect", "Pass", "Skip"]

Sample = Mapping[str, np.ndarray]


class Effect(IntEnum):
    """What a pass may do to the outputs; the gate's tolerance follows from it."""

    EXACT = 0
    """Outputs are bit-identical."""
    ROUNDING = 1
    """Outputs are equal in real arithmetic."""
    LOSSY = 2
    """The model computes a different function, on purpose."""


@dataclass(frozen=True)
class Skip:
    """A place where a pass could have acted and did not, and why."""

    node: str
    reason: str


@dataclass
class Change:
    """What one application of a pass did, and what it left alone.

    Attributes:
        counts: how often each kind of rewrite was done, by a short description in the past tense.
        skips: what was left alone, in the order in which it was met.
        notes: what else a user may want to know of it, in words.
    """

    counts: Counter[str] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, what: str, times: int = 1) -> None:
        """Record a rewrite, for example `count("initializer removed")`."""
        if times:
            self.counts[what] += times

    def skip(self, node: ir.Node | ir.Value | str, reason: str) -> None:
        """Record that the pass left a node (or a value) alone, and why."""
        self.skips.append(Skip(node if isinstance(node, str) else describe(node), reason))

    def note(self, text: str) -> None:
        """Record what else a user may want to know, for example what was estimated."""
        self.notes.append(text)

    def __bool__(self) -> bool:
        return bool(self.counts)


def describe(item: ir.Node | ir.Value) -> str:
    """The name by which a user finds a node or value: its own, else that of its first output."""
    if isinstance(item, ir.Value):
        return item.name or "an unnamed value"
    return item.name or next((o.name for o in item.outputs if o.name), None) or item.op_type


@dataclass(frozen=True)
class Context:
    """What a pass may know about the run beside the model itself.

    Attributes:
        read_original: makes the model as it was given, before any pass; for `original`.
        samples: the calibration samples, one mapping from input name to array each; empty when
            none were given. They can be iterated over again and again. The samples that the gate
            judges by are not among them.
        provider: "cpu" or "cuda", where the model will run.
        progress: call it with a few words to tell a user who waits what is going on.
        scratch: where `tensor` puts what is large; None leaves it in memory.
        index: of the nodes of the model that a pass is given; see `index_of`.
        observer: runs models on the samples; see `observe`.
        memo: of what is dear to compute, where many models are built from one; None keeps nothing.
    """

    read_original: Callable[[], ir.Model]
    samples: Iterable[Sample] = ()
    provider: str = "cpu"
    progress: Callable[[str], None] = lambda _: None
    scratch: Scratch | None = None
    index: NodeIndex | None = None
    observer: Observer | None = None
    memo: Memo | None = None

    @cached_property
    def original(self) -> ir.Model:
        """The model as it was given. Not to be modified."""
        return self.read_original()

    def index_of(self, model: ir.Model) -> NodeIndex:
        """The nodes of a model by operator, as they are when `apply` is called.

        A pass that has changed the model since makes a `NodeIndex` of its own.
        """
        if self.index is not None and self.index.model is model:
            return self.index
        return NodeIndex(model)

    def observe(
        self, model: ir.Model, questions: Iterable[Question], remembers: bool = True
    ) -> Answers:
        """Statistics of named values of a model over all calibration samples.

        Memory does not grow with the number of samples, and what was asked before is remembered.

        Args:
            model: the one given to `apply`, `original`, or any other of the same inputs.
            questions: see `graphopt.observe.Question`.
            remembers: False for a model of which nothing will be asked again.

        Raises:
            SampleError: there are no samples, or the model does not run on one.
        """
        if self.observer is None:
            raise SampleError("there are no samples to observe the model on")
        return self.observer(model, questions, remembers)

    def varied(self) -> Context:
        """The same, but images are observed also mirrored and magnified, where they are few."""
        varied = None if self.observer is None else self.observer.varied()
        return self if varied is None else replace(self, observer=varied)

    def compare(
        self, first: ir.Model, second: ir.Model, samples_maximum: int
    ) -> tuple[OutputError, ...]:
        """The errors of one model's outputs against another's, as deployed, on calibration samples.

        Args:
            first: the reference.
            second: the model that is compared with it.
            samples_maximum: compare on so many samples at most.

        Raises:
            SampleError: there are no samples.
            GraphoptError: onnxruntime does not run one of the models.
        """
        return self.against(first, samples_maximum)(second)

    def against(
        self, first: ir.Model, samples_maximum: int
    ) -> Callable[[ir.Model], tuple[OutputError, ...]]:
        """What compares many models with one reference; see `compare`.

        Args:
            first: the reference, as it is now.
            samples_maximum: compare on so many samples at most.

        Raises:
            SampleError: there are no samples.
            GraphoptError: onnxruntime does not run the reference.
        """
        if self.observer is None:
            raise SampleError("there are no samples to compare models on")
        return self.observer.against(first, samples_maximum)

    def tensor(
        self, array: np.ndarray, name: str, dtype: ir.DataType | None = None
    ) -> ir.TensorProtocol:
        """A tensor of an array that a pass has computed.

        Args:
            array: of objects for strings.
            name: of the initializer to be.
            dtype: its type where that of the array does not say it.
        """
        tensor = tensor_of(array, name, dtype)
        return tensor if self.scratch is None else self.scratch.keep(tensor)

    def initializer(self, graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
        """A new initializer of a graph, of an array that a pass has computed.

        Args:
            graph: gets it.
            array: of objects for strings.
            name: that no value has yet; see `graphopt.rewriting.Names`.
        """
        return add_initializer(graph, self.tensor(array, name), name)

    def generator(self, purpose: str) -> np.random.Generator:
        """A random generator that depends on nothing but `purpose`, so that runs repeat."""
        return np.random.default_rng(zlib.crc32(purpose.encode()))


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a model. See the rules at the head of this file.

    Attributes:
        name: verb-object in kebab case; the same as the file and the class.
        effect: what the rewrite may do to the outputs.
        operators: the pass has nothing to do in a model that has none of these standard operators;
            None where that cannot be told by operators.
        needs_samples: the pass cannot run without samples.
        max_error: for a LOSSY pass, the relative L2 error of the worst output that the gate allows
            when the user states no budget.
        max_latency: what the result may take at most, as a share of the latency of the model before
            the pass; measured where models are timed at all. None where the pass claims nothing.

    Raises:
        SpecError: an option has the wrong type or is out of its bounds.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    operators: ClassVar[frozenset[str] | None] = None
    needs_samples: ClassVar[bool] = False
    max_error: ClassVar[float] = 0.0
    max_latency: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_options(self)

    def __str__(self) -> str:
        return format_pass(self)

    @property
    def error_budget(self) -> float:
        """What the gate allows with these options when the user states no budget; `max_error`."""
        return self.max_error

    @property
    def converts_interface(self) -> bool:
        """The user asks the pass for another floating-point type of inputs and outputs."""
        return False

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Why the pass must not run on this model, or None when it may."""
        return None

    @abstractmethod
    def apply(self, model: ir.Model, context: Context) -> Change:
        """Rewrite the model in place and say what was done."""

    def narrow(self) -> Pass | None:
        """A milder form to try when this one is over the budget (fewer layers, more bits)."""
        return None
