"""Runs one tool that gives up accuracy for bytes or time on one model, for `tune_peers.py`.

    python run_tuner.py versions
    python run_tuner.py TOOL MODEL SAMPLES TARGET [--max-drop X] [--metric M] [--labels FILE]
                        [--minutes N] [--transformer] [--simplified]

TOOL is tune-size, tune-latency, tune-memory, onnxruntime or nncf. The interpreter needs graphopt,
which reads the samples and has the metric, and the tool itself. The last line on stderr says what
the tool tells of its result.

onnxruntime calibrates its static int8 by all samples. NNCF parts them as `graphopt.tune` does: it
calibrates by what that fits by, and validates by the rest, with the same metric. Both are given the
model as they can take it: opset 17 at least, and no initializers among the inputs. For models on
which they raise even so, --simplified first makes of it what onnxruntime's basic level does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from graphopt.recording import Feed
    from graphopt.scores import Judge
    from graphopt.subject import Subject

PACKAGES = ("graphopt", "onnxruntime", "nncf")
OPSET_MINIMUM, IR_MINIMUM = 17, 8
ONE_LESS_CONFIDENCE = 0.05
"""As `graphopt.tune` has it by default: the parting of the samples depends on it."""

NNCF_CALIBRATION_MAXIMUM = 300
"""NNCF's own default."""

Item = tuple[int, "dict[str, np.ndarray]"]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def opened(arguments: argparse.Namespace) -> tuple[Subject, Feed]:
    from graphopt.subject import open_subject

    subject = open_subject(arguments.model, "cpu", True, True, lambda _: None)
    return subject, subject.feed(arguments.samples, None, ())


def prepared(arguments: argparse.Namespace) -> onnx.ModelProto:
    """The model at an opset that has scales by channel, its initializers no inputs."""
    import onnx
    from onnx.version_converter import convert_version

    model = onnx.load(arguments.model)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, IR_MINIMUM)
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if opset < OPSET_MINIMUM:
        model = convert_version(model, OPSET_MINIMUM)
    return simplified(model) if arguments.simplified else model


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxruntime's basic level leaves it: standard operators, constants folded."""
    import onnx

    result = model
    # The first time it writes functions (CastLike) out as nodes; the second folds these, too.
    for _ in range(2):
        result = simplified_once(result)
    # It imports all domains that it knows; NNCF takes the first for ONNX's.
    used = {node.domain for node in result.graph.node} - {""}
    imports = {one.domain: one.version for one in result.opset_import}
    del result.opset_import[:]
    result.opset_import.extend(onnx.helper.make_opsetid(d, imports[d]) for d in ("", *sorted(used)))
    return result


def simplified_once(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="simplified-") as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        onnx.save(model, source)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


# ------------------------------------------------------------------ graphopt


def tune(objective: str) -> Callable[[argparse.Namespace], str]:
    def run(arguments: argparse.Namespace) -> str:
        from graphopt.tune import tune

        with tempfile.TemporaryDirectory(prefix="tune-") as cache:
            found = tune(
                arguments.model,
                samples=arguments.samples,
                max_drop=arguments.max_drop,
                metric=arguments.metric,
                labels=arguments.labels,
                objective=objective,
                budget_minutes=arguments.minutes,
                cache=cache,
            ).save(arguments.target)
        proof = found.certificate
        taken = next((point.name for point in found.points if point.chosen), "nothing")
        return (
            f"{taken}; {proof.original:.2f} -> {proof.value:.2f} on {proof.items} samples kept "
            f"back, {found.evaluations} evaluations"
        )

    return run


# ------------------------------------------------------------------ onnxruntime


