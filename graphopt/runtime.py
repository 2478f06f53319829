"""The only door to onnxruntime: sessions, evaluation of constants, providers.

A model is run under one of two references. As written: graph optimizations off, one thread, so
that what runs is what the file says. As deployed: onnxruntime's defaults. The two differ, because
onnxruntime changes numerics itself.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.errors import ModelError, RuntimeUnavailable, SampleError
from graphopt.rewriting import constant_tensor
from graphopt.serializing import nothing, stubbed, write_node

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_AS_WRITTEN = {"cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}}
"""Options of providers that by default round the factors of float32 products to 10 bits, and take
for each convolution the algorithm that the clock preferred: a model would not equal itself."""

OPTIMIZED = "optimized.onnx"
"""In the folder of a trace: the graph as onnxruntime runs it."""

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

"""Element types of which onnxruntime takes numpy's memory as it is."""

_NARROW_DTYPES = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    }
)
"""Element types that numpy knows through ml_dtypes only; onnxruntime does not exchange them."""


_FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}

INTERCHANGED_DTYPES = frozenset({*_FLOAT_DTYPES.values(), np.dtype(ml_dtypes.bfloat16)})
"""Element types of which a pass may put one for another in the interface, where a user asks."""


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


@dataclass(frozen=True)
class Formal:
    """What a schema says of an input or output of an operator.

    Attributes:
        variable: inputs and outputs of the same variable are of the same type.
        types: those that it may have, as "tensor(float)".
    """

    variable: str
    types: frozenset[str]


Formals = tuple[tuple[Formal, ...], tuple[Formal, ...]]
"""Of the inputs and of the outputs; the last stands for all after it."""


def formals_of(domain: str, op_type: str, opset: int | None = None) -> Formals | None:
    """What onnxruntime's own schema says of an operator.

    None where onnxruntime is not installed or has no such operator.

    Args:
        domain: of the operator.
        op_type: of the operator.
        opset: of the domain; None takes the newest.
    """
    versions = _formals().get((domain, op_type), {})
    known = [version for version in versions if opset is None or version <= opset]
    return versions[max(known)] if known else None


