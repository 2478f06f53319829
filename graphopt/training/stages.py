"""A module taken apart into stages that are computed one after the other.

`torch.fx` traces the module down to the modules that the stages begin with, and no further: what
is inside of these stays as it is, with its names, and may hold control flow. A stage takes what
earlier stages have computed for it or for later ones, and passes on what later ones need; inputs of
the whole module it takes from the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from graphopt.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """One stage of a module.

    Attributes:
        module: takes the values of the stage before, then the inputs named below; returns what the
            next stage takes, several as a tuple. Its parameters are those of the whole module,
            under their names there.
        inputs: numbers of those inputs of the whole module that it takes, by argument name.
    """

    module: GraphModule
    inputs: dict[str, int]


MADE_OF_SIZES: Final = (torch.arange, torch.empty, torch.full, torch.ones, torch.zeros)
"""Functions of sizes, which are followed too: positions and masks are made so."""


class _Tracer(Tracer):
    """Looks into the modules that hold the start of a stage, and into no other."""

    proxy_buffer_attributes = True
    """Buffers are followed, so that they may be cut to the size of an input."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__(autowrap_functions=MADE_OF_SIZES)
        # Where they are looked for, beside the module of the forward.
        self._autowrap_search.append(torch)
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def split(module: nn.Module, starts: Sequence[str]) -> list[Stage]:
    """Take a module apart.

    Args:
        module: the whole; the stages share its parameters.
        starts: the names of the modules that the second and later stages begin with, in the order
            in which they are called.

    Returns:
        The stages, one more than there are starts.

    Raises:
        ConfigError: a start is no module, the module cannot be traced to it, or the starts are not
            called in this order.
    """
    _check_names(module, starts)
    opened = {start.rpartition(".")[0] for start in starts}
    opened |= {name for start in opened for name in _ancestors(start)}
    try:
        graph = _Tracer(opened).trace(module)
    except Exception as error:
        raise ConfigError(
            f"the model cannot be taken apart at {', '.join(starts)}: {error}; what is computed "
            "outside of the modules that stages begin with must not depend on values"
        ) from error
    for node in graph.nodes:
        # The code made of it would register functions of torch as its own, for all later traces.
        node.meta.pop("is_wrapped", None)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    cuts = [0, *_cuts(nodes, starts), len(nodes)]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results = next(iter(graph.find_nodes(op="output")))
    stages = []
    carried: list[Node] = []
    for first, end in pairwise(cuts):
        passed = [] if end == len(nodes) else _needed_after(nodes, end, results)
        own = nodes[first:end]
        stages.append(_stage(module, own, placeholders, carried, passed, results))
        carried = passed
    _check_shared(stages)
    return stages


def _check_names(module: nn.Module, starts: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for start in starts:
        if start not in names:
            near = did_you_mean(start, names)
            raise ConfigError(f"strategy.stages: {start!r} is no module{near}")


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:count]) for count in range(1, len(parts) + 1))]


def _cuts(nodes: Sequence[Node], starts: Sequence[str]) -> list[int]:
    """Where among the nodes the stages begin."""
    called: dict[str, int] = {}
    for at, node in enumerate(nodes):
        if node.op == "call_module":
            called.setdefault(str(node.target), at)
    for start in starts:
        if start not in called:
            raise ConfigError(
                f"strategy.stages: {start!r} is not called as a module when the model is computed; "
                "name one that is"
            )
    cuts = [called[start] for start in starts]
    if cuts != sorted(set(cuts)) or cuts[0] == 0:
        raise ConfigError(
            f"strategy.stages are {', '.join(starts)}; name modules in the order in which they are "
            "called, and not the very first"
        )
    return cuts


def _needed_after(nodes: Sequence[Node], cut: int, results: Node) -> list[Node]:
    """What is computed before a cut and used after it, in order."""
    later = {*nodes[cut:], results}
    return [node for node in nodes[:cut] if any(user in later for user in node.users)]


def _stage(
    module: nn.Module,
    own: Sequence[Node],
    placeholders: Sequence[Node],
    carried: Sequence[Node],
    passed: Sequence[Node],
    results: Node,
) -> Stage:
    last = not passed
    used = {
        source for node in (*own, *([results] if last else ())) for source in node.all_input_nodes
    }
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in carried}
    inputs = {}
    for number, node in enumerate(placeholders):
        if node in used:
            copies[node] = graph.node_copy(node)
            inputs[str(node.target)] = number
    for node in own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if last:
        graph.node_copy(results, copies.__getitem__)
    else:
        outputs = tuple(copies[node] for node in passed)
        graph.output(outputs[0] if len(outputs) == 1 else outputs)
    staged = GraphModule(module, graph)
    kept = module.state_dict().keys()
    for name, buffer in list(staged.named_buffers()):
        if name not in kept:
            holder, _, last_name = name.rpartition(".")
            staged.get_submodule(holder).register_buffer(last_name, buffer, persistent=False)
    return Stage(staged, inputs)


def _check_shared(stages: Sequence[Stage]) -> None:
    """A parameter that two stages use would be trained as two."""
    seen: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.module.named_parameters():
            if seen.setdefault(id(parameter), number) != number:
                raise ConfigError(
                    f"strategy.stages: {name!r} is used in stage {seen[id(parameter)]} and in "
                    f"stage {number}; put the modules that share it into one stage"
                )


def run(stages: Sequence[Stage], inputs: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    """What each of the stages gives to the next one, and the last as outputs."""
    results: list[tuple[object, ...]] = [()]
    for stage in stages:
        result = stage.module(*results[-1], **arguments_of(stage, inputs))
        results.append(result if isinstance(result, tuple) else (result,))
    return results[1:]


def arguments_of(stage: Stage, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of the whole module that a stage takes, by name; left out where not given."""
    return {name: inputs[at] for name, at in stage.inputs.items() if at < len(inputs)}
