"""fuse-transformers: what onnxruntime.transformers makes of a transformer, in its own operators."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import onnx
import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.loading import PROTO_LIMIT_BYTES
from graphopt.operators import ONNX_DOMAINS, all_graphs, is_onnx, subgraphs
from graphopt.rewriting import why_too_old
from graphopt.serializing import stubbed
from graphopt.skeleton import INFERRED, from_proto, known_shape

DOMAIN = "com.microsoft"
FIRST_OPSET = 17
"""Fusions write LayerNormalization, which the standard has from here on."""

Fusions = Callable[[onnx.ModelProto], onnx.ModelProto]

ModelType = Literal[
    "bart", "bert", "clip", "conformer", "gpt2", "gpt_neox", "mmdit", "phi", "qwen3", "sam2",
    "swin", "t5", "tnlr", "unet", "vae", "vit",
]  # fmt: skip

DETECTS_HEADS = frozenset({"bert", "clip", "mmdit", "sam2", "swin", "t5", "unet", "vae", "vit"})
"""Model types whose fusions read the number of heads at each place; others must be told it."""

CUDA_ONLY = (
    "bias_add",
    "bias_splitgelu",
    "group_norm",
    "nhwc_conv",
    "packed_kv",
    "packed_qkv",
    "skip_group_norm",
)
"""Fusions into operators that onnxruntime has no kernel of on the CPU."""

_INNER = "/graphopt-inner"
"""Ends the names of the values that stand for outputs while the fusions work."""

UNSOUND = ("fuse_constant_fold", "fuse_simplified_layer_norm")
"""Steps that are left out.

