"""What graphopt raises when the fault is not its own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """Something that the user asked for cannot be done; the message says what to change.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class ModelError(GraphoptError):
    """The model cannot be read, is not valid, or cannot be written where asked."""


class SampleError(GraphoptError):
    """A sample does not fit the model, or the samples cannot be read."""


class SpecError(GraphoptError):
    """A pass, recipe, option, budget or other text is not of its form."""


class ConfigError(GraphoptError):
    """The configuration of a training run is not of its form, or does not fit what is there."""


class TrainingFailed(GraphoptError):
    """Training stopped: its numbers are no longer finite, or another process of it was lost."""

    exit_code = 1


class RuntimeUnavailable(GraphoptError):
    """onnxruntime, or the provider that was asked for, is not there."""


class SearchStopped(GraphoptError):
    """A worker was lost, or there is no room for what a search keeps; what was found is kept."""

    exit_code = 1


class CheckFailed(GraphoptError):
    """A budget, a requirement or a strict check failed; nothing is wrong with the input."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known words, else the list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(known)}" if known else ""
