"""What was found out about a model that came out wrong, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from graphopt.bisection import Bisection, Origin, Trial
from graphopt.deviations import Deviation
from graphopt.report import new_table, render_numerics
from graphopt.validation import OutputError

SHOWN_VALUES = 8
"""Values beside the one where the error begins: as many before it as behind it."""

SHOWN_NODES = 12

FOLDER = Path("DIR")
"""Stands for the folder of the reproducer where none was given."""

_STYLES = {"within": "green", "over": "red", "adds up": "yellow", "refused": "yellow"}


def render_bisection(found: Bisection, folder: Path | None = None) -> RenderableType:
    """The passes, the place where the error begins, and how to see it.

    Args:
        found: what to show.
        folder: where the reproducer was written; None where it was not.
    """
    parts: list[RenderableType] = []
    if found.trials:
        parts += [*_trials(found.trials), ""]
    if found.numerics:
        parts += [render_numerics(found.numerics), ""]
    parts += [Text(line, style="bold") for line in _verdict(found)]
    if found.origin is not None:
        parts += ["", *_origin(found.origin), "", _values(found.deviations, found.origin)]
    if found.reproducer is not None:
        parts += ["", *_reproducer(found, folder)]
    parts += [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(*parts)


def _trials(trials: Sequence[Trial]) -> Iterator[RenderableType]:
    table = new_table("pass", "effect", "what it did", "verdict")
    idle = [trial.spec for trial in trials if trial.verdict == "unchanged"]
    for trial in trials:
        if trial.verdict == "unchanged":
            continue
        name = trial.spec if trial.round == 1 else f"{trial.spec} (round {trial.round})"
        changed = ", ".join(f"{count} × {what}" for what, count in trial.changes.items())
        did = ": ".join(text for text in (changed, trial.reason) if text)
        verdict = trial.verdict.upper() if trial.verdict in ("over", "adds up") else trial.verdict
        table.add_row(name, trial.effect.name, did, Text(verdict, style=_STYLES[trial.verdict]))
    if table.rows:
        yield table
    if idle:
        yield Text(f"nothing to do: {', '.join(idle)}", style="dim")


def _verdict(found: Bisection) -> Iterator[str]:
    if found.reason is None:
        yield f"nothing found: all outputs are within the tolerance ({found.tolerance})"
        return
    if found.guilty is not None:
        yield f"pass {found.guilty}: {found.reason} ({found.tolerance})"
    else:
        yield f"{found.reason} ({found.tolerance})"


def _origin(origin: Origin) -> Iterator[RenderableType]:
    what = f"{origin.operator} {origin.node!r}".strip()
    place = f"{what}, which makes {origin.value!r}"
    if origin.value_before != origin.value:
        place += f" ({origin.value_before!r} in the original)"
    if origin.begins:
        yield Text(f"the error begins at {place}", style="bold")
    else:
        yield Text("the error comes from no one place; most of it is added by", style="bold")
        yield Text(place, style="bold")
    if origin.reads:
        own, total = _deviation_text(origin.own), _deviation_text(origin.total)
        yield Text(
            f"  of {', '.join(map(repr, origin.reads))} of the original it makes a value that"
        )
        yield Text(f"  {own}; with what reaches it, {total}")
    nodes = list(origin.nodes[:SHOWN_NODES])
    if len(origin.nodes) > 1:
        more = f" and {len(origin.nodes) - SHOWN_NODES} more" * (len(origin.nodes) > SHOWN_NODES)
        yield Text(f"  by the nodes {', '.join(nodes)}{more}")
    yield from (Text(f"  - {cause}") for cause in origin.causes)


def _deviation_text(error: OutputError) -> str:
    if error.mismatch is not None:
        return error.mismatch
    return "is identical" if error.identical else f"is off by relative L2 {error.rel_l2:.3g}"


def _values(deviations: Sequence[Deviation], origin: Origin) -> RenderableType:
    place = next(n for n, one in enumerate(deviations) if one.pair.after == origin.value)
    first = max(0, place - SHOWN_VALUES // 2)
    table = new_table("", "value", "in the original", ">error", ">of its own", "known by")
    for one in deviations[first : place + SHOWN_VALUES // 2 + 1]:
        table.add_row(
            "->" if one.pair.after == origin.value else "",
            one.pair.after,
            one.pair.before if one.pair.before != one.pair.after else "",
            _figure(one.total),
            _figure(one.own),
            one.pair.how,
        )
    return table


def _figure(error: OutputError) -> str:
    if error.mismatch is not None:
        return "NaN or infinity" if "NaN" in error.mismatch else error.mismatch
    return "0" if error.identical else f"{error.rel_l2:.2e}"


def _reproducer(found: Bisection, folder: Path | None) -> Iterator[RenderableType]:
    made = found.reproducer
    assert made is not None
    size = f"{made.nodes} node" + ("s" if made.nodes != 1 else "")
    written = "-o DIR writes it" if folder is None else f"written to {folder}"
    yield Text(f"reproducer of {size}, wrong on its own ({written}):", style="bold")
    yield from (Text(f"  {command}") for command in made.commands(folder or FOLDER))
