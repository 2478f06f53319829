"""Channels from what makes them to the products that read them, and factors that move along."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.rewriting import why_too_old
from graphopt_passes.quantize.flows import FIRST_OPSET, Blocked, Flow, Order, flow_of
from graphopt_passes.quantize.rescaling import Rescaling, Source

ROUNDS_MAXIMUM = 20

FACTOR_MINIMUM, FACTOR_MAXIMUM = 1e-2, 1e2
"""Of one round."""

ROWS_MINIMUM = 16
"""With fewer, how their numbers happen to be rounded says more than how large they are."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """A source of channels, and all that they reach.

    Attributes:
        source: makes them.
        flow: what they reach.
    """

    source: Source
    flow: Flow

    @property
    def reached(self) -> list[ir.Node]:
        """The products at the end."""
        return [sink.layer.node for sink in self.flow.sinks]


def why_no_factors(model: ir.Model, context: Context) -> str | None:
    """Why none can be chosen by what samples show; None where they can."""
    if context.observer is None:
        return "there are no samples to choose factors by"
    return why_too_old(model, FIRST_OPSET)


def stretches_of(sources: Iterable[Source], order: Order, change: Change) -> list[Stretch]:
    """Follow the channels of sources.

    Args:
        sources: in one graph.
        order: of the graph.
        change: is told where the channels must stay as they are, and why.
    """
    found = []
    for source in sources:
        try:
            found.append(Stretch(source, flow_of(source.value, source.channels, order)))
        except Blocked as reason:
            change.skip(source.node, str(reason))
    return found


Choose = Callable[[Stretch, Rescaling], np.ndarray | str]
"""Factors for the channels of a stretch, float64 of shape [channels], when others have theirs; in
words, why none are worth it."""


def rescale(
    model: ir.Model,
    stretches: Sequence[Stretch],
    choose: Choose,
    what: str,
    context: Context,
    change: Change,
) -> None:
    """Divide the channels of each stretch by the factors that are chosen for it.

    One changes the ranges and weights that another meets, so that they are tried until nothing is
    worth it any more: again when a product that they reach has changed.

    Args:
        model: rewritten in place; the stretches are in its main graph.
        stretches: in order.
        choose: the factors.
        what: was done, in the past tense, for the record.
        context: keeps what is large.
        change: the record.
    """
    done, left = Rescaling(), dict[Source, str]()
    changed: set[Source] = set()
    reaching: dict[ir.Node, set[Stretch]] = defaultdict(set)
    for stretch in stretches:
        for node in stretch.reached:
            reaching[node].add(stretch)
    waiting = set(stretches)
    for stretch in chain.from_iterable(repeat(stretches, ROUNDS_MAXIMUM)):
        if stretch not in waiting:
            continue
        waiting.remove(stretch)
        factors = choose(stretch, done)
        if isinstance(factors, str):
            left[stretch.source] = factors
            continue
        after = done.divided(stretch.source, stretch.flow, factors)
        if after is None:
            left[stretch.source] = "float32 would not hold its weights"
            continue
        done = after
        changed.add(stretch.source)
        waiting.update(*(reaching[node] for node in (stretch.source.node, *stretch.reached)))
    for stretch in stretches:
        if stretch.source in changed:
            change.count(f"{stretch.source.node.op_type} {what}")
        else:
            change.skip(stretch.source.node, left[stretch.source])
    done.write(model, context)


def why_too_few(rows: int) -> str | None:
    """Why so many rows of what a source makes say too little; None when they do not."""
    if rows >= ROWS_MINIMUM:
        return None
    return f"the samples hold {rows} rows of what it makes; it takes {ROWS_MINIMUM}"
