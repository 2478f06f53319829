"""What tune and sensitivity try on single layers: the treatments that come with graphopt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.operators import is_onnx
from graphopt.treatments import Estimate, Layer, Treatment
from graphopt_passes.prune.masks import pattern_of
from graphopt_passes.prune.prune_importance import PruneImportance
from graphopt_passes.prune.sparsities import Pruned, estimates_of_pruned
from graphopt_passes.prune.weights import prunable_weights
from graphopt_passes.quantize.cluster_weights import (
    CLUSTERS,
    Clusters,
    ClusterWeights,
    estimates_of_clusters,
)
from graphopt_passes.quantize.dynamic_layers import PRODUCTS, NotQuantized, candidate_of
from graphopt_passes.quantize.integer_weights import Integers, estimates_of_integers
from graphopt_passes.quantize.layers import stored_tensor
from graphopt_passes.quantize.narrow_weights import Target, targets_of
from graphopt_passes.quantize.narrowing import Form, Problem, problem_of
from graphopt_passes.quantize.parameters import questions_on
from graphopt_passes.quantize.quantize_dynamic import QuantizeDynamic
from graphopt_passes.quantize.quantize_static import QuantizeStatic, weight_name
from graphopt_passes.quantize.quantize_weights import QuantizeWeights
from graphopt_passes.quantize.units import units_of

ELEMENTS_MINIMUM = 512
"""Smaller weights are not worth the nodes that would widen them."""

Estimates = Callable[[Problem, Sequence[Form]], Sequence[float]]


class ClusteredWeights(Treatment):
    """Weights that share so many values."""

    summary: ClassVar[str] = "the numbers of the weight share so many values (cluster-weights)"
    options: ClassVar[tuple[str, ...]] = tuple(map(str, reversed(CLUSTERS)))
    probed: ClassVar[tuple[str, ...]] = ("16", "6")

    def layers(self, model: ir.Model) -> list[Layer]:
        """All weights that can be made narrow."""
        return _weights(model)

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One cluster-weights."""
        return str(ClusterWeights(each=_pairs(chosen)))

    def estimates(
        self, model: ir.Model, layers: Sequence[str], context: Context
    ) -> dict[str, dict[str, Estimate]]:
        """By numbers that go to the nearest value."""
        forms = {option: Clusters(int(option)) for option in self.options}
        return _estimated(model, layers, forms, estimates_of_clusters, context)


class NarrowIntegers(Treatment):
    """Weights as integers of so many bits, widened at load."""

    summary: ClassVar[str] = "the weight has so many bits, in blocks of 32 (quantize-weights)"
    options: ClassVar[tuple[str, ...]] = ("8", "6", "5", "4", "3", "2")
    probed: ClassVar[tuple[str, ...]] = ("4", "2")
    block: ClassVar[int] = 32

    def layers(self, model: ir.Model) -> list[Layer]:
        """All weights that can be made narrow, but those on codes."""
        return _weights(model, lambda target: not target.is_integer)

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One quantize-weights."""
        return str(QuantizeWeights(each=_pairs(chosen), block=self.block))

    def estimates(
        self, model: ir.Model, layers: Sequence[str], context: Context
    ) -> dict[str, dict[str, Estimate]]:
        """By numbers that go to the nearest integer."""
        forms = {option: Integers(int(option), self.block, "auto") for option in self.options}
        return _estimated(model, layers, forms, estimates_of_integers, context)


class KernelIntegers(Treatment):
    """Weights that stay narrow in memory: MatMulNBits multiplies with them."""

    summary: ClassVar[str] = "MatMul and Gemm multiply with so many bits (quantize-weights)"
    options: ClassVar[tuple[str, ...]] = ("8", "4")
    probed: ClassVar[tuple[str, ...]] = options

    def layers(self, model: ir.Model) -> list[Layer]:
        """Weights of MatMul and Gemm."""
        return _weights(model, lambda target: target.operator in ("MatMul", "Gemm"))

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One quantize-weights, at an opset that has 4 bits."""
        found = QuantizeWeights(each=_pairs(chosen), block=32, form="kernel")
        return f"raise-opset{{opset=21}},{found}"


