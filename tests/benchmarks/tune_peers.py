"""The table of what `graphopt tune` makes of models, beside fixed recipes and other tools.

    python tests/benchmarks/tune_peers.py --model MODEL SAMPLES [LABELS] [--model ...] [OPTIONS]
    python tests/benchmarks/tune_peers.py --list FILE.json [OPTIONS]

FILE.json is a list of objects with `model`, `samples` and, if need be, `name`, `labels`, `metric`,
`max_drop`, `evaluation` and `transformer` (NNCF is told so); paths are relative to its folder. A
model is named by its file, or by its folder where the file is called model.onnx.

The tools: `tune` for size and for latency; each lossy recipe; onnxruntime's static int8 (QDQ, by
channel, uint8 activations, int8 weights, min-max); NNCF's accuracy control; and, where --tools asks
for them, `tune` for memory and the recipe basic. Each runs in a process of its
own on a copy of the model, the last two in the interpreter --peers-python, which needs graphopt too
(`pip install -e .[cpu] nncf`, or the extra `peers`). One that raises on the model as it is gets it
a second time as onnxruntime's basic level leaves it, and the remark says so. Recipes and
onnxruntime are given all samples; tune and NNCF part them alike, and are both held to the drop.

Size and latency are ratios to the original, the latter interleaved, at one thread. The drop is that
of the metric (accuracy where there is a labels.json, else agreement) on the samples in the folder
`evaluation` of the list, or NAME in that of --evaluation, which no tool sees, with its paired
standard error. --evaluate gives a command of the user's, for example `python score.py {name}
{model}`: the last line of its output stands in the table, of a JSON object the first number.

The table goes to stdout, and to --json with all that was measured, after each model.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from basic import Subject
from peers import chosen_samples, copy_model, line, run_measured, table

from graphopt.benchmark import benchmark, cpu_name
from graphopt.certificate import paired_standard_error
from graphopt.errors import GraphoptError, SpecError, did_you_mean
from graphopt.loading import open_model
from graphopt.metric import parse_metric
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores
from graphopt.subject import open_subject

SCHEMA_VERSION = 1
RECIPES = ("basic", "int8", "int8-codebook", "small", "int4", "fp16")
SEARCHES = ("tune-size", "tune-latency", "tune-memory")
PEERS = ("onnxruntime", "nncf")
TOOLS = (*SEARCHES, *RECIPES, *PEERS)
WHERE_ASKED_FOR = ("tune-memory", "basic")
COMPARED = tuple(tool for tool in TOOLS if tool not in WHERE_ASKED_FOR)
RUN_TUNER = Path(__file__).with_name("run_tuner.py")
ORIGINAL = "original"
HEAD = ("model", "tool", "size", "latency", "drop", "evaluated", "seconds", "loads", "remark")
REMARK_MAXIMUM = 160


@dataclass(frozen=True)
class Entry:
    """A model to compare on.

    Attributes:
        name: in the table.
        model: path of the file.
        samples: folder or file of the inputs that tools are given.
        labels: of them; by default labels.json in their folder.
        metric: as `graphopt.metric.parse_metric` takes it.
        max_drop: of the metric, in its unit; None takes that of the command line.
        evaluation: folder of samples that no tool sees.
        transformer: NNCF is told that the model is one.
    """

    name: str
    model: Path
    samples: Path
    labels: Path | None = None
    metric: str | None = None
    max_drop: float | None = None
    evaluation: Path | None = None
    transformer: bool = False


@dataclass(frozen=True)
class Row:
    """What a tool made of a model.

    Attributes:
        tool: its name.
        seconds: that it took, from the start of its process to the end.
        peak_bytes: of memory.
        fault: why there is nothing to measure, or None.
        remark: what the tool told of it.
        stored_bytes: of the result.
        size_ratio: to the original.
        latency_ratio: to the original.
        p50_ms: median latency.
        value: of the metric on samples that no tool saw.
        drop: from that of the original.
        error: paired standard error of the drop.
        evaluated: what the command of the user's gave.
    """

    tool: str
    seconds: float | None = None
    peak_bytes: int | None = None
    fault: str | None = None
    remark: str = ""
    stored_bytes: int | None = None
    size_ratio: float | None = None
    latency_ratio: float | None = None
    p50_ms: float | None = None
    value: float | None = None
    drop: float | None = None
    error: float | None = None
    evaluated: str | None = None


# ------------------------------------------------------------------ what to compare on


def named(model: Path) -> str:
    return model.parent.name if model.name == "model.onnx" else model.stem


def read_list(path: Path) -> list[Entry]:
    """The entries of a file of JSON.

    Raises:
        SpecError: it cannot be read, or is not of that form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, list) or not found:
        raise SpecError(f'{path}: is no list of models; write [{{"model": ..., "samples": ...}}]')
    return [
        read_entry(one, f"{path}: entry {number}", path.parent) for number, one in enumerate(found)
    ]


