"""Reshapes cut into blocks of axes, and which factor of each block units may be removed from.

A Reshape keeps the order of elements. Where the first dimensions of its input have as many elements
as the first of its output, these are a block for themselves, and so on. In a block, dimensions are
products of common factors: [6, 8] -> [6, 2, 4] has the blocks 6 -> 6 and 8 -> 2 * 4.

What is removed must leave a tensor that has a shape, so within a block indices can be removed along
one factor only, whatever they are along the others: whole heads of [heads * width], or the same
places in each head. All blocks choose at once, so that what one leaves open another does not close.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from graphopt.sizes import Size


@dataclass(frozen=True)
class Factor:
    """A common factor of a dimension of the input and one of the output.

    Attributes:
        size: of the factor.
        input_axis: the number of the axis that it is a factor of.
        output_axis: likewise.
        input_size: of that axis.
        output_size: likewise.
        input_stride: elements of the input axis from one index of the factor to the next.
        output_stride: likewise.
    """

    size: int
    input_axis: int
    output_axis: int
    input_size: int
    output_size: int
    input_stride: int
    output_stride: int

    def input_digits(self) -> np.ndarray:
        """int64 [input_size]: the index of the factor at each index of the input axis."""
        return np.arange(self.input_size) // self.input_stride % self.size

    def output_digits(self) -> np.ndarray:
        """int64 [output_size]: likewise of the output axis."""
        return np.arange(self.output_size) // self.output_stride % self.size


@dataclass(frozen=True)
class Block:
    """Axes that a node splits or merges.

    Attributes:
        name: of the node, for users.
        inputs: numbers of the axes of the input.
        outputs: numbers of the axes of the output.
        factors: of both; empty where they have no common ones.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    factors: tuple[Factor, ...]


Axes = tuple[int, ...]


def cut(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[Axes, Axes]]:
    """The blocks of a Reshape: axes of the input and of the output. Axes of size 1 are in none.

    Args:
        before: the shape of the input, of which sizes that are not known are symbols.
        after: the shape of the output.
    """
    head = _cut_from_start(before, after)
    first, second = (sum(len(block[side]) for block in head) for side in (0, 1))
    rest = _cut_from_start(before[first:][::-1], after[second:][::-1])
    last, last_after = len(before) - 1, len(after) - 1
    tail = [
        (tuple(last - a for a in one[::-1]), tuple(last_after - a for a in other[::-1]))
        for one, other in rest[::-1]
    ]
    blocks = [
        (tuple(i for i in one if before[i] != 1), tuple(i for i in other if after[i] != 1))
        for one, other in (*head, *tail)
    ]
    return [(one, other) for one, other in blocks if one and other]


def _cut_from_start(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[Axes, Axes]]:
    """The blocks up to where sizes are not known to agree."""
    blocks = []
    first, second = 0, 0
    while first < len(before) and second < len(after):
        counts = _block(before[first:], after[second:])
        if counts is None:
            break
        stops = first + counts[0], second + counts[1]
        blocks.append((tuple(range(first, stops[0])), tuple(range(second, stops[1]))))
        first, second = stops
    return blocks


def _block(before: Sequence[Size], after: Sequence[Size]) -> tuple[int, int] | None:
    """How many dimensions of both have, for the first time, one product above 0."""
    if not isinstance(before[0], int) and before[0] == after[0]:
        return 1, 1
    first, second = 1, 1
    products = _known(before[0]), _known(after[0])
    while products[0] != products[1]:
        if products[0] < products[1]:
            if first == len(before) or not _known(before[first]):
                return None
            products = products[0] * _known(before[first]), products[1]
            first += 1
        else:
            if second == len(after) or not _known(after[second]):
                return None
            products = products[0], products[1] * _known(after[second])
            second += 1
    return (first, second) if products[0] else None


def _known(size: Size) -> int:
    return size if isinstance(size, int) else 0


def factors_of(
    inputs: Sequence[int],
    input_sizes: Sequence[int],
    outputs: Sequence[int],
    output_sizes: Sequence[int],
) -> tuple[Factor, ...]:
    """The common factors of a block's axes; () where the dimensions have none.

    Args:
        inputs: numbers of the axes of the input.
        input_sizes: their sizes, all above 1.
        outputs: numbers of the axes of the output.
        output_sizes: their sizes, all above 1.
    """
    below, above = _strides(input_sizes), _strides(output_sizes)
    bounds = sorted({*below, *above})
    if any(larger % smaller for smaller, larger in pairwise(bounds)):
        return ()
    factors = []
    for stride, end in pairwise(bounds):
        # Strides fall from axis to axis; an axis spans from its own to that of the one before it.
        i = next(i for i in range(len(inputs)) if below[i + 1] <= stride < below[i])
        o = next(o for o in range(len(outputs)) if above[o + 1] <= stride < above[o])
        factors.append(
            Factor(
                end // stride,
                inputs[i],
                outputs[o],
                input_sizes[i],
                output_sizes[o],
                stride // below[i + 1],
                stride // above[o + 1],
            )
        )
    return tuple(factors[::-1])


