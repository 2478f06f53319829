"""Operators with inputs, for the interpreter in torch: cases of onnx, and those made here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graphopt.training.operators.element_types import from_onnx

CPU = torch.device("cpu")
MICROSOFT = "com.microsoft"


LEFT_OUT = {
    "bernoulli": "random",
    "training_dropout": "random",
    "resize_downsample_scales_linear_align_corners": "onnxruntime takes the output's whole size",
    "resize_downsample_scales_cubic_align_corners": "onnxruntime takes the output's whole size",
    "scan_sum": "Scan of opset 8, which is refused when it runs",
}
"""By how the names of cases begin, without `test_`: why they are not run."""


def is_left_out(case: Any) -> bool:
    """It is not run."""
    return bool(case.name.removeprefix("test_").startswith(tuple(LEFT_OUT)))


@cache
def backend_cases() -> Sequence[Any]:
    """The cases by which ONNX tests its backends; to make them takes 3 seconds."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        # The cases overflow and divide by 0 on purpose.
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return tuple(case for case in found if case.model is not None)


def tensor(content: Any) -> Tensor:
    """What a case has for an input or an output."""
    if isinstance(content, onnx.TensorProto):
        return from_onnx(ir.serde.deserialize_tensor(content), CPU)
    array = np.asarray(content)
    # Of the two types of 64 bits without a sign, torch knows one.
    array = array.view(np.uint64) if array.dtype == np.uint64 else array
    return from_onnx(ir.tensor(array), CPU)


def numbers(x: Tensor) -> np.ndarray:
    """In a type that numpy computes in."""
    if x.is_complex():
        return x.to(torch.complex128).numpy()
    if x.dtype == torch.uint64:
        return x.numpy()
    return x.detach().to(torch.float64 if x.is_floating_point() else torch.int64).numpy()