class IntegerKernels(Treatment):
    """Products on 8-bit codes, whose ranges samples say."""

    summary: ClassVar[str] = "the product works on 8-bit integers (quantize-static)"
    options: ClassVar[tuple[str, ...]] = ("int8",)
    probed: ClassVar[tuple[str, ...]] = options

    def layers(self, model: ir.Model) -> list[Layer]:
        """Conv, Gemm and MatMul that can work on codes."""
        return [
            _layer_of(unit.node, name)
            for unit in units_of(model.graph, lambda *_: None).values()
            if (name := weight_name(unit)) is not None
        ]

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One quantize-static."""
        return str(QuantizeStatic(only=tuple(chosen)))

    def estimates(
        self, model: ir.Model, layers: Sequence[str], context: Context
    ) -> dict[str, dict[str, Estimate]]:
        """None, but all that will be asked is asked at once."""
        units = units_of(model.graph, lambda *_: None).values()
        context.observe(model, questions_on([u for u in units if weight_name(u) in layers]))
        return {}


class DynamicIntegers(Treatment):
    """Products on 8-bit codes, whose ranges each run finds."""

    summary: ClassVar[str] = "8-bit integers, quantized at run time (quantize-dynamic)"
    options: ClassVar[tuple[str, ...]] = ("int8",)
    probed: ClassVar[tuple[str, ...]] = options
    provider: ClassVar[str | None] = "cpu"

    def layers(self, model: ir.Model) -> list[Layer]:
        """Gemm, MatMul and LSTM."""
        found = []
        for node in model.graph:
            if not is_onnx(node, *PRODUCTS, "LSTM"):
                continue
            try:
                layer = candidate_of(node, model.graph)
            except NotQuantized:
                continue
            weight = layer.node.inputs[1]
            if weight is not None and weight.name:
                found.append(_layer_of(node, weight.name))
        return found

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One quantize-dynamic, whatever it costs."""
        return str(QuantizeDynamic(minimum_gain=0.0, layer_error=1.0, only=tuple(chosen)))


class Zeros(Treatment):
    """Weights of which such a share is zero."""

    summary: ClassVar[str] = "such a share of the weight is zero (prune-importance)"
    options: ClassVar[tuple[str, ...]] = ("0.3", "0.5", "0.7")
    probed: ClassVar[tuple[str, ...]] = ("0.5",)

    def layers(self, model: ir.Model) -> list[Layer]:
        """All float weights."""
        pattern = pattern_of("unstructured")
        return list(map(_layer, prunable_weights(model, ELEMENTS_MINIMUM, pattern, Change())))

    def passes(self, chosen: Mapping[str, str]) -> str:
        """One prune-importance."""
        return str(PruneImportance(each=_pairs(chosen)))

    def estimates(
        self, model: ir.Model, layers: Sequence[str], context: Context
    ) -> dict[str, dict[str, Estimate]]:
        """By the entries that are worth least, the others refitted."""
        forms = {option: Pruned(float(option), "second-order") for option in self.options}
        return _estimated(model, layers, forms, estimates_of_pruned, context)


# ------------------------------------------------------------------ what they share


def _weights(model: ir.Model, accepts: Callable[[Target], bool] = lambda _: True) -> list[Layer]:
    return list(map(_layer, filter(accepts, targets_of(model, ELEMENTS_MINIMUM, Change()))))


def _layer(target: Target) -> Layer:
    return Layer(target.name, target.operator, target.size, target.stored_bytes)


def _layer_of(node: ir.Node, name: str) -> Layer:
    weight = node.inputs[1]
    assert weight is not None
    tensor = stored_tensor(weight)
    if tensor is None:
        return Layer(name, node.op_type, 0, 0)
    return Layer(name, node.op_type, int(tensor.size), tensor.nbytes)


def _pairs(chosen: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}:{option}" for name, option in chosen.items())


def _estimated(
    model: ir.Model,
    layers: Iterable[str],
    forms: Mapping[str, Form],
    estimates: Estimates,
    context: Context,
) -> dict[str, dict[str, Estimate]]:
    """What forms of weights are expected to do, by what samples say of their inputs."""
    names = set(layers)
    targets = [t for t in targets_of(model, 1, Change()) if t.name in names]
    asked = [question for target in targets for question in target.asked]
    answers = context.observe(model, asked) if asked and context.observer is not None else {}
    found = {}
    for target in targets:
        squares = estimates(problem_of(target, answers), list(forms.values()))
        found[target.name] = {
            option: Estimate(form.stored_bytes(target), max(square, 0.0))
            for (option, form), square in zip(forms.items(), squares, strict=True)
        }
    return found
