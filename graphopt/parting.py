"""Samples of a search in three parts: to fit by, to search by, and to verify by what was found.

The parts are chosen by a hash of the samples' content: they depend neither on order nor on names,
and the same samples are parted alike in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256

from graphopt.certificate import fewest_items
from graphopt.recording import Feed

FITTED_MAXIMUM, JUDGED_MAXIMUM = 128, 256
"""More to fit by, or to search by, hardly help and take time; verification gets the rest."""

SHARED_BELOW = 12
"""With fewer samples than this, all serve for everything, and nothing can be certified."""

PROOF_SHARE, CHECK_SHARE = 0.5, 0.2
"""To verify by: where that many samples can prove the drop that is asked for, and where not."""

JUDGED_SHARE = 1 / 3
"""Of the others, to search by; and those beyond what is fitted by."""


@dataclass(frozen=True)
class Parts:
    """The three parts.

    Attributes:
        fitted: what passes are given.
        judged: by which candidates are compared.
        searched: both, of which the result is fitted in the end.
        verified: by which the result is proven; never looked at before.
        shared: all parts are the same samples, which are too few.
        capped: as many are fitted by as are of use, or as there is time for.
    """

    fitted: Feed
    judged: Feed
    searched: Feed
    verified: Feed
    shared: bool
    capped: bool = False

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many samples are fitted, searched and verified by."""
        return len(self.fitted.samples), len(self.judged.samples), len(self.verified.samples)


def part(feed: Feed, least_items: int | None, seed: int = 0, share: float = 1.0) -> Parts:
    """Divide samples.

    Args:
        feed: all samples; an item is a sequence of them, which is one where no state is carried.
        least_items: so many items to verify by could prove what is asked for; None if none could.
        seed: of another division of the same samples.
        share: of the most that fit and are searched by: where a sample takes long, for example.
    """
    samples = feed.samples
    count = len(samples.sequences)
    if count < SHARED_BELOW:
        return Parts(feed, feed, feed, feed, shared=True)

    def digest(sequence: int) -> str:
        text = "".join(samples.digests[i] for i in samples.sequences[sequence])
        return sha256(f"{seed} {text}".encode()).hexdigest()

    order = _distinct(range(count), digest)
    count = len(order)
    if count < SHARED_BELOW:
        return Parts(feed, feed, feed, feed, shared=True)
    proves = least_items is not None and PROOF_SHARE * count >= least_items
    verified = round(count * (PROOF_SHARE if proves else CHECK_SHARE))
    rest = count - verified
    fitted_maximum, judged_maximum = (round(share * m) for m in (FITTED_MAXIMUM, JUDGED_MAXIMUM))
    fitted = min(fitted_maximum, rest - round(rest * JUDGED_SHARE))
    judged = min(judged_maximum, rest - fitted)
    # What neither fits nor is searched by verifies.
    searched = fitted + judged

    def chosen(start: int, stop: int) -> Feed:
        return Feed(samples.select(sorted(order[start:stop])), feed.inputs, feed.state)

    return Parts(
        chosen(0, fitted),
        chosen(fitted, searched),
        chosen(0, searched),
        chosen(searched, count),
        shared=False,
        capped=fitted == fitted_maximum,
    )


def _distinct(sequences: Iterable[int], digest: Callable[[int], str]) -> list[int]:
    """One of each that are equal, in the order of their hashes: what was fitted proves nothing."""
    found = {digest(one): one for one in reversed(list(sequences))}
    return [found[key] for key in sorted(found)]


def items_to_prove(limit: float, delta: float, lower: float, upper: float) -> int | None:
    """How many items prove a drop of at most a limit if none got worse; None if no number does.

    Args:
        limit: in the unit of the scores.
        delta: see `graphopt.certificate.fewest_items`.
        lower: likewise.
        upper: likewise.
    """
    if not limit > 0 or not math.isfinite(upper):
        return None
    try:
        return fewest_items(limit, delta, lower, upper)
    except ValueError:
        return None
