"""Removes the units and blocks of a model that its outputs need least, and refits what stays.

What removing units costs the layers that read them is known from the moments of what these read
(`unit_scores`); what that does to the outputs is measured, with half of the units of each group
gone, and likewise for each residual block. So much of each goes as the budget asks (`unit_choice`).
Then every layer, first to last, is refitted to what it gave before for the units that are left, of
what it reads now (`aims`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import dropwhile, islice

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.couplings import values_of
from graphopt.groups import Consumer, Group, analyze
from graphopt.layer_costs import macs_of_nodes, sizes_of_sample
from graphopt.operators import is_onnx
from graphopt.rewriting import Names
from graphopt_passes.prune.blocks import Block, blocks_of, drop_branch, means_of
from graphopt_passes.prune.removal import masks_of, remove
from graphopt_passes.prune.sinks import (
    Sink,
    batches,
    sinks_of,
    why_without_sinks,
    write_shift,
    write_sink,
)
from graphopt_passes.prune.unit_budgets import Budget
from graphopt_passes.prune.unit_choice import BlockOption, Choosing, Chosen, UnitOptions
from graphopt_passes.prune.unit_costs import Costs
from graphopt_passes.prune.unit_refitting import is_refitted, refit_units
from graphopt_passes.prune.unit_scores import Curve, curve_of, mean_square

COMPARED_SAMPLES, ALONE_SAMPLES, RUNS_MAXIMUM = 32, 8, 2048
"""Errors are measured on so many samples, at most and at least, and in no more runs in all."""

PRODUCTS, MAKING_GOOD = ("Conv", "Gemm", "MatMul"), 2
"""Of so many layers behind a branch it is believed that they make good for it: the next block."""

ROUNDS = 5
"""How often the budget is corrected by what a model without the units was seen to cost."""

NEAR = 0.995
"""Of the budget; what takes so much needs no further round."""

SHARE_MINIMUM = 0.1
"""Of the units of each group stay at least."""


@dataclass(frozen=True, eq=False)
class Prunable:
    """A group, and what is known of it.

    Attributes:
        group: of the model.
        curve: what it costs to remove units.
        options: numbers of units that could stay, and what these do to the outputs.
    """

    group: Group
    curve: Curve
    options: UnitOptions


@dataclass
class Structures:
    """Prunes one model.

    Attributes:
        model: rewritten in place, by `run`.
        context: with samples.
        change: told what is done, and what is left alone.
        budget: what is to be saved.
        multiple: of which numbers of units are.
        keep: names of groups that stay as they are.
        drops_blocks: whole residual branches may go.
        refits: what stays is refitted.
    """

    model: ir.Model
    context: Context
    change: Change
    budget: Budget
    multiple: int
    keep: frozenset[str] = frozenset()
    drops_blocks: bool = True
    refits: bool = True
    _measured: dict[int, Callable[[ir.Model], float]] = field(default_factory=dict)

    @cached_property
    def _apart(self) -> tuple[Context, Context]:
        """To look at what layers read, and to measure what removing their inputs does."""
        assert self.context.observer is not None
        fitted, judged = self.context.observer.apart()
        return replace(self.context, observer=fitted), replace(self.context, observer=judged)

    # -------------------------------------------------------------- what there is

    @cached_property
    def all_groups(self) -> tuple[Group, ...]:
        """Of the model, those that are frozen included."""
        return analyze(self.model).all

    @cached_property
    def groups(self) -> list[Group]:
        """Of which units can go."""
        found = []
        for group in self.all_groups:
            reason = group.frozen or self._why_not(group)
            if reason is None:
                found.append(group)
            else:
                self.change.skip(group.name, reason)
        return found

    def _why_not(self, group: Group) -> str | None:
        if group.name in self.keep:
            return "it is to be kept"
        if len(self._allowed(group)) == 1:
            return f"its {group.units} units leave no smaller number that kernels like"
        return why_without_sinks(group)

    def _allowed(self, group: Group) -> np.ndarray:
        """int64 [n]: how many units of a group may stay, rising; the last is all of them."""
        step = self._step(group)
        least = max(1, math.ceil(SHARE_MINIMUM * group.units))
        counts = [n for n in range(step, group.units, step) if n >= least]
        return np.array([*counts, group.units])

    def _step(self, group: Group) -> int:
        """Of which multiples of units stay, so that axes of weights have sizes that kernels like.

        Half of a multiple where a group is small, if it alone makes an axis of a weight.
        """
        producer = group.producers[0]
        place = group.place(producer.weight, producer.axis)
        step = max(self.multiple // max(len(place.indices) // group.units, 1), 1)
        while len(place.indices) == place.size and step > 1 and group.units < 2 * step:
            step //= 2
        return step

    @cached_property
    def blocks(self) -> list[Block]:
        """Of which the branch can go."""
        if not self.drops_blocks:
            return []
        sample = next(iter(self.context.samples), {})
        return blocks_of(self.model, macs_of_nodes(self.model, sizes_of_sample(self.model, sample)))

    # -------------------------------------------------------------- what it does to the outputs

    @cached_property
    def prunable(self) -> list[Prunable]:
        """The groups, in order, with what removing units of them does."""
        found = []
        for batch in batches(self.groups):
            by_group = sinks_of(batch, self.model, self._apart[0])
            for group, sinks in by_group.items():
                self.context.progress(f"looking at group {group.name}")
                curve = curve_of(sinks)
                square = self._square(self._with_half(group, sinks, curve))
                allowed = self._allowed(group)
                costs = curve.costs[group.units - allowed]
                squares = square * costs / max(float(curve.costs[curve.half]), 1e-30)
                found.append(Prunable(group, curve, UnitOptions(allowed, squares)))
        return found

    def _with_half(self, group: Group, sinks: Sequence[Sink], curve: Curve) -> ir.Model:
        """A copy in which half of the units of a group count for nothing."""
        copy, copies, nodes = self._copy()
        names, context = Names(copy), replace(self.context, scratch=None)
        for sink, matrix in zip(sinks, curve.halves, strict=True):
            consumer = _consumer_in(sink.consumer, copies, nodes)
            write_sink(sink, consumer, matrix, context)
            write_shift(sink, consumer, sink.shift(matrix), names, context)
        return copy

    def _copy(self) -> tuple[ir.Model, dict[ir.Value, ir.Value], dict[ir.Node, ir.Node]]:
        copy = self.model.clone()
        copies = dict(zip(values_of(self.model), values_of(copy), strict=True))
        nodes = dict(zip(self.model.graph.all_nodes(), copy.graph.all_nodes(), strict=True))
        return copy, copies, nodes

    @cached_property
    def _means(self) -> dict[Block, np.ndarray]:
        return means_of(self.blocks, self.model, self._apart[0])

    @cached_property
    def block_options(self) -> list[BlockOption]:
        """For each block whose mean is known, what it does to leave it out."""
        found = []
        for block, means in self._means.items():
            self.context.progress(f"looking at block {block.name}")
            copy, copies, _ = self._copy()
            output, branch = copies[block.add.outputs[0]], copies[block.branch]
            drop_branch(copy, output, branch, means, block.axis, self.context)
            if self.refits:
                behind = self._behind(output)
                refit_units(copy, self.model, self._apart[0], Change(), only=behind)
            inner = frozenset(
                number
                for number, group in enumerate(self.groups)
                if all(c.node in block.nodes for c in group.consumers)
                and all(p.node in block.nodes for p in group.producers)
            )
            found.append(BlockOption(block.nodes, inner, self._square(copy)))
        return found

    def _behind(self, output: ir.Value) -> set[ir.Node]:
        """The layers that come next and make good for a branch."""
        add = output.producer()
        assert add is not None and add.graph is not None
        behind = dropwhile(lambda node: node is not add, add.graph)
        return set(islice((node for node in behind if is_onnx(node, *PRODUCTS)), MAKING_GOOD))

    def _square(self, model: ir.Model) -> float:
        """What a model adds to the squared relative L2 error of the outputs, on their mean."""
        samples = min(COMPARED_SAMPLES, RUNS_MAXIMUM // max(len(self.groups) + len(self.blocks), 1))
        samples = max(samples, ALONE_SAMPLES)
        if samples not in self._measured:
            compare = self._apart[1].against(self.model, samples)
            self._measured[samples] = lambda one: mean_square(compare(one))
        return self._measured[samples](model)

    # -------------------------------------------------------------- the choice

    @cached_property
    def choosing(self) -> Choosing:
        """What could be done."""
        costs = Costs(self.groups, self.budget.terms(self.model), self.budget.lanes)
        return Choosing(costs, [one.options for one in self.prunable], self.block_options)

    def chosen(self, share: float) -> Chosen | None:
        """The choice that costs so much of what the model costs at most; None where none does."""
        total, best = self.choosing.costs.total, None
        asked = share * total
        for _ in range(ROUNDS):
            chosen = self.choosing.within(asked)
            seen = self.budget.share(self._without(chosen), self.model)
            if seen <= share:
                better = best is None or self.choosing.square(chosen) < self.choosing.square(best)
                best = chosen if better else best
                if seen >= NEAR * share or asked >= total:
                    break
            elif self.choosing.cost(chosen) > asked:
                # The cheapest that there is.
                self.change.note(f"at least {seen:.1%} have to stay")
                break
            asked = self.choosing.cost(chosen) * share / max(seen, 1e-30)
        return best

    def _without(self, chosen: Chosen) -> ir.Model:
        copy = self.model.clone()
        groups = analyze(copy).all
        numbers = {group: number for number, group in enumerate(self.all_groups)}
        kept = {groups[numbers[g]]: stays for g, stays in self._kept(chosen).items()}
        blocks = [self._dropped_names(number) for number in sorted(chosen.dropped)]
        _remove(copy, kept, blocks, replace(self.context, scratch=None))
        return copy

    def _kept(self, chosen: Chosen) -> dict[Group, np.ndarray]:
        inner = {n for b in chosen.dropped for n in self.block_options[b].inner}
        return {
            one.group: one.curve.kept(count)
            for number, (one, count) in enumerate(zip(self.prunable, chosen.counts, strict=True))
            if count < one.group.units and number not in inner
        }

    def _dropped_names(self, number: int) -> Dropped:
        block, means = list(self._means.items())[number]
        return Dropped(block.add.outputs[0].name or "", block.branch.name or "", means, block.axis)

    # -------------------------------------------------------------- doing it

    def run(self, share: float) -> bool:
        """Prune to a share of what the model costs; False where that cannot be had."""
        chosen = self.chosen(share)
        if chosen is None:
            return False
        kept = self._kept(chosen)
        self._tell(chosen, kept)
        before = self.model.clone()
        masks = masks_of(kept)
        indices: dict[str, dict[int, np.ndarray]] = {}
        for (value, axis), mask in masks.items():
            indices.setdefault(value.name or "", {})[axis] = np.flatnonzero(mask)
        blocks = [self._dropped_names(number) for number in sorted(chosen.dropped)]
        self._fold(kept)
        _remove(self.model, kept, blocks, self.context)
        if self.refits:
            refit_units(self.model, before, self.context.varied(), self.change, indices)
        return True

    def _tell(self, chosen: Chosen, kept: Mapping[Group, np.ndarray]) -> None:
        for group, stays in kept.items():
            self.change.count("unit removed", int((~stays).sum()))
            self.change.note(f"{group.name}: {int(stays.sum())} of {group.units} units stay")
        for number in sorted(chosen.dropped):
            block = list(self._means)[number]
            self.change.count("residual branch removed")
            self.change.note(f"{block.name}: the branch {block.branch.name} is left out")
        error = self.choosing.square(chosen) ** 0.5
        self.change.note(f"relative L2 error before refitting, estimated: {error:.3g}")

    def _fold(self, kept: Mapping[Group, np.ndarray]) -> None:
        """Let weights that are not refitted make good for the units that they lose."""
        gone: dict[Consumer, list[tuple[Group, np.ndarray]]] = {}
        for group, stays in kept.items():
            for consumer in group.consumers:
                if not is_refitted(consumer) and len(consumer.weight.uses()) == 1:
                    gone.setdefault(consumer, []).append((group, stays))
        for batch in batches(list({group for found in gone.values() for group, _ in found})):
            for group, sinks in sinks_of(batch, self.model, self.context).items():
                for sink in sinks:
                    found = gone.get(sink.consumer)
                    if found is None or found[0][0] is not group:
                        continue
                    columns = np.zeros(sink.matrix.shape[2], bool)
                    for other, stays in found:
                        place = other.place(sink.consumer.weight, sink.consumer.axis)
                        taps = columns.size // place.size
                        channels = place.indices[~stays[place.units]]
                        columns[(channels[:, np.newaxis] * taps + np.arange(taps)).ravel()] = True
                    write_sink(sink, sink.consumer, sink.without(columns), self.context)


@dataclass(frozen=True, eq=False)
class Dropped:
    """A residual branch that goes.

    Attributes:
        output: name of the sum.
        branch: name of what is added.
        means: [channels], of the branch, of all its channels.
        axis: of the channels.
    """

    output: str
    branch: str
    means: np.ndarray
    axis: int


def _remove(
    model: ir.Model,
    kept: Mapping[Group, np.ndarray],
    blocks: Sequence[Dropped],
    context: Context,
) -> None:
    """Remove units, then branches."""
    masks = {(v.name, axis): mask for (v, axis), mask in masks_of(kept).items()}
    remove(model, kept, context)
    made = {o.name: o for node in model.graph for o in node.outputs}
    for block in blocks:
        mask = masks.get((block.branch, block.axis))
        means = block.means if mask is None else block.means[mask]
        drop_branch(model, made[block.output], made[block.branch], means, block.axis, context)


def _consumer_in(
    consumer: Consumer, copies: Mapping[ir.Value, ir.Value], nodes: Mapping[ir.Node, ir.Node]
) -> Consumer:
    data = None if consumer.data is None else copies[consumer.data]
    return consumer._replace(node=nodes[consumer.node], weight=copies[consumer.weight], data=data)
