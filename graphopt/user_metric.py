"""A metric of the user's own: a function in a file of theirs."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.errors import GraphoptError, SampleError, SpecError, did_you_mean
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores


@dataclass(frozen=True)
class UserMetric:
    """`FILE.py:FUNCTION`, which says how good a model is; higher is better.

    The function is called as `function(run)`, or as `function(run, samples)` if it takes two.
    `run({input: array})` runs the model and gives its outputs by name. `samples` are those that the
    model is judged on (`PartSamples`). The function returns one number, or one for each of the
    samples, in order: only by these can a drop be proven, and only if the function has an attribute
    `bounds = (low, high)` that no score ever leaves. Bounds are never guessed from scores, as a
    guess proves nothing.

    Attributes:
        file: path of the file.
        function: name in it.
    """

    file: Path
    function: str

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"{self.file}:{self.function}"

    def judges(
        self, original: ir.Model, session: Session, feed: Feed, parts: Sequence[Feed]
    ) -> tuple[Judge, ...]:
        """See `graphopt.scores.Metric`.

        Raises:
            SpecError: there is no such file or function, or it cannot be loaded or called.
        """
        function = load_function(self.file, self.function)
        called_with = _count_of_arguments(function, self.name)
        bounds = _bounds(function, self.name)
        return tuple(_Judge(self, function, called_with, bounds, part) for part in parts)


class PartSamples(Sequence[Any]):
    """The samples that a function judges a model on, each read anew when it is asked for.

    An item is a mapping of input names to arrays; where state is carried, a list of these, one for
    each step of a sequence.

    Args:
        part: of the samples.

    Attributes:
        names: of the items: stems of their files, or of a sequence that of its first step.
    """

    def __init__(self, part: Feed) -> None:
        self._part = part
        names = part.samples.names or tuple(map(str, range(len(part.samples))))
        self.names = tuple(names[sequence[0]] for sequence in part.samples.sequences)

    def __len__(self) -> int:
        return len(self._part.samples.sequences)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        steps = [dict(self._part.samples.loaders[i]()) for i in self._sequence(index)]
        return steps if self._part.state else steps[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def _sequence(self, index: int) -> tuple[int, ...]:
        return self._part.samples.sequences[index]


@dataclass(frozen=True)
class _Judge:
    """Calls the function for a model."""

    metric: UserMetric
    function: Callable[..., Any]
    arguments: int
    bounds: tuple[float, float]
    part: Feed

    def __call__(self, session: Session) -> Scores:
        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return session.run(self._feeds(inputs, session))

        samples = PartSamples(self.part)
        try:
            given = self.function(*(run, samples)[: self.arguments])
        except Exception as error:
            raise SampleError(f"metric {self.metric.name}: {_told(error, self.metric.file)}") from (
                error
            )
        value, per_item = self._scores(given, len(samples))
        return Scores(value, per_item, *self.bounds, unit="")

    def _feeds(self, inputs: Mapping[str, np.ndarray], session: Session) -> Sample:
        if not isinstance(inputs, Mapping):
            raise SampleError(
                f"run was given a {type(inputs).__name__}; give it a dict of input names and arrays"
            )
        known = {i.name for i in self.part.inputs}
        for name in inputs:
            if name not in known:
                raise SampleError(f"the model has no input {name!r}{did_you_mean(name, known)}")
        # What may be an input of the original is a constant in a model that passes made of it.
        return {n: np.asarray(a) for n, a in inputs.items() if n in session.inputs}

    def _scores(self, given: object, count: int) -> tuple[float, np.ndarray | None]:
        """The value, and the scores of the items where the function gave them."""
        wanted = "return one number, or one for each sample"
        try:
            numbers = np.asarray(given)
        except ValueError:
            raise self._wrong(f"returned {_brief(given)}; {wanted}") from None
        if numbers.dtype.kind not in "biuf":
            raise self._wrong(f"returned {_brief(given)}; {wanted}")
        array = numbers.astype(np.float64)
        if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
            raise self._wrong(
                f"returned an array of shape {list(array.shape)}, and there are {count} samples; "
                f"{wanted}"
            )
        if not np.isfinite(array).all():
            raise self._wrong("returned NaN or infinity; scores must be finite numbers")
        low, high = self.bounds
        if array.min() < low or array.max() > high:
            raise self._wrong(
                f"returned scores from {array.min():g} to {array.max():g}, outside of its bounds, "
                f"{low:g} to {high:g}"
            )
        return float(array.mean()), array if array.ndim else None

    def _wrong(self, what: str) -> SampleError:
        return SampleError(f"metric {self.metric.name}: {self.metric.function} {what}")


# ------------------------------------------------------------------ the function


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """A function of a file, which is run.

    Raises:
        SpecError: there is no such file or function, or running the file raises.
    """
    if not file.is_file():
        raise SpecError(f"metric {file}:{name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"graphopt_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise SpecError(f"metric {file}:{name}: {file} is no Python file; it must end in .py")
    module = importlib.util.module_from_spec(spec)
    # What lies beside the file can be imported by it, as if it were run.
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpecError(f"metric {file}:{name}: {_told(error, file)}") from error
    finally:
        sys.path.remove(folder)
    found = getattr(module, name, None)
    if found is None:
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        near = did_you_mean(name, functions)
        raise SpecError(f"metric {file}:{name}: {file} has no function {name!r}{near}")
    if not callable(found):
        raise SpecError(f"metric {file}:{name}: {name} is a {type(found).__name__}, no function")
    called: Callable[..., Any] = found
    return called


def _count_of_arguments(function: Callable[..., Any], name: str) -> int:
    """How many of (run, samples) the function takes."""
    wanted = "it must take (run) or (run, samples)"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise SpecError(f"metric {name}: its parameters cannot be told; {wanted}") from None
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    others = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 2 or others or not (places or several):
        raise SpecError(
            f"metric {name}: the function takes {inspect.signature(function)}; {wanted}"
        )
    return 2 if several else min(2, len(places))


def _bounds(function: Callable[..., Any], name: str) -> tuple[float, float]:
    """Between which scores are, by the function's word."""
    given = getattr(function, "bounds", None)
    if given is None:
        return -np.inf, np.inf
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        low = high = np.nan
    if not (np.isfinite([low, high]).all() and low < high):
        raise SpecError(
            f"metric {name}: its bounds are {_brief(given)}; they must be (low, high), as in (0, 1)"
        )
    return low, high


def _brief(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"a {type(given).__name__}"


def _told(error: Exception, file: Path) -> str:
    """What was raised, and in which line of the user's file."""
    what = str(error) if isinstance(error, GraphoptError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if _is_same(f.filename, file)]
    return f"{file}, line {own[-1].lineno}: {what}" if own else what


def _is_same(filename: str, file: Path) -> bool:
    return Path(filename).resolve() == file.resolve()