def read_entry(given: object, where: str, folder: Path) -> Entry:
    if not isinstance(given, Mapping):
        raise SpecError(f"{where} is a {type(given).__name__}; it must be an object")
    known = [field.name for field in fields(Entry)]
    for key, value in given.items():
        if key not in known:
            raise SpecError(f"{where} has no {key!r}{did_you_mean(key, known)}")
        wanted = {"max_drop": (int, float), "transformer": (bool,)}.get(key, (str,))
        if not isinstance(value, wanted) or (key == "max_drop" and isinstance(value, bool)):
            raise SpecError(f"{where}: {key} is {value!r}; it must be a {wanted[-1].__name__}")
    for key in ("model", "samples"):
        if key not in given:
            raise SpecError(f"{where} has no {key!r}; it needs one")
    paths = {
        key: folder / given[key]
        for key in ("model", "samples", "labels", "evaluation")
        if key in given
    }
    return checked(Entry(**{"name": named(paths["model"]), **given, **paths}))


def entry_of(words: Sequence[str]) -> Entry:
    """An entry of the command line.

    Raises:
        SpecError: there are too few or too many words, or no such files.
    """
    if not 2 <= len(words) <= 3:
        raise SpecError(f"--model {' '.join(words)}: write --model MODEL SAMPLES [LABELS]")
    model, samples, *labels = map(Path, words)
    return checked(Entry(named(model), model, samples, labels[0] if labels else None))


def checked(entry: Entry) -> Entry:
    for path in (entry.model, entry.samples, entry.labels, entry.evaluation):
        if path is not None and not path.exists():
            raise SpecError(f"{entry.name}: there is no {path}")
    return entry


def chosen(arguments: argparse.Namespace) -> list[Entry]:
    """What the command line names, each with its drop and its evaluation samples."""
    entries = [entry_of(words) for words in arguments.model or ()]
    entries += read_list(arguments.list) if arguments.list else []
    if not entries:
        raise SpecError("there is no model to compare on; give --model or --list")
    names = [entry.name for entry in entries]
    for name in arguments.only or ():
        if name not in names:
            raise SpecError(f"--only {name}: there is no such model{did_you_mean(name, names)}")
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"two models are called {name!r}; name them apart in --list")
    return [
        completed(entry, arguments)
        for entry in entries
        if not arguments.only or entry.name in arguments.only
    ]


def completed(entry: Entry, arguments: argparse.Namespace) -> Entry:
    if entry.max_drop is None:
        entry = replace(entry, max_drop=arguments.max_drop)
    if entry.evaluation is None and arguments.evaluation is not None:
        folder = arguments.evaluation / entry.name
        return replace(entry, evaluation=folder if folder.is_dir() else None)
    return entry


# ------------------------------------------------------------------ tools


def command_of(tool: str, entry: Entry, arguments: argparse.Namespace) -> list[str | Path]:
    """What runs a tool; the source and the target come behind it."""
    if tool in RECIPES:
        verb = [sys.executable, "-m", "graphopt", "optimize", "--recipe", tool]
        return [*verb, "--samples", entry.samples.resolve()]
    python = arguments.peers_python if tool in PEERS else sys.executable
    options: list[str | Path] = ["--max-drop", str(entry.max_drop)]
    options += ["--minutes", str(arguments.minutes)]
    options += ["--metric", entry.metric] if entry.metric else []
    options += ["--labels", entry.labels.resolve()] if entry.labels else []
    options += ["--transformer"] if entry.transformer else []
    return [python, RUN_TUNER, *options, tool]


def run_tool(tool: str, entry: Entry, arguments: argparse.Namespace, folder: Path) -> Row:
    """Run a tool, one of `PEERS` a second time on a simpler model where it raises on this one."""
    first = run_once(tool, entry, arguments, folder, ())
    if first.fault is None or tool not in PEERS or first.fault.startswith("over "):
        return first
    second = run_once(tool, entry, arguments, folder, ("--simplified",))
    return replace(second, remark=f"{second.remark}; simplified first (else {first.remark})")


