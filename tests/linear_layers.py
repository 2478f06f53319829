"""Models with one linear node and what follows it, for the tests of what folds into such nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.contract import Change, Pass
from graphopt.operators import all_graphs
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse

LAYERS = {
    "Conv": ("float[2,4,5,5] x", "c = Conv(x, w, b)", (6, 4, 2, 2), "2,6,4,4"),
    "ConvTranspose": ("float[2,4,5,5] x", "c = ConvTranspose(x, w, b)", (4, 6, 2, 2), "2,6,6,6"),
    "Gemm": ("float[3,4] x", "c = Gemm <alpha = 0.5, beta = 0.3> (x, w, b)", (4, 6), "3,6"),
    "MatMul": ("float[2,3,4] x", "c = MatMul(x, w)", (4, 6), "2,3,6"),
}
"""By operator: the input, the node, the shape of its weight, the dimensions of its output."""


def normal(seed: int, *shape: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    array: np.ndarray = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return array


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for graph in all_graphs(model) for node in graph]


@dataclass(frozen=True)
class Folding:
    """A pass under test.

    Attributes:
        tested: the pass.
        follower: a node that it folds: it makes `y` of the output `c` and the constant `k`.
    """

    tested: Pass
    follower: str = ""

    def layer(
        self,
        operator: str = "Conv",
        follower: str | None = None,
        k: np.ndarray | None = None,
        kind: str = "float",
        **replaced: tuple[str, str],
    ) -> ir.Model:
        """A model with a linear node, its output `c`, a constant `k`, and what follows.

        Args:
            operator: of the linear node.
            follower: in place of the pass's own.
            k: the constant.
            kind: the element type, as text.
            replaced: pairs of a text and what to put in its place.
        """
        given, node, shape, result = LAYERS[operator]
        text = f"""
        agraph ({given}, float[1] w, float[1] b, float[1] k) => (float[{result}] y)
        {{
            {node}
            {self.follower if follower is None else follower}
        }}
        """
        for old, new in replaced.values():
            text = text.replace(old, new)
        dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[kind]
        channel = (6, 1, 1) if operator.startswith("Conv") else (6,)
        return parse(
            text.replace("float", kind),
            w=normal(1, *shape, dtype=dtype),
            b=normal(2, 6, dtype=dtype),
            k=(normal(3, *channel) if k is None else k).astype(dtype),
        )

    def assert_folds(self, model: ir.Model, *wanted: str) -> Change:
        """The pass leaves the operators that are wanted, and the outputs."""
        before = model.clone()
        change = apply_pass(self.tested, model)
        assert operators(model) == list(wanted), change.skips
        assert_equivalent(before, model)
        return change

    def reasons(self, model: ir.Model) -> list[str]:
        """Why the pass leaves the model alone."""
        return [skip.reason for skip in assert_unchanged(self.tested, model).skips]
