"""Runs an ONNX model in torch, with gradients.

Any value of the main graph can be given and any can be asked for: a feature, to run one block of a
network; a weight, to train it. What hangs on constants alone is computed once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from graphopt.contract import describe
from graphopt.errors import ModelError, SampleError, did_you_mean
from graphopt.operators import all_graphs, is_onnx, is_random, nodes_within, subgraphs
from graphopt.rewriting import node_tensor, unshadow
from graphopt.training.binding import Place, bound, why_not
from graphopt.training.operators.element_types import TORCH_TYPES, from_onnx
from graphopt.training.operators.operator_types import Body, Results
from graphopt.training.program import Program, assemble, outer_values, reads_of

Kernel = Callable[..., Results]

_NAMED_MAXIMUM = 20
"""Nodes that cannot be computed, in one message."""


class Interpreter:
    """Runs an ONNX model in torch, with gradients.

    It works under `torch.func` too: `torch.func.vmap` adds a sample axis to a model that is made
    for a fixed batch. A thread may call it while another does.

    Attributes:
        device: where it runs.
    """

    def __init__(
        self,
        model: ir.Model,
        device: torch.device | str = "cpu",
        straight_through: bool = False,
        wide: bool = False,
    ) -> None:
        """Prepare a model; nothing is computed yet.

        Args:
            model: its nodes in an order in which they can run. Not modified, and not to be
                modified after.
            device: where tensors are made; what is fed has to be there.
            straight_through: codes of QuantizeLinear and of dynamic quantization, and numbers of 8
                and 4 bits that Cast makes, are floating tensors of the same numbers, so that
                gradients pass (Bengio et al., arXiv 1308.3432) where they are not saturated.
            wide: what the model computes in 16 bits is computed in float32, results included:
                gradients do not vanish then, and processors are far faster at it.

        Raises:
            ModelError: an operator, an attribute or a type of the model is not known here; the
                message names all of them.
        """
        self.device = torch.device(device)
        self._model = inlined(model)
        _check(self._model)
        self._place = Place(
            {"": self._model.opset_imports.get("ai.onnx", 0), **self._model.opset_imports},
            self.device,
            straight_through,
            self._body_of,
            wide,
        )
        graph = self._model.graph
        made = (output for node in graph for output in node.outputs)
        values = (*graph.inputs, *graph.initializers.values(), *made)
        self._values = {value.name: value for value in values if value.name}
        self._constants: dict[ir.Value, Tensor] = {}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...], frozenset[str]], _Plan] = {}
        # A body is assembled when it first runs, which may be while a plan is made.
        self._lock = threading.RLock()

    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return [value.name or "" for value in self._model.graph.outputs]

    def computed(self) -> list[str]:
        """The names of what nodes of the main graph make, in the order in which they run."""
        return [value.name for node in self._model.graph for value in node.outputs if value.name]

    def run(
        self,
        feeds: Mapping[str, Tensor],
        wanted: Sequence[str] | None = None,
        cut: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Compute values of the main graph.

        Args:
            feeds: by name, inputs, initializers or values that nodes make. A value that is fed is
                taken as given: nodes that only serve to make it do not run. Gradients go to what
                is fed, and to nothing else. Of the types of the model, on the device.
            wanted: names of values; None stands for the outputs. What hangs on no fed value is
                a copy.
            cut: names of values through which no gradient goes back: what reads them takes them as
                given, and they still are what was computed where they are wanted.

        Returns:
            The wanted values by name, in the order in which they were asked for.

        Raises:
            SampleError: a name is not known, or an input that is needed is not fed.
        """
        names = self.outputs() if wanted is None else wanted
        key = frozenset(feeds), tuple(names), frozenset(cut)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = self._planned(*key)
        results = plan.program([self._place.as_computed(feeds[name]) for name in plan.fed])
        return {
            name: result.clone() if name in plan.copied else result
            for name, result in zip(names, results, strict=True)
        }

    def _value(self, name: str) -> ir.Value:
        value = self._values.get(name)
        if value is None:
            raise SampleError(f"the model has no value {name!r}{did_you_mean(name, self._values)}")
        return value

    def _planned(
        self, fed: frozenset[str], wanted: tuple[str, ...], cut: frozenset[str] = frozenset()
    ) -> _Plan:
        given = {name: self._value(name) for name in sorted(fed)}
        results = [self._value(name) for name in wanted]
        nodes = self._needed(results, set(given.values()))
        hanging = set(given.values())
        live = []
        for node in nodes:
            is_live = any(value in hanging for value in reads_of(node))
            if is_live or any(is_random(inner) for inner in nodes_within(node)):
                live.append(node)
                hanging.update(node.outputs)
        read = (value for node in live for value in reads_of(node) if value is not None)
        known = dict.fromkeys(v for v in (*read, *results) if v not in hanging)
        with _to_keep():
            self._fold(list(known))
            constants = {value: self._constants[value] for value in known}
            given_values, ends = tuple(given.values()), {self._value(name) for name in cut}
            program = assemble(live, given_values, constants, results, self._kernel_of, ends)
        copied = {name for name, v in zip(wanted, results, strict=True) if v in constants}
        return _Plan(program, tuple(given), frozenset(copied))

    def _needed(self, wanted: Sequence[ir.Value], known: set[ir.Value]) -> list[ir.Node]:
        """The nodes that make the wanted values out of known ones and constants, in order."""
        needed: set[ir.Node] = set()
        waiting, seen = list(wanted), set(known)
        while waiting:
            value = waiting.pop()
            if value in seen or _leaf(value) is not None:
                continue
            seen.add(value)
            node = value.producer()
            if node is None:
                raise SampleError(f"the input {value.name!r} is needed, and not fed")
            if node not in needed:
                needed.add(node)
                waiting += (read for read in reads_of(node) if read is not None)
        return [node for node in self._model.graph if node in needed]

    def _fold(self, values: Sequence[ir.Value]) -> None:
        """Compute values that hang on constants alone, and keep them."""
        missing = [value for value in values if value not in self._constants]
        nodes = self._needed(missing, set(self._constants))
        read_by = [value for node in nodes for value in reads_of(node) if value is not None]
        leaves = [value for value in (*read_by, *missing) if _leaf(value) is not None]
        for value in leaves:
            self._keep(value)
        known = {v: self._constants[v] for v in (*read_by, *leaves) if v in self._constants}
        program = assemble(nodes, (), known, missing, self._kernel_of)
        self._constants.update(zip(missing, program(()), strict=True))

    def _keep(self, leaf: ir.Value) -> None:
        tensor = _leaf(leaf)
        if leaf not in self._constants and tensor is not None:
            self._constants[leaf] = self._place.as_computed(from_onnx(tensor, self.device))

    def _kernel_of(self, node: ir.Node) -> Kernel:
        return bound(node, self._place)

    def _body_of(self, node: ir.Node, graph: ir.Graph) -> Body:
        outer = outer_values(subgraphs(node))
        programs: list[Program] = []

        def body(inputs: Sequence[Tensor], around: Sequence[Tensor]) -> list[Tensor]:
            with self._lock:
                if not programs:
                    programs.append(self._program_of(graph, outer))
            return programs[0]((*inputs, *around))

        return body

    def _program_of(self, graph: ir.Graph, outer: Sequence[ir.Value]) -> Program:
        nodes = [inner for inner in graph if not is_onnx(inner, "Constant")]
        made = (output for inner in graph for output in inner.outputs)
        leaves = [v for v in (*graph.initializers.values(), *made) if _leaf(v) is not None]
        with _to_keep():
            for value in leaves:
                self._keep(value)
            constants = {value: self._constants[value] for value in leaves}
            given = (*graph.inputs, *outer)
            return assemble(nodes, given, constants, graph.outputs, self._kernel_of)