def run_once(
    tool: str,
    entry: Entry,
    arguments: argparse.Namespace,
    folder: Path,
    further: Sequence[str],
) -> Row:
    place = folder / "-".join([entry.name, tool, *further])
    place.mkdir()
    source, target = copy_model(entry.model, place), folder / f"{entry.name}.{tool}.onnx"
    head = command_of(tool, entry, arguments)
    if tool in RECIPES:
        command = [*head, source, "-o", target]
    else:
        command = [*head, *further, source, entry.samples.resolve(), target]
    cost, told = run_measured(command, place, arguments.timeout)
    # What a recipe says when it is done is progress; when it fails, the reason.
    remark = "" if tool in RECIPES and cost.fault is None else told
    fault = None if target.exists() else cost.fault or "no result"
    return Row(tool, cost.seconds, cost.peak_bytes, fault, remark.strip())


# ------------------------------------------------------------------ what came of it


def why_it_does_not_load(result: Path, entry: Entry) -> str | None:
    try:
        session = Session(result)
        for sample in chosen_samples(Subject(entry.name, entry.model, entry.samples)):
            session.run({name: sample[name] for name in session.inputs})
    except (GraphoptError, KeyError) as error:
        return f"does not run: {error}"
    return None


def sized(row: Row, result: Path, original_bytes: int) -> Row:
    stored_bytes = open_model(result).stored_bytes
    return replace(row, stored_bytes=stored_bytes, size_ratio=stored_bytes / original_bytes)


def timed(
    rows: Sequence[Row], files: Mapping[str, Path], entry: Entry, seconds: float
) -> list[Row]:
    samples = chosen_samples(Subject(entry.name, entry.model, entry.samples))
    report = benchmark(list(files.items()), samples=samples, threads=1, seconds=seconds)
    found = {one.model: one for one in report.rows}
    return [
        replace(row, latency_ratio=found[row.tool].ratio, p50_ms=found[row.tool].p50_ms)
        if row.tool in found
        else row
        for row in rows
    ]


def judge_of(entry: Entry, evaluation: Path) -> Judge:
    subject = open_subject(entry.model, "cpu", True, True, lambda _: None)
    feed = subject.feed(evaluation, None, ())
    metric = parse_metric(entry.metric, evaluation)
    (judge,) = metric.judges(subject.source.model, Session(subject.given), feed, [feed])
    return judge


def judged(row: Row, judge: Judge, original: Scores, result: Path) -> Row:
    """The row with the drop, or with the reason why some sample has none."""
    try:
        scores = judge(Session(result))
    except GraphoptError as error:
        return replace(row, remark=f"not evaluated: {error}. {row.remark}")
    standard_error = math.inf
    if original.per_item is not None and scores.per_item is not None:
        standard_error = paired_standard_error(original.per_item, scores.per_item)
    return replace(
        row,
        value=finite(scores.value),
        drop=finite(original.value - scores.value),
        error=finite(standard_error),
    )


def finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def evaluated(command: str, name: str, model: Path) -> str:
    """The last line that the command of the user's writes, or how it failed."""
    words = [
        word.replace("{name}", name).replace("{model}", str(model)) for word in shlex.split(command)
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    return f"failed: {lines[-1]}" if done.returncode else lines[-1]


def compare(
    entry: Entry, tools: Sequence[str], arguments: argparse.Namespace, folder: Path
) -> list[Row]:
    """A row for the original, and one for each tool."""
    tell = teller(entry)
    rows, files = [Row(ORIGINAL)], {ORIGINAL: entry.model}
    for tool in tools:
        row = run_tool(tool, entry, arguments, folder)
        result = folder / f"{entry.name}.{tool}.onnx"
        fault = row.fault or why_it_does_not_load(result, entry)
        rows.append(replace(row, fault=fault))
        if fault is None:
            files[tool] = result
        tell(f"{tool}: {fault or 'done'} in {row.seconds or 0:.0f} s. {row.remark}")
    original_bytes = open_model(entry.model, drop_training_info=True).stored_bytes
    rows = [sized(r, files[r.tool], original_bytes) if r.tool in files else r for r in rows]
    tell("measuring")
    rows = timed(rows, files, entry, arguments.seconds)
    if entry.evaluation is not None:
        tell("evaluating")
        judge = judge_of(entry, entry.evaluation)
        original = judge(Session(entry.model))
        rows = [judged(r, judge, original, files[r.tool]) if r.tool in files else r for r in rows]
    if arguments.evaluate:
        tell("evaluating by the command")
        told = {t: evaluated(arguments.evaluate, entry.name, p) for t, p in files.items()}
        rows = [replace(row, evaluated=told.get(row.tool)) for row in rows]
    return rows


def teller(entry: Entry) -> Callable[[str], None]:
    return lambda text: print(f"{entry.name}: {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ shown


def cells(name: str, row: Row) -> list[str]:
    drop = "-" if row.drop is None else f"{row.drop:.2f}"
    if row.error is not None and row.tool != ORIGINAL:
        drop += f" ± {row.error:.2f}"
    if row.tool == ORIGINAL and row.value is not None:
        drop = f"of {row.value:.2f}"
    return [
        name,
        row.tool,
        "-" if row.size_ratio is None else f"{row.size_ratio:.3f}",
        "-" if row.latency_ratio is None else f"{row.latency_ratio:.2f}",
        drop,
        short(row.evaluated),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
        "yes" if row.fault is None else "no",
        cut("; ".join(filter(None, (row.fault, row.remark)))),
    ]


def short(told: str | None) -> str:
    """What a command told, for a cell: of a JSON object its first number."""
    if told is None:
        return "-"
    try:
        found = json.loads(told)
    except ValueError:
        return cut(told)
    numbers = [
        f"{key} {value:.4g}"
        for key, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return numbers[0] if numbers else cut(told)


def cut(text: str) -> str:
    """Text for one cell of a table in Markdown."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= REMARK_MAXIMUM else f"{line[: REMARK_MAXIMUM - 1]}…"


def as_json(
    done: Sequence[tuple[Entry, Sequence[Row]]], versions: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "cpu": cpu_name(),
        "threads": 1,
        "peers": dict(versions),
        "models": [
            {
                "name": entry.name,
                "metric": entry.metric,
                "max_drop": entry.max_drop,
                "rows": [asdict(row) for row in rows],
            }
            for entry, rows in done
        ],
    }


# ------------------------------------------------------------------ the command line


def installed(python: Path) -> dict[str, str | None]:
    """Versions of what the peers need, in their interpreter.

    Raises:
        SpecError: there is no such interpreter, or it has no graphopt.
    """
    try:
        done = subprocess.run([python, RUN_TUNER, "versions"], capture_output=True, text=True)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        raise SpecError(f"--peers-python {python} is no Python that runs ({error})") from None
    if found["graphopt"] is None:
        raise SpecError(f"--peers-python {python} has no graphopt: pip install -e .[cpu] nncf")
    return found


def available(tools: Sequence[str], versions: Mapping[str, str | None]) -> Iterator[str]:
    """Those of the tools that can run; says which cannot."""
    for tool in tools:
        if tool not in PEERS or versions[tool]:
            yield tool
        else:
            print(f"{tool} is not installed and is left out", file=sys.stderr)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", action="append", metavar="PATH")
    parser.add_argument("--list", type=Path, metavar="FILE", help="models, as JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models of them")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=COMPARED, metavar="TOOL",
                        help=f"of {', '.join(TOOLS)}; by default all but "
                        f"{' and '.join(WHERE_ASKED_FOR)}")  # fmt: skip
    parser.add_argument("--max-drop", type=float, default=1.0, help="in the unit of the metric")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each search of tune")
    parser.add_argument("--evaluation", type=Path, metavar="FOLDER", help="FOLDER/NAME: samples")
    parser.add_argument("--evaluate", metavar="COMMAND", help="with {name} and {model}")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each tool")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each result for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the results")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Compare, and give the table, model by model."""
    entries = chosen(arguments)
    versions = installed(arguments.peers_python)
    tools = list(available(arguments.tools, versions))
    yield table(HEAD, ())
    done: list[tuple[Entry, list[Row]]] = []
    for entry in entries:
        with tempfile.TemporaryDirectory(prefix="tune-peers-") as scratch:
            done.append((entry, rows_of(entry, tools, arguments, Path(scratch))))
            if arguments.keep:
                keep(Path(scratch), arguments.keep)
        if arguments.json:
            text = json.dumps(as_json(done, versions), indent=2, allow_nan=False)
            arguments.json.write_text(f"{text}\n", encoding="utf-8")
        yield "\n".join(line(cells(entry.name, row)) for row in done[-1][1])


def rows_of(
    entry: Entry, tools: Sequence[str], arguments: argparse.Namespace, folder: Path
) -> list[Row]:
    """The rows of a model; where nothing can be measured of it, one with the reason."""
    try:
        return compare(entry, tools, arguments, folder)
    except GraphoptError as error:
        return [Row(ORIGINAL, fault=str(error))]


def keep(scratch: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in scratch.iterdir():
        if file.is_file():
            shutil.move(file, folder / file.name)


def main() -> int:
    arguments = parse(None)
    try:
        for text in run(arguments):
            print(text, flush=True)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
