"""The only door to onnxruntime: sessions, evaluation of constants, providers.

A model is run under one of two references. As written: graph optimizations off, one thread, so
that what runs is what the file says. As deployed: onnxruntime's defaults. The two differ, because
onnxruntime changes numerics itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import ModelError, RuntimeUnavailable, SampleError
from graphopt.skeleton import stubbed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_SHARED_DTYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.BOOL,
    }
)


class Reference(Enum):
    """How onnxruntime is told to run a model."""

    AS_WRITTEN = "as written"
    AS_DEPLOYED = "as deployed"


def _onnxruntime() -> Any:
    if "onnxruntime_tools" in sys.modules:
        raise RuntimeUnavailable(
            "onnxruntime_tools is loaded in this process; it is dead and breaks "
            "onnxruntime.transformers. Uninstall it: its successors are part of onnxruntime"
        )
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeUnavailable(
            "onnxruntime is not installed; install graphopt[cpu] or graphopt[gpu]"
        ) from None
    return onnxruntime


def version() -> str | None:
    """The version of onnxruntime, or None when it is not installed."""
    try:
        return str(_onnxruntime().__version__)
    except RuntimeUnavailable:
        return None


def check_provider(provider: str) -> None:
    """Raise RuntimeUnavailable when models cannot run on the provider here.

    Args:
        provider: "cpu" or "cuda".
    """
    if provider not in PROVIDERS:
        raise RuntimeUnavailable(f"there is no provider {provider!r}; use cpu or cuda")
    available = _onnxruntime().get_available_providers()
    if PROVIDERS[provider] not in available:
        raise RuntimeUnavailable(
            f"provider {provider!r} is not available: this onnxruntime has "
            f"{', '.join(available)}; install graphopt[gpu] on a machine with a GPU"
        )


class Session:
    """A model loaded into onnxruntime.

    Args:
        model: an `ir.Model`, whose large weights onnxruntime reads where they lie, or the path of
            a file.
        reference: as written or as deployed.
        provider: "cpu" or "cuda".
        threads: intra-op threads; None leaves onnxruntime's default (as written always has one).

    Raises:
        ModelError: onnxruntime does not load the model; the message is onnxruntime's.
        RuntimeUnavailable: onnxruntime or the provider is not there.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        reference: Reference = Reference.AS_DEPLOYED,
        *,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> None:
        check_provider(provider)
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if reference is Reference.AS_WRITTEN:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = 1
        elif threads is not None:
            options.intra_op_num_threads = threads
        self._kept: list[Any] = []
        source = str(model) if isinstance(model, Path) else self._share_weights(model, options)
        try:
            self.inner = ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise ModelError(_reason(error)) from error
        self.inputs: list[str] = [i.name for i in self.inner.get_inputs()]
        self.outputs: list[str] = [o.name for o in self.inner.get_outputs()]

    def _share_weights(self, model: ir.Model, options: Any) -> bytes:
        """The graph as bytes; the session reads the large weights from where they are."""
        proto, tensors = stubbed(model)
        names, values = [], []
        for stub in proto.graph.initializer:
            if stub.name not in tensors:
                continue
            tensor = tensors[stub.name]
            if tensor.dtype not in _SHARED_DTYPES:
                stub.CopyFrom(ir.to_proto(tensor))
                stub.name = tensor.name or stub.name
                continue
            array = np.ascontiguousarray(tensor.numpy())
            names.append(stub.name)
            values.append(_onnxruntime().OrtValue.ortvalue_from_numpy(array))
            self._kept.append(array)
        options.add_external_initializers(names, values)
        return bytes(proto.SerializeToString())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; a sequence or map becomes one entry per element, `name[key]`.

        Raises:
            SampleError: onnxruntime cannot run the model on these inputs.
        """
        try:
            results = self.inner.run(None, dict(feeds))
        except Exception as error:  # as above
            raise SampleError(_reason(error)) from error
        named = zip(self.outputs, results, strict=True)
        return {key: array for name, result in named for key, array in _arrays(name, result)}


def _arrays(name: str, result: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(result, dict):
        for key in sorted(result):
            yield from _arrays(f"{name}[{key}]", result[key])
    elif isinstance(result, list):
        for index, item in enumerate(result):
            yield from _arrays(f"{name}[{index}]", item)
    elif result is not None:
        yield name, np.asarray(result)


def _reason(error: Exception) -> str:
    """onnxruntime's message without its error code and source location."""
    text = str(error).replace("\n", " ").strip()
    marker = text.find(" : ", text.find("[ONNXRuntimeError]"))
    parts = text.split(" : ", 3)
    return parts[3] if marker >= 0 and len(parts) == 4 else text


def evaluate(
    nodes: Sequence[ir.Node], wanted: Sequence[ir.Value], opset_imports: Mapping[str, int]
) -> list[np.ndarray]:
    """The values of nodes that depend on constants only, computed by onnxruntime's own kernels.

    Args:
        nodes: in topological order; every input is an initializer or the output of one of them.
        wanted: outputs of the nodes.
        opset_imports: of the model that the nodes are from.

    Raises:
        ModelError: onnxruntime has no kernel for one of the nodes.
        SampleError: a node fails on its inputs.
    """
    made = {id(o) for node in nodes for o in node.outputs}
    constants = {
        id(v): v for node in nodes for v in node.inputs if v is not None and id(v) not in made
    }
    names = {key: f"v{n}" for n, key in enumerate([*constants, *made])}
    graph = onnx.GraphProto(name="constants")
    feeds = {}
    for key, value in constants.items():
        tensor = value.const_value
        assert tensor is not None, f"{value.name} is not a constant"
        info = onnx.helper.make_tensor_value_info(names[key], tensor.dtype.value, tensor.shape)
        graph.input.append(info)
        feeds[names[key]] = tensor.numpy()
    for node in nodes:
        proto = ir.to_proto(node)
        proto.input[:] = [names[id(v)] if v is not None else "" for v in node.inputs]
        proto.output[:] = [names[id(v)] if v.name else "" for v in node.outputs]
        graph.node.append(proto)
    for value in wanted:
        graph.output.append(onnx.ValueInfoProto(name=names[id(value)]))
    imports = [onnx.helper.make_opsetid(d, v) for d, v in opset_imports.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = Session(ir.from_proto(model), Reference.AS_WRITTEN)
    results = session.run(feeds)
    return [results[names[id(value)]] for value in wanted]
