"""pool-means: the mean over the places of an image as a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import Names, replace_value
from graphopt_passes.simplify.chains import rank_of
from graphopt_passes.simplify.reductions import keeps_dimensions, reduced_axes

RANK_MINIMUM = 4
"""Of an image. What has fewer axes is as likely a sequence, whose last axis holds no places."""


@dataclass(frozen=True)
class PoolMeans(Pass):
    """Write a ReduceMean over all axes but batch and channels as GlobalAveragePool.

    onnxruntime's pools work in the layout that its Conv nodes give an image, in float32 and on
    8-bit codes; for a ReduceMean the image is brought back to the layout of the model, or averaged
    with channels last at a fifteenth of the speed. PyTorch exports the last pool of a classifier as
    ReduceMean, and the squeeze of squeeze-and-excitation.
    """

    name: ClassVar[str] = "pool-means"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"ReduceMean"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """The layouts are those of the CPU's kernels."""
        return None if context.provider == "cpu" else "it serves onnxruntime's CPU provider only"

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Rewrite every such mean."""
        change, names = Change(), Names(model)
        for node in context.index_of(model).of("ReduceMean"):
            image = node.inputs[0]
            rank = rank_of(image)
            if rank is None or rank < RANK_MINIMUM:
                change.skip(node, "it is not known to average images")
            elif sorted(reduced_axes(node) or ()) != list(range(2, rank)):
                change.skip(node, "it averages over other axes than those of places")
            elif node.outputs[0].dtype != ir.DataType.FLOAT:
                change.skip(node, "it does not average float32")
            else:
                _pool(node, rank, names)
                change.count("mean written as a pool")
        return change


def _pool(mean: ir.Node, rank: int, names: Names) -> None:
    graph, image, result = mean.graph, mean.inputs[0], mean.outputs[0]
    assert isinstance(graph, ir.Graph) and image is not None
    pool = _node("GlobalAveragePool", image, [], names)
    graph.insert_before(mean, pool)
    if not keeps_dimensions(mean):
        pool = _node("Flatten", pool.outputs[0], [ir.AttrInt64("axis", 1)], names)
        graph.insert_before(mean, pool)
    pool.outputs[0].shape = result.shape
    replace_value(result, pool.outputs[0])
    graph.remove(mean, safe=True)


def _node(op_type: str, source: ir.Value, attributes: list[ir.Attr], names: Names) -> ir.Node:
    name = names.new(f"{op_type}_{source.name}")
    made = ir.Value(name=names.new(f"{source.name}_pooled"), type=source.type)
    return ir.Node("", op_type, [source], attributes, outputs=[made], name=name)
