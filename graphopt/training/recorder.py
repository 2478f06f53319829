"""The record of a run: one JSON object a line, appended as things happen.

Every line has `schema_version` and `event`: start (with the configuration, versions and time), step
(loss, learning rate, seconds, and the norm of the gradients where it is taken), epoch (mean loss,
seconds, score), checkpoint, resume, stopped, export, optimize. A run that resumes appends to the
record; of two lines on one step the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphopt.errors import ConfigError
from graphopt.json_report import plain

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Recorder:
    """Appends to the record.

    Attributes:
        path: of the file; None records nothing, as on all processes but the first.
        every_steps: steps between two lines on a step.
    """

    path: Path | None
    every_steps: int = 1

    def check(self) -> None:
        """Raise ConfigError when the file cannot be written."""
        try:
            if self.path is not None:
                self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigError(f"cannot write log.path {self.path}: {error.strerror}") from None

    def step(self, step: int, content: Mapping[str, Any]) -> None:
        """Record a step, if it is one of those to be recorded.

        Args:
            step: its number, from 1.
            content: what to say of it.
        """
        if step % self.every_steps == 0:
            self.add("step", {"step": step, **content})

    def add(self, event: str, content: Mapping[str, Any]) -> None:
        """Record an event."""
        if self.path is None:
            return
        line = plain({"schema_version": SCHEMA_VERSION, "event": event, **content})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
