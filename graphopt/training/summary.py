"""What a training run gave, shown on the terminal and as JSON."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from graphopt.json_report import numerics_to_json, run_to_json, versions
from graphopt.report import render_numerics, render_run
from graphopt.training.api import Trained

SCHEMA_VERSION: Final = 1
AS_WRITTEN: Final = "as written"


def render_trained(trained: Trained) -> RenderableType:
    """The result for the terminal."""
    parts: list[RenderableType] = [Text(_trained_line(trained))]
    files = trained.delivery
    if files.exported is not None:
        parts.append(Text(f"exported to {files.exported}; its outputs against PyTorch's:"))
        parts.append(render_numerics({AS_WRITTEN: files.numerics}))
    if files.run is not None:
        parts += [Text(f"optimized to {files.optimized}:"), render_run(files.run)]
    return Group(*parts)


def _trained_line(trained: Trained) -> str:
    line = f"trained {trained.steps} steps"
    if trained.losses:
        line += f", last loss {trained.losses[-1]:.4g}"
    if trained.best is not None:
        line += f", best score {trained.best[0]:.4f} after epoch {trained.best[1]}"
    return line


def trained_to_json(trained: Trained) -> dict[str, Any]:
    """The result as JSON."""
    files = trained.delivery
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "steps": trained.steps,
        "losses": list(trained.losses),
        "scores": list(trained.scores),
        "best": None if trained.best is None else list(trained.best),
        "exported": None if files.exported is None else str(files.exported),
        "numerics": numerics_to_json({AS_WRITTEN: files.numerics}),
        "optimized": None if files.optimized is None else str(files.optimized),
        "run": None if files.run is None else run_to_json(files.run),
    }