@contextmanager
def _to_keep() -> Iterator[None]:
    """Tensors that are made within serve all runs to come.

    So they are of no transform of `torch.func` that this run is under, and can be differentiated
    with even if this is a run without gradients.
    """
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class _Plan:
    """How to run for certain names.

    Attributes:
        program: what runs.
        fed: the names of what it is called with, in order.
        copied: wanted names that are constants, which a caller must not get hold of.
    """

    program: Program
    fed: tuple[str, ...]
    copied: frozenset[str]


def _leaf(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None of anything else."""
    node = value.producer()
    if node is None:
        return value.const_value
    return node_tensor(node)


def inlined(model: ir.Model) -> ir.Model:
    """The model, or a copy in which calls of its own functions are replaced by their nodes.

    Raises:
        ModelError: a function is of another opset than the model.
    """
    if not model.functions:
        return model
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            if model.opset_imports.get(domain, version) != version:
                raise ModelError(
                    f"function {function.name!r} is of opset {version} of domain {domain!r}, the "
                    f"model of {model.opset_imports[domain]}: bring them to one version"
                )
    model = model.clone()
    InlinePass()(model)
    unshadow(model)
    return model


def _check(model: ir.Model) -> None:
    """Raise a ModelError that names all nodes that cannot be computed here."""
    wrong = []
    for graph in all_graphs(model):
        for node in graph:
            reason = why_not_run(node)
            if reason is not None:
                operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                wrong.append(f"{operator} (node {describe(node)!r}): {reason}")
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype not in TORCH_TYPES:
                wrong.append(f"initializer {value.name!r} is of {value.const_value.dtype.name}")
    if wrong:
        more = len(wrong) - _NAMED_MAXIMUM
        named = "; ".join(wrong[:_NAMED_MAXIMUM]) + (f"; and {more} more" if more > 0 else "")
        raise ModelError(f"the model cannot be computed in torch: {named}")


def why_not_run(node: ir.Node) -> str | None:
    """Why a node, leaving aside those in its bodies, cannot be computed here; None where it can."""
    return _why_no_constant(node) if is_onnx(node, "Constant") else why_not(node)


def _why_no_constant(node: ir.Node) -> str | None:
    tensor = node_tensor(node)
    if tensor is None:
        return "its value is sparse, or not stated"
    return None if tensor.dtype in TORCH_TYPES else f"its value is of {tensor.dtype.name}"
