"""What `tune` and `sensitivity` found as tables and lines of text, for terminal and HTML alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from graphopt import trade_offs
from graphopt.probing import Probe
from graphopt.sensitivity import Sensitivity
from graphopt.tables import TextTable
from graphopt.tune import Point, Tuning, drop_text
from graphopt.verifying import Certificate

SHOWN_OPTIONS = 2
"""Of a treatment, where there is no room for all that were tried: the mildest and the boldest."""

NOTHING = 1e-12
"""What a loss or a divergence is by rounding alone."""

SHOWN_EXPECTED = 2.0
"""Points of the front that was expected are drawn up to so many times the drop that is allowed."""


# ------------------------------------------------------------------ tune, in words


def asked_text(found: Tuning) -> str:
    """What was asked for, in a line."""
    scenario = "" if found.scenario == found.objective else f" ({found.scenario})"
    limit = drop_text(found.certificate.limit, found.unit)
    certify = ", to be proven" if found.certify else ""
    return (
        f"asked: the least {found.objective}{scenario} on {found.run.provider} for a drop of at "
        f"most {limit} of {found.metric}{certify}"
    )


def parts_text(found: Tuning) -> str:
    """What the samples were used for, in a line."""
    fitted, judged, verified = found.parts
    if fitted == judged == verified:
        return f"samples: {fitted}, too few to divide: passes, search and verification share them"
    return (
        f"samples: {fitted} to fit by, {judged} to search by, {verified} to verify by, which the "
        "search never saw"
    )


def certificate_lines(found: Tuning) -> list[str]:
    """What samples that the search never saw say of the result; nothing where nothing was lost."""
    if found.chosen is None:
        return []
    seen, unit = found.certificate, found.unit
    error = f", standard error {seen.error:.2g}" if math.isfinite(seen.error) else ""
    change = "gain" if seen.drop < 0 else "drop"
    measured = (
        f"measured by {_samples(found.parts[2])}: {metric_text(found)}, a {change} of "
        f"{drop_text(abs(seen.drop), unit)}{error}"
    )
    return [_certificate_text(seen, unit), measured]


def _certificate_text(seen: Certificate, unit: str) -> str:
    if seen.certified and seen.bound is not None:
        return f"certified: the drop is at most {drop_text(seen.bound, unit)}, {_sureness(seen)}"
    told = f"not certified: {seen.reason}"
    if seen.bound is None or (seen.items_needed is not None and seen.items >= seen.items_needed):
        return told
    return f"{told}; they prove at most {drop_text(seen.bound, unit)}, {_sureness(seen)}"


def _sureness(seen: Certificate) -> str:
    return f"at {100 * seen.confidence:.4g} %"


def metric_text(found: Tuning) -> str:
    """The metric before and after, on the samples that verify."""
    seen = found.certificate
    unit = f" {found.unit}" if found.unit else ""
    return f"{found.metric} {seen.original:.4g} -> {seen.value:.4g}{unit}"


def effort_text(found: Tuning) -> str:
    """What the search took, in a line."""
    built = sum(1 for one in found.points if one.built)
    return (
        f"{built} models built, {found.evaluations} evaluations of the metric, "
        f"{found.minutes:.1f} minutes"
    )


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"


# ------------------------------------------------------------------ tune, in tables


def points_table(found: Tuning) -> TextTable:
    """A row for each model that was built, the largest first."""
    columns = ("model", ">layers treated", ">size", ">latency", ">drop", "")
    built = sorted((one for one in found.points if one.built), key=lambda one: -one.size_ratio)
    return TextTable(columns, tuple(_point_row(one, found.certificate.limit) for one in built))


def _point_row(one: Point, limit: float) -> tuple[str, ...]:
    return (
        one.name,
        str(len(one.options)) if one.options else "",
        f"{one.size_ratio:.3f}",
        "" if one.latency_ratio is None else f"{one.latency_ratio:.3f}",
        f"{one.drop:.3g}",
        "chosen" if one.chosen else "over the drop" if one.drop > limit else "",
    )


def tried_points(found: Tuning) -> list[trade_offs.Candidate]:
    """What was built, and what was expected of the front near the drop that is allowed."""
    edge = SHOWN_EXPECTED * found.certificate.limit
    return [
        trade_offs.Candidate(
            _point_name(one),
            one.size_ratio,
            one.latency_ratio,
            # What is expected of roundings is next to nothing, and no number to read.
            round(one.drop, 6),
            one.chosen,
            not one.built,
        )
        for one in found.points
        if one.built or one.drop <= edge
    ]


def _point_name(one: Point) -> str:
    return f"{one.name}, {len(one.options)} layers treated" if one.options else one.name


def option_counts(found: Tuning) -> list[str]:
    """How many layers got which option, and how many were left as they were."""
    if found.chosen is None or not found.probes:
        return []
    got = Counter(found.chosen.options.values())
    left = len({one.layer for one in found.probes} - found.chosen.options.keys())
    lines = [f"{count} × {option}" for option, count in got.most_common()]
    return [*lines, *([f"{left} × left as in {found.chosen.name}"] if left else [])]


def layer_options_table(found: Tuning) -> TextTable:
    """A row for each layer, and what it got."""
    columns = ("layer", "operator", "got", ">bytes saved", ">divergence, alone")
    options = {} if found.chosen is None else found.chosen.options
    known = {(p.layer, _option(p)): p for p in found.probes}
    operators = {p.layer: p.operator for p in found.probes}
    rows = []
    for layer, operator in operators.items():
        given = known.get((layer, options.get(layer, "")))
        figures = ("", "") if given is None else _figures(given)
        rows.append((layer, operator, options.get(layer, "left as it was"), *figures))
    return TextTable(columns, tuple(rows))


def _figures(given: Probe) -> tuple[str, str]:
    return f"{given.saved_bytes:,}", f"{given.divergence:.2g}"


# ------------------------------------------------------------------ sensitivity


def effect_table(
    probes: Sequence[Probe], layers: Sequence[str], wanted: Callable[[Probe], bool]
) -> TextTable:
    """A row for each layer; in a cell the divergence of the outputs, then the loss in points.

    Args:
        probes: of all layers.
        layers: in the order that is shown.
        wanted: whether the option of a probe has a column.
    """
    options = _options(filter(wanted, probes))
    known = {(one.layer, _option(one)): one for one in probes}
    operators = {one.layer: one.operator for one in probes}
    rows = [
        (layer, operators[layer], *(_effect(known.get((layer, option))) for option in options))
        for layer in layers
    ]
    return TextTable(("layer", "operator", *(f">{option}" for option in options)), tuple(rows))


def _effect(one: Probe | None) -> str:
    if one is None:
        return ""
    if one.reason is not None:
        return "-"
    return _brief(one.divergence) + ("" if one.loss is None else f" {_brief(one.loss)}")


def _brief(number: float) -> str:
    """As short as a column is narrow; what is a rounding of zero is zero."""
    if abs(number) < NOTHING:
        return "0"
    return f"{number:.2g}" if abs(number) >= 0.01 else f"{number:.0e}".replace("e-0", "e-")


def is_shown(probes: Iterable[Probe]) -> Callable[[Probe], bool]:
    """Whether a column is for the option of a probe, where there is no room for all."""
    tried: dict[str, list[str]] = {}
    for one in probes:
        options = tried.setdefault(one.treatment, [])
        if (one.measured or one.reason is not None) and one.option not in options:
            options.append(one.option)
    ends = {name: {*options[:1], *options[1 - SHOWN_OPTIONS :]} for name, options in tried.items()}
    return lambda one: one.option in ends[one.treatment]


def effect_grid(
    probes: Sequence[Probe], layers: Sequence[str], wanted: Callable[[Probe], bool]
) -> trade_offs.Sensitivity:
    """The divergences alone, for a figure; see `effect_table`."""
    options = _options(filter(wanted, probes))
    known = {(p.layer, _option(p)): p.divergence for p in probes if p.reason is None}
    drops = [[_finite(known.get((layer, option))) for option in options] for layer in layers]
    return trade_offs.Sensitivity(layers, options, drops, "divergence of the outputs")


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def refusals_table(probes: Iterable[Probe]) -> TextTable:
    """What layers cannot be given, and why; a row for each reason."""
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for one in probes:
        if one.reason is not None:
            layers.setdefault((one.treatment, one.reason), {})[one.layer] = None
    rows = [
        (treatment, str(len(found)), reason, next(iter(found)))
        for (treatment, reason), found in layers.items()
    ]
    return TextTable(
        ("treatment", ">layers", "cannot be given, because", "for example"), tuple(rows)
    )


def ranked(probes: Iterable[Probe]) -> list[str]:
    """Layers, the most sensitive first: by the largest divergence of what they can be given."""
    return Sensitivity(tuple(probes), {}, 0, (0, 0), ()).layers


def _options(probes: Iterable[Probe]) -> list[str]:
    return list(dict.fromkeys(map(_option, probes)))


def _option(one: Probe) -> str:
    return f"{one.treatment} {one.option}"


def bytes_text(found: Sensitivity) -> str:
    """On what the options were tried, in a line."""
    fitted, judged = found.samples
    return (
        f"{len(found.layers)} layers of the model after basic, {found.stored_bytes:,} bytes; "
        f"fitted by {_samples(fitted)}, judged by {_samples(judged)}"
    )