The first drops pairs of Transposes that do not undo each other. The second writes
SimplifiedLayerNormalization into ONNX's own domain, where there is no such operator.
"""

_LOCK = threading.Lock()
"""Held while the library is muted, which is made for a command line."""


@dataclass(frozen=True)
class FuseTransformers(Pass):
    """Fuse attention, residual normalizations and Gelus into onnxruntime's own operators.

    The fusions are those of `onnxruntime.transformers`, so the result runs on onnxruntime only.
    They go by the shape of the graph: that a mask holds 0 and 1, and that scores are divided by
    the root of the head size, they take for granted. Where that is wrong the outputs differ and
    the gate rejects it; the pass then leaves attention alone and tries the rest. Without validation
    nothing notices. Approximations (Gelu as FastGelu) and masks that count on padding on the right
    are off.

    Attributes:
        model_type: whose attention to look for: `bert` for encoders, `gpt2` for decoders, and so
            on.
        num_heads: heads of the attention; 0 reads it from the graph.
        hidden_size: heads times their size; 0 reads it from the graph.
        attention: fuse attention too.
    """

    name: ClassVar[str] = "fuse-transformers"
    effect: ClassVar[Effect] = Effect.ROUNDING

    model_type: ModelType = "bert"
    num_heads: Annotated[int, Bounds(0, None)] = 0
    hidden_size: Annotated[int, Bounds(0, None)] = 0
    attention: bool = True

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Where the fusions would read the graph wrongly."""
        if self.num_heads and self.hidden_size % self.num_heads:
            return f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
        if "onnxruntime_tools" in sys.modules:
            return (
                "onnxruntime_tools is loaded, which breaks onnxruntime.transformers; uninstall it"
            )
        if model.functions:
            return "the model has functions; run inline-functions before"
        if any(subgraphs(node) for graph in all_graphs(model) for node in graph):
            return "onnxruntime.transformers mixes up the names of bodies and the main graph"
        if any(value.is_initializer() for value in model.graph.inputs):
            return "a caller may override weights, which the fusions would take for constants"
        if _weight_bytes(model) > PROTO_LIMIT_BYTES // 2:
            return "over 1 GiB of weights: the fusions take the model as one proto, and copy it"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse on a proto, and take its graph over with the old weights where they are the same."""
        change = Change()
        heads, hidden_size = self._sizes(model)
        attention = self.attention and (heads > 0 or self.model_type in DETECTS_HEADS)
        if self.attention and not attention:
            change.skip("the model", "the number of heads was not found; state num_heads")
        proto, tensors = stubbed(model)
        _fill_in(proto, tensors)
        with _muted() as messages:
            fuse = self._fusions(heads, hidden_size, attention, context.provider)
            if fuse is None:
                change.skip("the model", f"this onnxruntime knows no model type {self.model_type}")
                return change
            try:
                fused = _until_nothing_changes(fuse, proto)
            except Exception as error:  # it stumbles over graphs that it was not made for
                what = f"{type(error).__name__}: {error}"
                change.skip("the model", f"onnxruntime.transformers raised {what}")
                return change
        for message in dict.fromkeys(messages):
            change.skip("the model", f"onnxruntime.transformers says: {message}")
        grown = _fused_operators(fused.graph) - _fused_operators(proto.graph)
        if grown:
            _adopt(model, fused, tensors, context)
        for operator, count in sorted(grown.items()):
            change.count(f"{operator} fused", count)
        if attention:
            for node in _attention_softmaxes(model.graph):
                change.skip(node, f"not an attention that the fusions of {self.model_type} know")
        return change

    def narrow(self) -> Pass | None:
        """Without attention, whose fusions take most for granted."""
        return replace(self, attention=False) if self.attention else None

    def _sizes(self, model: ir.Model) -> tuple[int, int]:
        """Number of heads and hidden size as stated, else as found; 0 where neither."""
        heads, hidden_size = self.num_heads, self.hidden_size
        found = _heads_in(model)
        if not heads and found is not None:
            heads = found[0]
        if heads and not hidden_size and found is not None:
            hidden_size = heads * found[1]
        return (heads, hidden_size) if heads else (0, 0)

    def _fusions(
        self, heads: int, hidden_size: int, attention: bool, provider: str
    ) -> Fusions | None:
        """The fusions of the model type; None where this onnxruntime does not have them."""
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import AttentionMaskFormat

        if self.model_type not in optimizer.MODEL_TYPES:
            return None
        options = optimizer.FusionOptions(self.model_type)
        options.enable_attention = attention
        options.enable_gelu_approximation = options.enable_gemm_fast_gelu = False
        if options.attention_mask_format == AttentionMaskFormat.MaskIndexEnd:
            options.use_raw_attention_mask()
        for fusion in CUDA_ONLY if provider == "cpu" else ():
            setattr(options, f"enable_{fusion}", False)
        optimizer_class = optimizer.MODEL_TYPES[self.model_type][0]

        def fuse(proto: onnx.ModelProto) -> onnx.ModelProto:
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            work = optimizer_class(copy, heads, hidden_size)
            for fusion in UNSOUND:
                setattr(work, fusion, lambda: None)
            _read_outputs(copy.graph)
            # Unread nodes are in the way of fusions, and trip some.
            work.prune_graph()
            work.optimize(options)
            work.topological_sort()
            fused: onnx.ModelProto = work.model
            _no_longer_read_outputs(fused.graph)
            # Inputs that nothing reads any more were removed.
            for kind in ("input", "output"):
                fused.graph.ClearField(kind)
                getattr(fused.graph, kind).extend(getattr(proto.graph, kind))
            return fused

        return fuse


def _read_outputs(graph: onnx.GraphProto) -> None:
    """Put an Identity before each output: fusions look for readers, and forget outputs."""
    inner = {output.name: f"{output.name}{_INNER}" for output in graph.output}
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) if name in made else name for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    for name, hidden in inner.items():
        if name in made:
            graph.node.append(onnx.helper.make_node("Identity", [hidden], [name], hidden))


def _no_longer_read_outputs(graph: onnx.GraphProto) -> None:
    """Undo `_read_outputs`, where a node makes the value for that output alone."""
    outputs = {output.name for output in graph.output}
    made = {name for node in graph.node for name in node.output} - outputs
    final = {}
    for node in list(graph.node):
        if node.name.endswith(_INNER) and node.input[0] in made and node.input[0] not in final:
            final[node.input[0]] = node.output[0]
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]


def _until_nothing_changes(fuse: Fusions, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The fusions again and again: what one leaves unread may be in the way of another."""
    while True:
        fused = fuse(proto)
        grown = _fused_operators(fused.graph) - _fused_operators(proto.graph)
        if not grown or len(fused.graph.node) >= len(proto.graph.node):
            return proto
        proto = fused


