"""Runs one simplifier on one model, in a process of its own, for `peers.py`.

    python run_peer.py versions
    python run_peer.py NAME SOURCE TARGET

It needs nothing but the peers themselves, so any interpreter that has them will do. Where the
source has external data, so has the target.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("onnxsim", "onnxslim", "onnxscript", "onnxruntime")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def onnxsim(source: Path, target: Path, external: bool) -> None:
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    _save(model, target, external)


def onnxslim(source: Path, target: Path, external: bool) -> None:
    import onnx
    import onnxslim

    _save(onnxslim.slim(onnx.load(source)), target, external)


def onnxscript(source: Path, target: Path, external: bool) -> None:
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.load(source)
    optimized = onnxscript.optimizer.optimize(model)
    data = f"{target.name}.data" if external else None
    onnx_ir.save(optimized if optimized is not None else model, target, external_data=data)


def onnxruntime(source: Path, target: Path, external: bool) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    if external:
        prefix = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{prefix}file_name", f"{target.name}.data")
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _save(model: object, target: Path, external: bool) -> None:
    import onnx

    data = f"{target.name}.data" if external else None
    onnx.save(model, target, save_as_external_data=external, location=data)


def _has_external_data(source: Path) -> bool:
    import onnx

    model = onnx.load(source, load_external_data=False)
    return any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def main() -> None:
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
        return
    name, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    run = {f.__name__: f for f in (onnxsim, onnxslim, onnxscript, onnxruntime)}[name]
    run(source, target, _has_external_data(source))


if __name__ == "__main__":
    main()
