"""The scenarios that come with graphopt."""

from __future__ import annotations

from graphopt.scenarios import Scenario, Trunk
from graphopt_passes.recipes import READY, TIDY

_SMALL = "drop-metadata,shorten-names,pack-constants{weights=false}"
"""Names and shapes are a tenth of a small model; before layers are named."""

_REST = "convert-numbers{weights-only=true},shorten-names"
"""What was too small for codes, biases above all, is a tenth of what codes leave; and they are new
values, where treated layers have their means corrected."""

_FITTED_SAMPLES = 100
"""By fewer, a layer is refitted to what few inputs have in common: a quarter of a model of digits,
fitted by 34 images, seemed to lose nothing, and lost 6 points on others."""


def _int8(price: float, error: float = 1.0) -> str:
    """8-bit integers where they are faster, whatever they cost; or within an error."""
    static = f"quantize-static{{error={error:g},price={price}}}"
    return f"{READY},{static},quantize-dynamic,{TIDY}"


_GENTLE = (
    Trunk("int8, but offenders", f"{_int8(0.2, 0.1)},{_SMALL}", unless="int8"),
    Trunk("int8 in part", f"{_int8(0.2, 0.035)},{_SMALL}", unless="int8, but offenders"),
)
"""Where all that is faster on integers costs too much, layers that cost most of it stay float."""


def _fewer(name: str, budget: str, then: str, after: str) -> Trunk:
    """Fewer channels, heads and hidden units, and what is done to the rest of them."""
    passes = f"prune-structures{{{budget}}},{then}"
    return Trunk(name, passes, after=after, least_samples=_FITTED_SAMPLES)


_FAST = f"{_int8(0.02)},{_SMALL}"

EDGE = Scenario(
    summary="the smallest file; float kernels, or integer ones where they cost no bytes",
    objective="size",
    provider="cpu",
    trunks=(
        Trunk("float", _SMALL),
        Trunk("int8", f"{_int8(0.2)},{_SMALL}"),
        *_GENTLE,
        _fewer("three quarters", "parameters=0.75", _SMALL, after="float"),
        _fewer("half", "parameters=0.5", _SMALL, after="three quarters"),
        _fewer("a quarter", "parameters=0.25", _SMALL, after="half"),
    ),
    treatments=("clusters",),
    finish=_REST,
)

SERVER_CPU = Scenario(
    summary="the lowest latency on the CPU: integer kernels, fewer channels",
    objective="latency",
    provider="cpu",
    trunks=(
        Trunk("float", _SMALL),
        Trunk("int8", f"{_int8(0.2)},{_SMALL}"),
        *_GENTLE,
        Trunk("int8, faster", _FAST, after="int8"),
        Trunk("int8, price 0.07", f"{_int8(0.07)},{_SMALL}", "int8", unless="int8, faster"),
        Trunk("int8, price 0.12", f"{_int8(0.12)},{_SMALL}", "int8", unless="int8, price 0.07"),
        Trunk("int8, price 0.16", f"{_int8(0.16)},{_SMALL}", "int8", unless="int8, price 0.12"),
        _fewer("int8, 0.8 of the work", "macs=0.8", _FAST, after="int8"),
        _fewer("int8, 0.65 of the work", "macs=0.65", _FAST, after="int8, 0.8 of the work"),
        _fewer("int8, half of the work", "macs=0.5", _FAST, after="int8, 0.65 of the work"),
    ),
    treatments=("clusters",),
    finish=_REST,
)

_HALVES = "convert-numbers{format=float16}"

SERVER_GPU = Scenario(
    summary="the lowest latency on a GPU: float16, fewer channels",
    objective="latency",
    provider="cuda",
    trunks=(
        Trunk("float", ""),
        Trunk("float16", _HALVES),
        _fewer("float16, 0.8 of the work", "macs=0.8", _HALVES, after="float16"),
        _fewer("float16, 0.65 of it", "macs=0.65", _HALVES, after="float16, 0.8 of the work"),
    ),
    treatments=(),
)

LLM_DECODE = Scenario(
    summary="a token at a time: weights that stay narrow in memory, activations as they are",
    objective="memory",
    provider="cpu",
    trunks=(Trunk("float", f"raise-opset{{opset=21}},{_SMALL}"),),
    treatments=("kernel-bits",),
)