class Reader:
    """Samples one by one, as onnxruntime's calibration asks for them."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def onnxruntime(arguments: argparse.Namespace) -> str:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(Reader)
    _, feed = opened(arguments)
    model = prepared(arguments)
    with tempfile.TemporaryDirectory(prefix="onnxruntime-") as folder:
        raised, processed = Path(folder) / "raised.onnx", Path(folder) / "processed.onnx"
        onnx.save(model, raised)
        quant_pre_process(str(raised), str(processed), skip_symbolic_shape=arguments.simplified)
        quantize_static(
            str(processed),
            str(arguments.target),
            Reader(feeds_of(feed, model)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    return f"calibrated by {len(feed.samples)} samples"


def feeds_of(feed: Feed, model: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
    from graphopt.signature import complete

    names = {one.name for one in model.graph.input}
    for sample in feed.samples:
        whole = complete(sample, feed.inputs)
        yield {name: array for name, array in whole.items() if name in names}


# ------------------------------------------------------------------ NNCF


class Items(Sequence[Item]):
    """Samples with their numbers, each read when it is asked for."""

    def __init__(self, feed: Feed, model: onnx.ModelProto) -> None:
        self.feed = feed
        self.names = {one.name for one in model.graph.input}

    def __len__(self) -> int:
        return len(self.feed.samples)

    def __getitem__(self, index: Any) -> Any:
        from graphopt.signature import complete

        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = complete(self.feed.samples.loaders[index](), self.feed.inputs)
        return index, {name: array for name, array in sample.items() if name in self.names}


@dataclass
class Validator:
    """The metric as NNCF calls it: by the samples that it chooses.

    Attributes:
        judges: one for each sample to validate by.
        evaluations: how often a model was run on some of them.
    """

    judges: Sequence[Judge]
    evaluations: int = 0

    def __call__(
        self, model: onnx.ModelProto, items: Iterable[Item]
    ) -> tuple[float, list[float] | None]:
        import onnx

        from graphopt.runtime import Session

        self.evaluations += 1
        with tempfile.TemporaryDirectory(prefix="nncf-") as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path)
            session = Session(path)
            values = [self.judges[index](session).value for index, _ in items]
        return sum(values) / len(values), values


def nncf(arguments: argparse.Namespace) -> str:
    os.environ.setdefault("NNCF_CI", "1")  # otherwise it sends out how it is used
    import nncf
    import onnx

    calibration, validated, validator = divided(arguments)
    model = prepared(arguments)
    items = Items(validated, model)
    result = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf.Dataset(Items(calibration, model), lambda item: item[1]),
        validation_dataset=nncf.Dataset(items, lambda item: item[1]),
        validation_fn=validator,
        max_drop=arguments.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=min(NNCF_CALIBRATION_MAXIMUM, len(calibration.samples)),
        model_type=nncf.ModelType.TRANSFORMER if arguments.transformer else None,
    )
    onnx.save(result, arguments.target)
    count = validator.evaluations
    before, after = validator(model, items)[0], validator(result, items)[0]
    return (
        f"{before:.2f} -> {after:.2f} on the {len(items)} samples that it validated by, "
        f"{count} evaluations"
    )


def divided(arguments: argparse.Namespace) -> tuple[Feed, Feed, Validator]:
    """What to calibrate by, what to validate by, and the metric on each sample of the latter."""
    from graphopt.metric import parse_metric
    from graphopt.parting import items_to_prove, part
    from graphopt.recording import Feed
    from graphopt.runtime import Session
    from graphopt.verifying import range_of_drops

    subject, feed = opened(arguments)
    session = Session(subject.given)
    metric = parse_metric(arguments.metric, arguments.samples, arguments.labels)
    (whole,) = metric.judges(subject.source.model, session, feed, [feed])
    bounds = range_of_drops(whole(session))
    parts = part(feed, items_to_prove(arguments.max_drop, ONE_LESS_CONFIDENCE, *bounds))
    calibration, validated = parts.fitted, feed
    if not parts.shared:
        known = set(calibration.samples.digests)
        others = [i for i, one in enumerate(feed.samples.digests) if one not in known]
        validated = Feed(feed.samples.select(others), feed.inputs)
    each = [
        Feed(validated.samples.select([index]), feed.inputs)
        for index in range(len(validated.samples))
    ]
    # What a metric takes from the original it takes from the first part.
    _, *judges = metric.judges(subject.source.model, session, feed, [validated, *each])
    return calibration, validated, Validator(judges)


TOOLS: dict[str, Callable[[argparse.Namespace], str]] = {
    "tune-size": tune("size"),
    "tune-latency": tune("latency"),
    "tune-memory": tune("memory"),
    "onnxruntime": onnxruntime,
    "nncf": nncf,
}


def main() -> None:
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--metric")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of a search by graphopt")
    parser.add_argument("--transformer", action="store_true", help="NNCF is to take it as one")
    parser.add_argument("--simplified", action="store_true", help="by onnxruntime, and first")
    arguments = parser.parse_args()
    print(TOOLS[arguments.tool](arguments), file=sys.stderr)


if __name__ == "__main__":
    main()
