"""What rewrites of a graph have in common: constants, names, and rewiring that keeps outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.operators import (
    all_graphs,
    graphs_and_functions,
    is_onnx,
    nodes_within,
    opset_of,
    subgraphs,
)
from graphopt.packing import holds_tensor, is_constant
from graphopt.skeleton import known_shape, state_shape

SMALL_ELEMENTS = 1024
"""Constants up to this many elements are shape arithmetic and the like, and cheap to look at."""


_ARRAY = "graphopt.array"
"""Key in the `meta` of a tensor: its array, or False where that is large."""


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant, or None when the value is not one.

    Initializers that are also inputs are not constant. Looks through a Constant node.
    """
    if value is None or not is_constant(value):
        return None
    node = value.producer()
    if node is None:
        return value.const_value
    return node_tensor(node)


def node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, in whichever attribute; None when sparse or by reference."""
    if not holds_tensor(node):
        return None
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        return attribute.as_tensor()
    dtype = {"f": np.float32, "i": np.int64, "s": np.object_}[name.removeprefix("value_")[0]]
    if dtype is np.object_:
        content = attribute.value if name.endswith("s") else [attribute.value]
        encoded = [s if isinstance(s, bytes) else s.encode() for s in content]
        return ir.StringTensor(
            encoded, shape=ir.Shape([len(encoded)] if name.endswith("s") else [])
        )
    return ir.tensor(np.asarray(attribute.value, dtype))


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """The input at an index; None where it is left out, also at the end."""
    return node.inputs[index] if index < len(node.inputs) else None


def small_integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The numbers of a small constant, in order, as of shapes, axes and pads; or None."""
    array = small_array(value)
    return None if array is None else tuple(int(number) for number in array.reshape(-1))


def stated_integers(node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """What an attribute states, or in a later opset an input; () where neither does.

    None where the input is not constant.
    """
    attribute = node.attributes.get(name)
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    value = input_of(node, index)
    return () if value is None else small_integers(value)


def why_too_old(model: ir.Model, first_opset: int) -> str | None:
    """Why a pass that is written for an opset and later ones must not run; None when it may."""
    opset = opset_of(model)
    return (
        f"opset {opset} is older than {first_opset}; raise it first"
        if opset < first_opset
        else None
    )


def small_array(value: ir.Value | None, limit: int = SMALL_ELEMENTS) -> np.ndarray | None:
    """The array of a constant of at most `limit` elements, or None. Not to be modified."""
    tensor = constant_tensor(value)
    if tensor is None:
        return None
    known: np.ndarray | bool | None = tensor.meta.get(_ARRAY)
    if known is None:
        # Asked for again and again, and a tensor in a proto makes its array anew each time.
        known = tensor.meta[_ARRAY] = tensor.size <= SMALL_ELEMENTS and tensor.numpy()
    return known if isinstance(known, np.ndarray) and known.size <= limit else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value where every dimension is known for certain, else None."""
    shape = known_shape(value)
    if shape is None or not shape.is_static():
        return None
    return tuple(int(d) for d in shape.numpy())


class Names:
    """Gives names that no value or node of the model has yet.

    The model is looked through when the first name is asked for: most passes never do.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}

    def new(self, hint: str) -> str:
        """The hint itself, or the hint with a number."""
        self._look()
        name, number = hint, self._last.get(hint, 0)
        while name in self._taken:
            number += 1
            name = f"{hint}_{number}"
        self._last[hint] = number
        self._taken.add(name)
        return name

    def keep(self, name: str) -> None:
        """Give the name to nothing: it is of what was taken out and will be put back."""
        self._look()
        self._taken.add(name)

    def _look(self) -> None:
        if not self._taken:
            self._taken = _names_in(self._model)


def _names_in(model: ir.Model) -> set[str]:
    taken: set[str] = set()
    for graph in all_graphs(model):
        taken.update(v.name for v in graph.inputs if v.name)
        taken.update(graph.initializers)
        for node in graph:
            taken.update(o.name for o in node.outputs if o.name)
            if node.name:
                taken.add(node.name)
    return taken