@cache
def _formals() -> dict[tuple[str, str], dict[int, Formals]]:
    """By domain and operator, then by the opset from which on they hold."""
    try:
        state = _onnxruntime().capi.onnxruntime_pybind11_state
    except RuntimeUnavailable:
        return {}
    found: dict[tuple[str, str], dict[int, Formals]] = {}
    for schema in getattr(state, "get_all_operator_schema", list)():
        kinds = {t.type_param_str: frozenset(t.allowed_type_strs) for t in schema.type_constraints}
        inputs, outputs = (
            tuple(Formal(f.typeStr, kinds.get(f.typeStr, frozenset({f.typeStr}))) for f in side)
            for side in (schema.inputs, schema.outputs)
        )
        versions = found.setdefault((schema.domain, schema.name), {})
        versions[int(schema.since_version)] = inputs, outputs
    return found


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
        model: an `ir.Model`, or the path of a file. Large weights of the former are handed over
            as arrays and never serialized; as written, they are not copied either.
        reference: as written or as deployed.
        provider: "cpu" or "cuda".
        threads: intra-op threads; None leaves onnxruntime's default (as written always has one).
        shapes_first: run each Shape node as soon as it can be, so that what it looks at does not
            stay in memory for it.
        trace: folder to which onnxruntime writes the graph that it really runs (`OPTIMIZED`, with
            its weights beside it) and, at `end_trace`, what each node took.

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
        shapes_first: bool = False,
        trace: Path | None = None,
    ) -> None:
        check_provider(provider)
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        chosen: Mapping[str, str] = {}
        if reference is Reference.AS_WRITTEN:
            chosen = _AS_WRITTEN.get(provider, {})
            options.use_deterministic_compute = True
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = 1
        elif threads is not None:
            options.intra_op_num_threads = threads
        # Without it the threads of a session spin on after a run, and slow down the next session.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if shapes_first:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if trace is not None:
            _write_trace(options, trace)
        self.provider = provider
        self._kept: list[Any] = []
        source: str | bytes
        if isinstance(model, ir.Model):
            source = self._share_weights(model, reference, options)
        else:
            source = str(model)
        try:
            self.inner = ort.InferenceSession(
                source, options, providers=[(PROVIDERS[provider], chosen)]
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise ModelError(_reason(error)) from error
        if PROVIDERS[provider] not in self.inner.get_providers():
            raise RuntimeUnavailable(
                f"provider {provider!r} does not start here (onnxruntime fell back to the CPU); "
                "check the driver and the CUDA and cuDNN libraries"
            )
        expected = {i.name: _numpy_dtype(i.type) for i in self.inner.get_inputs()}
        self._input_dtypes = {name: dtype for name, dtype in expected.items() if dtype is not None}
        self._narrow_outputs = any(_narrow_dtype(o.type) for o in self.inner.get_outputs())
        self.inputs: list[str] = [i.name for i in self.inner.get_inputs()]
        self.outputs: list[str] = [o.name for o in self.inner.get_outputs()]

    def _share_weights(self, model: ir.Model, reference: Reference, options: Any) -> bytes:
        """The graph as bytes; the large weights are handed over beside it."""
        proto, tensors = stubbed(model)
        names, values = [], []
        for stub in proto.graph.initializer:
            if stub.name not in tensors:
                continue
            tensor = tensors[stub.name]
            # onnxruntime drops what nothing reads before it looks for the weights it was given.
            value = model.graph.initializers[stub.name]
            is_read = bool(value.uses()) or value.is_graph_output()
            if not is_read or tensor.dtype not in _SHARED_DTYPES:
                stub.ClearField("external_data")
                stub.ClearField("data_location")
                stub.raw_data = tensor.tobytes()
                continue
            array = np.ascontiguousarray(tensor.numpy())
            names.append(stub.name)
            values.append(_onnxruntime().OrtValue.ortvalue_from_numpy(array))
            if reference is Reference.AS_WRITTEN:
                # Kernels then read the weight where it lies. Optimizations might replace it by
                # another one of the same name, which this would undo.
                options.add_initializer(stub.name, values[-1])
            self._kept += [array, values[-1]]
        options.add_external_initializers(names, values)
        return bytes(proto.SerializeToString())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; a sequence or map becomes one entry per element, `name[key]`.

        Args:
            feeds: an array for each input. Bytes without a type (numpy's void, as which an .npy
                file gives back bfloat16 and the like) are taken to be of the input's type, and
                float32 for float16 or bfloat16, or the reverse, is cast: samples fit the model as
                it was given, and a pass may have been told to convert inputs.

        Raises:
            SampleError: onnxruntime cannot run the model on these inputs.
        """
        try:
            results = self._run(self._typed(feeds))
        except Exception as error:  # as above
            raise SampleError(_reason(error)) from error
        named = zip(self.outputs, results, strict=True)
        return {key: array for name, result in named for key, array in _arrays(name, result)}

    def _run(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        if self._exchanges_numpy(feeds):
            results: list[Any] = self.inner.run(None, _with_text(feeds))
            return results
        values = self.inner.run_with_ort_values(None, _ort_values(feeds, "cpu"))
        return [_from_ort_value(value) for value in values]

    def _typed(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: _as_dtype(a, self._input_dtypes.get(name)) for name, a in feeds.items()}

    def _exchanges_numpy(self, feeds: Mapping[str, np.ndarray]) -> bool:
        return not self._narrow_outputs and not any(_is_narrow(array) for array in feeds.values())

    def bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """A function that runs the model on these inputs, for timing.

        On CUDA the inputs are copied to the device here and the outputs stay there, so that the
        function times the model and not the bus; it returns when the device is done. On the CPU it
        is a plain run. Call it once before timing: it raises what onnxruntime raises.

        Args:
            feeds: as for `run`.
        """
        feeds = self._typed(feeds)
        if self.provider == "cuda":
            return self._bind_to_device(feeds)
        if self._exchanges_numpy(feeds):
            run, arguments = self.inner.run, _with_text(feeds)
        else:
            run, arguments = self.inner.run_with_ort_values, _ort_values(feeds, "cpu")

        def run_here() -> None:
            run(None, arguments)

        return run_here

    def end_trace(self) -> Path:
        """The profile of all runs so far, as JSON; nothing more is recorded."""
        return Path(self.inner.end_profiling())

    def _bind_to_device(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        binding = self.inner.io_binding()
        text = {name: a for name, a in _with_text(feeds).items() if a.dtype.kind in "OU"}
        for name, array in text.items():
            binding.bind_cpu_input(name, array)
        numbers = {name: array for name, array in feeds.items() if name not in text}
        for name, value in _ort_values(numbers, "cuda").items():
            binding.bind_ortvalue_input(name, value)
        for output in self.inner.get_outputs():
            on_device = output.type.startswith("tensor(") and output.type != "tensor(string)"
            binding.bind_output(output.name, "cuda" if on_device else "cpu")

        def run_there() -> None:
            self.inner.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run_there


def _write_trace(options: Any, folder: Path) -> None:
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / OPTIMIZED)
    # Without it, a graph with its weights in one file is limited to 2 GB.
    key = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{key}file_name", "weights")
    options.add_session_config_entry(f"{key}min_size_in_bytes", "1024")


def _narrow_dtype(ort_type: str) -> ir.DataType | None:
    """The element type of a tensor that numpy does not know, from onnxruntime's `tensor(x)`."""
    word = ort_type.removeprefix("tensor(").removesuffix(")").upper()
    dtype = ir.DataType[word] if word in ir.DataType.__members__ else None
    return dtype if dtype in _NARROW_DTYPES else None


def _numpy_dtype(ort_type: str) -> np.dtype[Any] | None:
    """The element type of a tensor, where arrays may come in another; from `tensor(x)`."""
    narrow = _narrow_dtype(ort_type)
    if narrow is None:
        return _FLOAT_DTYPES.get(ort_type)
    dtype: np.dtype[Any] = narrow.numpy()
    return dtype


def _as_dtype(array: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    if dtype is None or not isinstance(array, np.ndarray) or array.dtype == dtype:
        return array
    if array.dtype.type is np.void:
        return array.view(dtype)
    both = {array.dtype, dtype}
    return array.astype(dtype) if both <= INTERCHANGED_DTYPES else array


def _is_narrow(array: np.ndarray) -> bool:
    if not isinstance(array, np.ndarray) or array.dtype.kind in "OSU":
        return False
    return ir.DataType.from_numpy(array.dtype) in _NARROW_DTYPES


def _with_text(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays, with bytes decoded: onnxruntime would take the `repr` of them for the text."""
    return {name: _decoded(array) for name, array in feeds.items()}


def _decoded(array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "OS":
        return array
    text = [x.decode() if isinstance(x, bytes) else x for x in array.reshape(-1).tolist()]
    decoded = np.empty(len(text), object)
    decoded[:] = text
    return decoded.reshape(array.shape)


def _ort_values(feeds: Mapping[str, np.ndarray], device: str) -> dict[str, Any]:
    make = _onnxruntime().OrtValue
    values = {}
    for name, array in feeds.items():
        if _is_narrow(array):
            raw = np.require(array, requirements="C").view(f"u{array.dtype.itemsize}")
            dtype = ir.DataType.from_numpy(array.dtype)
            values[name] = make.ortvalue_from_numpy_with_onnx_type(raw, dtype.value)
        else:
            plain = np.require(array, requirements="C")
            values[name] = make.ortvalue_from_numpy(plain, device, 0)
    return values


def _from_ort_value(value: Any) -> np.ndarray | None:
    if not value.has_value():
        return None
    dtype = _narrow_dtype(value.data_type())
    if dtype is None:
        return np.asarray(value.numpy())
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    proto = onnx.TensorProto(data_type=dtype.value, dims=value.shape(), raw_data=raw)
    return ir.TensorProtoTensor(proto).numpy()


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
    """The message of onnxruntime without its error code and source location."""
    text = str(error).replace("\n", " ").strip()
    marker = text.find(" : ", text.find("[ONNXRuntimeError]"))
    parts = text.split(" : ", 3)
    return parts[3] if marker >= 0 and len(parts) == 4 else text


def _inline_proto(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    dims, raw = tensor.shape.numpy(), tensor.tobytes()
    return onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=dims, raw_data=raw)


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
        tensor = constant_tensor(value)
        assert tensor is not None, f"{value.name} is not a constant"
        if tensor.dtype in _NARROW_DTYPES:
            graph.initializer.append(_inline_proto(tensor, names[key]))
            continue
        dims = tensor.shape.numpy()
        info = onnx.helper.make_tensor_value_info(names[key], tensor.dtype.value, dims)
        graph.input.append(info)
        feeds[names[key]] = read_array(tensor)
    for node in nodes:
        proto = graph.node.add()
        write_node(proto, node, 10, nothing)
        proto.input[:] = [names[id(v)] if v is not None else "" for v in node.inputs]
        proto.output[:] = [names[id(v)] if v.name else "" for v in node.outputs]
    for value in wanted:
        graph.output.append(onnx.ValueInfoProto(name=names[id(value)]))
    imports = [onnx.helper.make_opsetid(d, v) for d, v in opset_imports.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = Session(ir.from_proto(model), Reference.AS_WRITTEN)
    results = session.run(feeds)
    for value in wanted:
        if names[id(value)] not in results:
            raise ModelError(f"{value.name} is no tensor")
    return [results[names[id(value)]] for value in wanted]
