"""What layers can have together, foretold by what each was seen to do alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphopt.allocation import front
from graphopt.growth import Growth
from graphopt.probing import Probe

OPTIONS = {"256": (0.25, 1e-6), "16": (0.125, 1e-3), "6": (0.08, 1e-2)}
"""The share of bytes and the divergence of each option, but for a factor of the layer."""


def grown(seed: int = 0, limit: float = 1.0) -> Growth:
    rng = np.random.default_rng(seed)
    probes = []
    for number in range(5):
        name = f"w{number}"
        size = int(rng.integers(1000, 100_000))
        factor = rng.exponential()
        for option, (share, divergence) in OPTIONS.items():
            saved, loss = round(size * (1 - share)), 20 * factor * divergence
            probes.append(Probe("clusters", name, "Conv", option, saved, factor * divergence, loss))
    return Growth(1_000_000, probes, limit)


def seen_at(*points: tuple[float, float]) -> Growth:
    """After points that are expected to diverge by so much were found to lose so many points."""
    probes = [
        Probe("clusters", f"w{number}", "Conv", "6", 1000, divergence, 20 * divergence)
        for number, (divergence, _) in enumerate(points)
    ]
    growth = Growth(1_000_000, probes, 1.0)
    for number, (_, drop) in enumerate(points):
        growth.learn({f"w{number}": "clusters 6"}, drop)
    return growth


@pytest.mark.parametrize("seed", range(5))
def test_more_divergence_never_takes_more_bytes(seed: int) -> None:
    growth = grown(seed)

    found = [growth.smallest(at) for at in np.geomspace(1e-8, 1, 40)]

    sizes = [growth.stored_bytes(at) for at in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    for limit, at in zip(np.geomspace(1e-8, 1, 40), found, strict=True):
        assert growth.divergence(at) <= limit or growth.options(at) == {}


@pytest.mark.parametrize("seed", range(5))
def test_the_front_falls_from_what_there_is_to_the_smallest(seed: int) -> None:
    growth = grown(seed)

    points = front(growth.choices)

    sizes = [growth.stored_bytes(at) for at in points]
    divergences = [growth.divergence(at) for at in points]
    assert sizes == sorted(sizes, reverse=True)
    assert divergences == sorted(divergences)
    assert growth.options(points[0]) == {}
    assert set(growth.options(points[-1]).values()) == {"clusters 6"}


def test_what_layers_share_is_worth_it_for_several_of_them_only() -> None:
    def probes(*few: str) -> list[Probe]:
        """Of 6 clusters each saves 50 bytes more than of 16, and the table of each takes 120."""
        return [
            Probe("clusters", layer, "Conv", option, saved - 120, square, 0.1, None, saved)
            for layer in few
            for option, saved, square in (("16", 1000, 0.0), ("6", 1050, float(layer == "bad")))
        ]

    few = Growth(10_000, probes("bad", "a"), 1.0)
    many = Growth(10_000, probes("bad", "a", "b", "c", "d"), 1.0)

    assert set(few.options(few.smallest(0.5)).values()) == {"clusters 16"}
    assert few.stored_bytes(few.smallest(0.5)) == 10_000 - 2000 + 120
    chosen = many.options(many.smallest(0.5))
    assert chosen.pop("bad") == "clusters 16"
    assert set(chosen.values()) == {"clusters 6"}


def test_the_first_aims_are_what_the_probes_say_of_the_limit() -> None:
    growth = grown()

    aim, nearer = growth.aims(0.9)

    assert growth.per_divergence == pytest.approx(20)
    assert aim == pytest.approx(0.9 / 20)
    assert nearer < aim


def test_aims_lie_between_what_was_within_the_limit_and_what_was_not() -> None:
    first, second = seen_at((0.01, 0.5), (0.03, 1.5)).aims(0.9)

    assert 0.01 < first < second < 0.03
    nearer = seen_at((0.01, 0.5), (0.03, 1.5), (first, 0.9), (second, 1.1)).aims(0.9)
    assert first < nearer[0] < nearer[1] < second


def test_aims_go_on_where_only_one_side_was_seen() -> None:
    below, above = seen_at((0.01, 0.1)), seen_at((0.01, 3.0))

    assert min(below.aims(0.9)) > 0.01 > max(above.aims(0.9)) > 0


@pytest.mark.parametrize(
    ("drop", "last"), [(0.3, 0.03), (0.8, 0.015), (0.0, 0.16), (-0.2, 0.16), (3.6, 0.0025)]
)
def test_aims_go_as_far_as_the_drop_that_was_seen_lets_expect(drop: float, last: float) -> None:
    """But not by less than half as much again, nor by more than sixteen times."""
    first, second = seen_at((0.01, drop)).aims(0.9)

    assert second == pytest.approx(last)
    assert first == pytest.approx(math.sqrt(0.01 * last))


def test_what_is_told_of_one_point_is_told_of_all_by_their_divergence() -> None:
    growth = seen_at((0.01, 0.2), (0.02, 0.5), (0.03, 0.6), (0.04, 5.0))

    growth.reject({"w2": "clusters 6"}, 1.8)

    drops = [growth.drop_of({f"w{number}": "clusters 6"}) for number in range(4)]
    assert drops == pytest.approx([0.6, 1.2, 1.8, 5.0])
    assert all(0.01 < aim < 0.02 for aim in growth.aims(0.9))
    growth.reject({"w0": "clusters 6"}, 0.4)
    assert growth.drop_of({"w1": "clusters 6"}) == pytest.approx(1.2)


def test_what_was_within_beyond_what_was_not_does_not_count() -> None:
    """A luck of few samples: a bolder point that loses less than a milder one."""
    growth = seen_at((0.01, 0.2), (0.02, 2.0), (0.04, 0.3))

    assert all(0.01 < aim < 0.02 for aim in growth.aims(0.9))


def test_a_bolder_point_is_not_taken_to_lose_less_than_a_milder_one() -> None:
    growth = seen_at((0.01, 0.2), (0.02, 2.0), (0.04, 0.3), (0.08, 5.0))

    drops = [growth.drop_of({f"w{number}": "clusters 6"}) for number in range(4)]

    assert drops == pytest.approx([0.2, 1.15, 1.15, 5.0])


@pytest.mark.parametrize("drop", [math.nan, math.inf])
def test_what_cannot_be_compared_is_over_any_limit(drop: float) -> None:
    growth = seen_at((0.01, 0.2), (0.02, drop))

    assert growth.drop_of({"w0": "clusters 6"}) == pytest.approx(0.2)
    assert growth.drop_of({"w1": "clusters 6"}) > 1e6
    assert all(0.01 < aim < 0.02 for aim in growth.aims(0.9))


def test_what_was_built_corrects_what_was_expected() -> None:
    assert seen_at((0.05, 3.0)).per_divergence == pytest.approx(3.0 / 0.05)


def test_a_point_is_expected_to_diverge_by_what_its_layers_are_to_blame_for() -> None:
    growth = seen_at((0.05, 3.0), (0.01, 0.1))

    growth.blame("w0", "clusters 6", 0.1)

    assert growth.expected({"w0": "clusters 6", "w1": "clusters 6"}) == pytest.approx(0.11)


def test_a_layer_that_is_to_blame_gets_less() -> None:
    growth = grown()
    at = growth.smallest(0.005)
    chosen = growth.options(at)
    worst = growth.suspects(chosen, 1)[0]

    growth.blame(worst, chosen[worst], 1.0)

    assert growth.options(growth.smallest(0.005)).get(worst) != chosen[worst]
    assert growth.divergence(at) >= 1.0


@pytest.mark.parametrize("divergence", [math.nan, -1.0, 0.0])
def test_where_nothing_is_seen_nobody_is_to_blame(divergence: float) -> None:
    growth = grown()
    before = growth.choices

    growth.blame("w1", "clusters 16", divergence)

    assert growth.choices == before


def test_a_layer_that_makes_outputs_infinite_is_not_taken_again() -> None:
    growth = grown()

    growth.blame("w1", "clusters 6", math.inf)

    assert "w1" not in growth.options(growth.smallest(100.0))
    assert not any(math.isnan(choice.square) for of in growth.choices for choice in of)


def test_options_that_cannot_be_had_or_save_nothing_are_left_out() -> None:
    def found(**changed: object) -> list[object]:
        content = {"saved_bytes": 10, "divergence": 0.1, "loss": 0.1, **changed}
        probes = [Probe("clusters", "w", "Conv", "6", **content)]  # type: ignore[arg-type]
        return list(Growth(1000, probes, 1.0).choices)

    assert len(found()) == 1
    assert found(saved_bytes=-1) == []
    assert found(reason="no") == []
    assert found(divergence=math.inf) == found(divergence=math.nan) == []
    assert len(found(saved_bytes=-1, joint_saved_bytes=20)) == 1
    assert found(joint_saved_bytes=0) == []


def test_without_layers_there_is_nothing_to_choose() -> None:
    growth = Growth(1000, [], 1.0)

    assert growth.choices == []
    assert growth.smallest(1.0) == []
    assert growth.stored_bytes([]) == 1000
    assert growth.passes_of({}) == ""


def test_passes_are_one_for_each_treatment() -> None:
    text = grown().passes_of({"a,b": "clusters 6", "c": "clusters 16", "d": "bits 4"})

    assert text == 'cluster-weights{each=("a,b:6",c:16)}'
    probes = [Probe(name, "w", "Conv", "6", 1, 0.0, 0.0) for name in ("clusters", "bits")]
    both = Growth(1000, probes, 1.0).passes_of({"c": "clusters 16", "d": "bits 4"})
    assert both == "cluster-weights{each=(c:16)},quantize-weights{block=32,each=(d:4)}"