def _weight_bytes(model: ir.Model) -> int:
    tensors = [v.const_value for v in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None)


def _heads_in(model: ir.Model) -> tuple[int, int] | None:
    """Number and size of the heads, where all that is split into heads agrees.

    Exporters write that as a Reshape to [batch, sequence, heads, size] and a Transpose.
    """
    found = set()
    for node in model.graph:
        if not is_onnx(node, "Transpose"):
            continue
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        perm = tuple(node.attributes.get_ints("perm", ()))
        if (
            maker is None
            or not is_onnx(maker, "Reshape")
            or perm not in ((0, 2, 1, 3), (0, 2, 3, 1))
        ):
            continue
        shape = known_shape(value)
        if shape is not None and isinstance(shape[2], int) and isinstance(shape[3], int):
            found.add((shape[2], shape[3]))
    return found.pop() if len(found) == 1 else None


def _attention_softmaxes(graph: ir.Graph) -> list[ir.Node]:
    """The Softmax nodes that weigh what a MatMul sums up."""
    return [
        node
        for node in graph
        if is_onnx(node, "Softmax")
        and any(u.node.op_type == "MatMul" for u in node.outputs[0].uses())
    ]


def _fused_operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(
        node.op_type
        for node in graph.node
        if node.domain == DOMAIN or node.op_type == "LayerNormalization"
    )


def _fill_in(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol]) -> None:
    for stub in proto.graph.initializer:
        if stub.name in tensors:
            stub.ClearField("external_data")
            stub.ClearField("data_location")
            stub.raw_data = tensors[stub.name].tobytes()


def _adopt(
    model: ir.Model,
    fused: onnx.ModelProto,
    tensors: dict[str, ir.TensorProtocol],
    context: Context,
) -> None:
    """Make the fused graph the model's; a large weight that did not change keeps its tensor."""
    old = model.graph
    stated = {o.name for node in old for o in node.outputs if INFERRED not in o.meta}
    stated |= {
        o for node in fused.graph.node if node.domain not in ONNX_DOMAINS for o in node.output
    }
    infos = [info for info in fused.graph.value_info if info.name in stated]
    del fused.graph.value_info[:]
    fused.graph.value_info.extend(infos)
    unchanged = {
        weight.name
        for weight in fused.graph.initializer
        if weight.name in tensors and weight.raw_data == tensors[weight.name].tobytes()
    }
    new = from_proto(fused).graph
    for name, value in new.initializers.items():
        assert value.const_value is not None
        if name in unchanged:
            value.const_value = tensors[name]
        elif name not in old.initializers:
            made = value.const_value
            value.const_value = context.tensor(made.numpy(), name, made.dtype)
    new.meta.update(old.meta)
    new.opset_imports.setdefault(DOMAIN, 1)
    model.graph = new


# ------------------------------------------------------------------ a library made to be a script


class _Messages(logging.Handler):
    """Keeps the warnings of this thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _print_nothing(*_: object, **__: object) -> None:
    """In the place of print."""


@contextlib.contextmanager
def _muted() -> Iterator[list[str]]:
    """onnxruntime.transformers prints and logs nothing; gives what it would have warned of.

    Its modules get a `print` of their own: to replace stdout would mute other threads too.
    """
    import onnxruntime.transformers.optimizer
    import onnxruntime.transformers.shape_infer_helper

    folder = Path(onnxruntime.transformers.__file__).parent
    places = {folder, folder.parent / "tools"}
    modules = [m for m in list(sys.modules.values()) if _folder_of(m) in places]
    loggers = [logging.getLogger(module.__name__) for module in modules]
    handler = _Messages()
    with _LOCK:
        before = [logger.propagate for logger in loggers]
        for module, logger in zip(modules, loggers, strict=True):
            vars(module)["print"] = _print_nothing
            logger.propagate = False
            logger.addHandler(handler)
        try:
            yield handler.texts
        finally:
            for module, logger, propagate in zip(modules, loggers, before, strict=True):
                del vars(module)["print"]
                logger.propagate = propagate
                logger.removeHandler(handler)


def _folder_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).parent if file else None