def _strides(sizes: Sequence[int]) -> list[int]:
    """[product of all, ..., product of the last, 1]."""
    strides = [1]
    for size in reversed(sizes):
        strides.append(strides[-1] * size)
    return strides[::-1]


@dataclass
class Choices:
    """What is known of whole axes, by which blocks choose.

    Axes that are one, index by index, are linked. A factor is open where neither of its axes is
    frozen. A block with one open factor takes it, and thereby freezes its other axes; where all
    blocks have more, one takes that factor whose axes make channels and which most blocks can take:
    all four reshapes of an attention can let heads through, and only two the width of a head. Of
    equals it is the largest: the channels of a shuffle rather than its two halves.

    Attributes:
        blocks: those that choose.
    """

    blocks: list[Block] = field(default_factory=list)
    _parents: dict[int, int] = field(default_factory=dict)
    _frozen: dict[int, str] = field(default_factory=dict)
    _alive: set[int] = field(default_factory=set)
    _taken: list[Factor] = field(default_factory=list)

    def link(self, first: int, second: int) -> None:
        """Two axes are one."""
        one, other = self._root(first), self._root(second)
        if one == other:
            return
        self._parents[other] = one
        if other in self._frozen:
            self._frozen.setdefault(one, self._frozen[other])
        if other in self._alive:
            self._alive.add(one)

    def freeze(self, axis: int, reason: str) -> None:
        """Nothing of the axis can be removed."""
        self._frozen.setdefault(self._root(axis), reason)

    def why_closed(self, block: Block) -> str:
        """Why none of the block's factors is open."""
        roots = [root for factor in block.factors for root in self._roots(factor)]
        return next((self._frozen[r] for r in roots if r in self._frozen), "no common factors")

    def enliven(self, axis: int) -> None:
        """A constant makes the channels of the axis."""
        self._alive.add(self._root(axis))

    def resolve(self) -> Iterator[tuple[Block, Factor | None, str]]:
        """Each block, the factor that it takes (None where all are closed), and why no other."""
        waiting = self.blocks
        while waiting:
            ambiguous = []
            for block in waiting:
                open_factors = self._open(block)
                if len(open_factors) > 1:
                    ambiguous.append(block)
                else:
                    yield self._take(block, open_factors[0] if open_factors else None)
            if len(ambiguous) == len(waiting):
                best = self._best(ambiguous)
                ambiguous = [block for block in ambiguous if block not in best]
                for block, factor in best.items():
                    yield self._take(block, factor)
            waiting = ambiguous

    def _root(self, axis: int) -> int:
        while (parent := self._parents.get(axis, axis)) != axis:
            self._parents[axis] = self._parents.get(parent, parent)
            axis = parent
        return axis

    def _open(self, block: Block) -> list[Factor]:
        return [f for f in block.factors if self._frozen.keys().isdisjoint(self._roots(f))]

    def _roots(self, factor: Factor) -> set[int]:
        return {self._root(factor.input_axis), self._root(factor.output_axis)}

    def _best(self, blocks: Sequence[Block]) -> dict[Block, Factor]:
        """The best factor, and those as good that have to do with none of the others' axes."""
        touched: Counter[int] = Counter()
        for factor in self._taken:
            touched.update(self._roots(factor))
        for block in blocks:
            touched.update({root for f in self._open(block) for root in self._roots(f)})
        scores = {}
        for block in blocks:
            for factor in self._open(block):
                roots = self._roots(factor)
                is_alive = not roots.isdisjoint(self._alive)
                scores[block, factor] = is_alive, sum(touched[r] for r in roots), factor.size
        highest = max(scores.values())
        best: dict[Block, Factor] = {}
        taken: set[int] = set()
        for (block, factor), score in scores.items():
            roots = {self._root(axis) for axis in (*block.inputs, *block.outputs)}
            if score == highest and taken.isdisjoint(roots):
                best[block] = factor
                taken |= roots
        return best

    def _take(self, block: Block, factor: Factor | None) -> tuple[Block, Factor | None, str]:
        reason = (
            f"{block.name}: only one of the dimensions that it splits or merges can become smaller"
        )
        if factor is None:
            reason = self.why_closed(block)
        kept = (factor.input_axis, factor.output_axis) if factor is not None else ()
        for axis in (*block.inputs, *block.outputs):
            if axis not in kept:
                self.freeze(axis, reason)
        if factor is not None:
            self.link(*kept)
            self._taken.append(factor)
        return block, factor, reason