@dataclass(frozen=True)
class Single:
    """One node with its inputs.

    Attributes:
        op_type: of the node.
        inputs: arrays; None where one is left out.
        attributes: by name.
        output_count: how many outputs it has.
        domain: of the operator.
        opset: of the standard operators.
        constants: the indices of inputs that no gradient is asked for.
    """

    op_type: str
    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    output_count: int = 1
    domain: str = MICROSOFT
    opset: int = 21
    constants: tuple[int, ...] = ()

    @property
    def model(self) -> onnx.ModelProto:
        """The model of the node; types of outputs are left open."""
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        outputs = [f"y{i}" for i in range(self.output_count)]
        node = helper.make_node(self.op_type, names, outputs, domain=self.domain, **self.attributes)
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, self.inputs, strict=True)
            if x is not None
        ]
        made = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph([node], self.op_type, infos, made)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The inputs by name."""
        return {f"x{i}": x for i, x in enumerate(self.inputs) if x is not None}


def _floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _codes(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    limits = np.iinfo(dtype)
    drawn = np.random.default_rng([seed, *shape]).integers(limits.min, limits.max + 1, shape)
    return drawn.astype(dtype)


def _scale(number: float) -> np.ndarray:
    return np.array(number, np.float32)


def _whole(*numbers: int, dtype: type = np.int64) -> np.ndarray:
    return np.array(numbers, dtype)


_X = _floats(2, 4, 8), _floats(8), _floats(8, seed=1), _floats(8, seed=2)
_ZERO = np.array(128, np.uint8)
_U8 = (_codes(2, 3, 4, 4), _scale(0.0473), _ZERO)
_V8 = (_codes(2, 3, 4, 4, seed=1), _scale(0.0719), np.array(99, np.uint8))
_Y8 = (_scale(0.2113), np.array(120, np.uint8))
_POSITIVE = np.abs(_floats(3, seed=3)) + 0.5
_SCALES = np.array([1, 1, 2, 2], np.float32)
_ANGLES = _floats(16, 2), _floats(16, 2, seed=1)

FUSIONS: Sequence[Single] = (
    Single("Attention", [_floats(2, 3, 8), _floats(8, 24), _floats(24)], {"num_heads": 2}),
    Single(
        "Attention",
        [_floats(2, 3, 8), _floats(8, 24), _floats(24), _whole(2, 3, dtype=np.int32)],
        {"num_heads": 2, "unidirectional": 1},
    ),
    Single(
        "Attention",
        [
            _floats(2, 3, 8),
            _floats(8, 24),
            _floats(24),
            np.array([[1, 1, 0, 1], [1, 0, 1, 1]], np.int32),
            _floats(2, 2, 2, 1, 4),
        ],
        {"num_heads": 2},
        output_count=2,
    ),
    Single("BiasGelu", [_floats(2, 4, 8), _floats(8)]),
    Single(
        "EmbedLayerNormalization",
        [
            _whole(1, 2, 0, 4, 3, 1, dtype=np.int32).reshape(2, 3),
            _whole(0, 1, 1, 0, 0, 1, dtype=np.int32).reshape(2, 3),
            _floats(5, 8),
            _floats(4, 8),
            _floats(2, 8),
            _floats(8),
            _floats(8, seed=1),
            _whole(1, 1, 0, 1, 1, 1, dtype=np.int32).reshape(2, 3),
        ],
        output_count=2,
    ),
    Single("FastGelu", [_floats(2, 4, 8), _floats(8)]),
    Single("FusedMatMul", [_floats(2, 4, 3), _floats(2, 5, 4)], {"transA": 1, "transB": 1}),
    Single("FusedMatMul", [_floats(3, 4), _floats(4, 5)], {"alpha": 0.5}),
    Single(
        "FusedMatMul",
        [_floats(3, 2, 4), _floats(4, 2, 5)],
        {"transBatchA": 1, "transBatchB": 1},
    ),
    Single("Gelu", [_floats(2, 4, 8)]),
    Single(
        "GroupQueryAttention",
        [
            _floats(1, 3, 32),
            _floats(1, 3, 16),
            _floats(1, 3, 16, seed=1),
            _floats(1, 1, 2, 16),
            _floats(1, 1, 2, 16, seed=1),
            _whole(4, dtype=np.int32),
            _whole(5, dtype=np.int32),
            _floats(16, 8),
            _floats(16, 8, seed=1),
        ],
        {"num_heads": 2, "kv_num_heads": 1, "do_rotary": 1},
        output_count=3,
        constants=(5, 6),
    ),
    Single(
        "GroupQueryAttention",
        [
            _floats(1, 3, 64),
            None,
            None,
            None,
            None,
            _whole(2, dtype=np.int32),
            _whole(3, dtype=np.int32),
        ],
        {"num_heads": 4, "kv_num_heads": 2, "local_window_size": 2, "softcap": 5.0},
        output_count=3,
    ),
    Single(
        "MultiHeadAttention",
        [_floats(2, 3, 8), _floats(2, 4, 8), _floats(2, 4, 8, seed=1), _floats(24)],
        {"num_heads": 2},
    ),
    Single(
        "MultiHeadAttention",
        [
            _floats(2, 3, 8),
            _floats(2, 4, 8),
            _floats(2, 4, 8, seed=1),
            None,
            np.array([[1, 1, 0, 1], [1, 0, 1, 1]], np.int32),
            _floats(1, 2, 3, 4),
        ],
        {"num_heads": 2},
    ),
    Single(
        "MultiHeadAttention",
        [
            _floats(2, 3, 8),
            _floats(2, 3, 8, seed=2),
            _floats(2, 3, 8, seed=1),
            None,
            None,
            None,
            _floats(2, 2, 2, 4),
            _floats(2, 2, 2, 4, seed=1),
        ],
        {"num_heads": 2, "unidirectional": 1, "scale": 0.3},
        output_count=3,
    ),
    Single("QuickGelu", [_floats(2, 4, 8)], {"alpha": 1.5}),
    Single(
        "RotaryEmbedding",
        [_floats(2, 3, 8), _whole(1, 2, 3, 4, 5, 6).reshape(2, 3), *_ANGLES],
    ),
    Single(
        "RotaryEmbedding",
        [_floats(2, 2, 3, 4), _whole(2), *_ANGLES],
        {"interleaved": 1},
    ),
    Single("SkipLayerNormalization", [_X[0], _floats(2, 4, 8, seed=1), *_X[1:]]),
    Single("SkipSimplifiedLayerNormalization", [_X[0], _floats(2, 4, 8, seed=1), *_X[1:3]]),
    Single("SimplifiedLayerNormalization", [_X[0], _X[1]], {"axis": -1}, domain=""),
)
"""Operators of onnxruntime that compute with floating-point numbers."""

STANDARD: Sequence[Single] = (
    Single(
        "BatchNormalization",
        [_floats(2, 3, 4), _floats(3), _floats(3, seed=1), _floats(3, seed=2), _POSITIVE],
        domain="",
    ),
    Single("Cast", [_floats(2, 3)], {"to": TensorProto.DOUBLE}, domain=""),
    Single("CastLike", [_floats(2, 3), np.zeros(1)], domain="", constants=(1,)),
    Single("CenterCropPad", [_floats(3, 5), _whole(5, 2)], domain="", opset=18),
    Single("Clip", [_floats(3, 4)], {"min": -0.5, "max": 0.5}, domain="", opset=7),
    Single("Erf", [_floats(3, 4)], domain=""),
    Single("GlobalLpPool", [_floats(2, 3, 4, 4)], {"p": 3}, domain=""),
    Single("LRN", [_floats(2, 5, 2, 2)], {"size": 3, "alpha": 0.3}, domain=""),
    Single("Mish", [_floats(3, 4)], domain=""),
    Single("Pad", [_floats(2, 3)], {"pads": [0, 1, 1, 0], "value": 1.5}, domain="", opset=10),
    Single("ReduceSum", [_floats(2, 3, 4)], {"axes": [1], "keepdims": 0}, domain="", opset=11),
    Single("Resize", [_floats(1, 1, 2, 3), _SCALES], {"mode": "nearest"}, domain="", opset=10),
    Single(
        "RotaryEmbedding",
        [_floats(2, 3, 8), *_ANGLES, _whole(1, 2, 3, 4, 5, 6).reshape(2, 3)],
        {"num_heads": 2},
        domain="",
        opset=23,
    ),
    Single("Slice", [_floats(4, 5)], {"starts": [1, -3], "ends": [9, -1]}, domain="", opset=9),
    Single("Slice", [_floats(4, 5), _whole(3), _whole(-9), _whole(0), _whole(-2)], domain=""),
    Single("Softmax", [_floats(2, 3, 4)], domain="", opset=11),
    Single("Split", [_floats(5, 2)], {"split": [2, 3]}, 2, domain="", opset=11),
    Single("Squeeze", [_floats(2, 1, 3, 1)], {"axes": [1]}, domain="", opset=11),
    Single("TopK", [_floats(3, 4)], {"k": 2, "axis": 1}, 2, domain="", opset=9),
    Single("Trilu", [_floats(3, 4), _whole(1)], {"upper": 0}, domain=""),
    Single("Unsqueeze", [_floats(2, 3)], {"axes": [0, 3]}, domain="", opset=11),
    Single("Upsample", [_floats(1, 1, 2, 3)], {"scales": [1.0, 1.0, 2.0, 2.0]}, domain="", opset=7),
)
"""Standard operators of older opsets, and those of which all cases are large."""

CODES: Sequence[Single] = (
    Single("DequantizeLinear", [*_U8]),
    Single("QuantizeLinear", [_floats(2, 3, 4, 4), _scale(0.0473), _ZERO]),
    Single(
        "DynamicQuantizeLSTM",
        [
            _floats(4, 2, 3),
            _codes(2, 3, 16, dtype=np.int8),
            _codes(2, 4, 16, dtype=np.int8),
            _floats(2, 32),
            None,
            _floats(2, 2, 4),
            _floats(2, 2, 4, seed=1),
            None,
            np.full((2, 16), 0.01, np.float32),
            np.zeros((2, 16), np.int8),
            np.full((2, 16), 0.02, np.float32),
            np.zeros((2, 16), np.int8),
        ],
        {"hidden_size": 4, "direction": "bidirectional"},
        output_count=3,
    ),
    Single(
        "DynamicQuantizeMatMul",
        [_floats(2, 3, 8), _codes(8, 5, dtype=np.int8), np.abs(_floats(5)) / 99, None, _floats(5)],
    ),
    Single(
        "GatherBlockQuantized",
        [_codes(5, 16), _whole(0, 4, 2, -1).reshape(2, 2), _floats(5, 2)],
        {"block_size": 16, "bits": 4, "quantize_axis": 1},
    ),
    Single(
        "GatherBlockQuantized",
        [_codes(5, 32), _whole(0, 4, 2), _floats(5, 2), _codes(5, 2)],
        {"block_size": 16, "bits": 8, "quantize_axis": 1},
    ),
    Single(
        "MatMulIntegerToFloat",
        [
            _codes(3, 4),
            _codes(4, 5, dtype=np.int8),
            _scale(0.1),
            np.abs(_floats(5)),
            np.array(99, np.uint8),
            None,
            _floats(5),
        ],
    ),
    Single(
        "MatMulNBits",
        [_floats(2, 3, 40), _codes(6, 2, 16), _floats(12), _codes(6)],
        {"K": 40, "N": 6, "bits": 4, "block_size": 32},
    ),
    Single(
        "MatMulNBits",
        [_floats(3, 32), _codes(6, 2, 16), _floats(12), None, None, _floats(6)],
        {"K": 32, "N": 6, "bits": 8, "block_size": 16},
    ),
    Single(
        "QGemm",
        [
            _codes(3, 4),
            _scale(0.1),
            np.array(99, np.uint8),
            _codes(5, 4, dtype=np.int8),
            _scale(0.02),
            np.array(0, np.int8),
            _whole(100, -200, 50, 7, 0, dtype=np.int32),
            _scale(0.3),
            np.array(128, np.uint8),
        ],
        {"transB": 1},
    ),
    Single("QLinearAdd", [*_U8, *_V8, *_Y8]),
    Single("QLinearMul", [*_U8, *_V8, *_Y8]),
    Single("QLinearAveragePool", [*_U8, *_Y8], {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0]}),
    Single("QLinearConcat", [*_Y8, *_U8, *_V8], {"axis": 1}),
    Single("QLinearGlobalAveragePool", [*_U8, *_Y8]),
    Single("QLinearLeakyRelu", [*_U8, *_Y8], {"alpha": 0.1}),
    Single("QLinearSigmoid", [*_U8, _scale(1 / 256), np.array(0, np.uint8)]),
    Single(
        "QLinearSoftmax",
        [*_U8, _scale(1 / 256), np.array(0, np.uint8)],
        {"opset": 13, "axis": -1},
    ),
)
"""Operators of onnxruntime that read codes."""