def unshadow(model: ir.Model) -> int:
    """Rename what hides an outer value inside a body of If, Loop or Scan; how much there was.

    In memory a node refers to values, on disk to names. A rewrite that lets a body read another
    outer value would be read back as a reading of the inner value of that name.
    """
    if not any(subgraphs(node) for node in model.graph):
        return 0
    names = Names(model)
    waiting: list[tuple[ir.Graph, tuple[set[str], ...]]] = [(model.graph, ())]
    renamed = 0
    while waiting:
        graph, outer = waiting.pop()
        inner = [*graph.inputs, *graph.initializers.values()]
        inner += [output for node in graph for output in node.outputs]
        for value in dict.fromkeys(inner):
            if value.name and any(value.name in names_outside for names_outside in outer):
                value.name = names.new(value.name)
                renamed += 1
        visible = (*outer, {value.name for value in inner if value.name})
        waiting += [(body, visible) for node in graph for body in subgraphs(node)]
    return renamed


def tensor_of(array: np.ndarray, name: str, dtype: ir.DataType | None = None) -> ir.TensorProtocol:
    """A tensor of an array; of objects, a tensor of strings."""
    if array.dtype != object:
        return ir.Tensor(np.asarray(array), dtype=dtype, name=name)
    texts = array.reshape(-1).tolist()
    encoded = [text if isinstance(text, bytes) else str(text).encode() for text in texts]
    return ir.StringTensor(encoded, shape=ir.Shape(array.shape), name=name)


def replace_tensors(
    model: ir.Model, replacement: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> None:
    """Put other tensors in the place of those of initializers and attributes, in functions too."""
    for graph in graphs_and_functions(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = replacement(value.const_value)
        for node in graph:
            for name, attribute in node.attributes.items():
                if attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
                    continue
                tensor = replacement(attribute.as_tensor())
                if tensor is not attribute.value:
                    node.attributes[name] = ir.AttrTensor(
                        name, tensor, doc_string=attribute.doc_string
                    )


def add_initializer(graph: ir.Graph, array: np.ndarray | ir.TensorProtocol, name: str) -> ir.Value:
    """A new initializer of the graph. The name must be new (see `Names`)."""
    tensor = tensor_of(array, name) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def become_initializer(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer take the name and the readers of what a node makes.

    The value must not be an output of its graph. It has no name any more, and the node stays, with
    its other outputs; remove it, or give the value another name.
    """
    node, name = value.producer(), value.name
    assert node is not None and isinstance(node.graph, ir.Graph) and name is not None
    # The old value lets go of the name first.
    value.name = None
    value.replace_all_uses_with(add_initializer(node.graph, tensor, name))


def is_read(node: ir.Node) -> bool:
    """Something reads what the node makes, or a graph outputs it."""
    return any(output.is_graph_output() or output.uses() for output in node.outputs)


def remove_node(node: ir.Node) -> None:
    """Remove a node that nothing reads; its bodies then read nothing any more either."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for inner in nodes_within(node):
        for index in range(len(inner.inputs)) if inner is not node else ():
            inner.replace_input_with(index, None)
    graph.remove(node, safe=True)


def is_read_as_scalar(value: ir.Value) -> bool:
    """A Range reads the value."""
    return any(is_onnx(use.node, "Range") for use in value.uses())


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """`replace_value` would succeed: no output of a graph would lose its name or its producer.

    Nor would a Range read a constant that is no scalar: other values onnxruntime looks at when it
    runs, and takes one element of any rank.
    """
    if is_constant(new) and known_shape(new) != () and is_read_as_scalar(old):
        return False
    if not old.is_graph_output():
        return True
    return (
        new.producer() is not None
        and new.graph is old.graph
        and not new.is_graph_output()
        and not new.is_graph_input()
    )


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, in subgraphs too.

    Where `old` is an output of its graph, `new` takes its place and its name. Ask `can_replace`
    first. The node that made `old` stays, without readers; remove it.
    """
    if old.is_graph_output():
        _take_output(old, new)
    old.replace_all_uses_with(new)


def _take_output(old: ir.Value, new: ir.Value) -> None:
    graph = old.graph
    assert graph is not None and can_replace(old, new), f"{new.name} cannot take {old.name}'s place"
    name, old.name = old.name, None
    new.name, new.type = name, old.type or new.type
    state_shape(new, new.shape if old.shape is None else old.shape)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads the value; None when there are more, or the graph outputs it.

    A reader inside a subgraph counts too, so compare `.graph` before merging with it.
    """
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node
