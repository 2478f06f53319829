"""Number formats: bit patterns against ml_dtypes and numpy, blocks against their rules."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.quantize.number_formats import (
    BFLOAT16,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0,
    FLOAT16,
    FORMATS,
    INT2,
    INT4,
    INT8,
    LOG2,
    MX_INT8,
    NF4,
    Encoded,
    FloatElement,
    Format,
    IntegerElement,
    encode,
)

ORACLES: dict[FloatElement, type] = {
    FLOAT16: np.float16,
    BFLOAT16: ml_dtypes.bfloat16,
    FLOAT8_E4M3FN: ml_dtypes.float8_e4m3fn,
    FLOAT8_E5M2: ml_dtypes.float8_e5m2,
    FLOAT8_E8M0: ml_dtypes.float8_e8m0fnu,
    FLOAT6_E2M3: ml_dtypes.float6_e2m3fn,
    FLOAT6_E3M2: ml_dtypes.float6_e3m2fn,
    FLOAT4_E2M1: ml_dtypes.float4_e2m1fn,
}
every_float = pytest.mark.parametrize("element", ORACLES, ids=lambda e: e.name)
every_format = pytest.mark.parametrize("name", FORMATS)
MX = {
    "mxfp8": (8, ml_dtypes.float8_e4m3fn),
    "mxfp8e5m2": (15, ml_dtypes.float8_e5m2),
    "mxfp6": (2, ml_dtypes.float6_e2m3fn),
    "mxfp6e3m2": (4, ml_dtypes.float6_e3m2fn),
    "mxfp4": (2, ml_dtypes.float4_e2m1fn),
    "mxint8": (0, None),
}
"""The exponent of the largest power of two in each element (MX v1.0, section 5.3)."""

seeds = st.integers(0, 2**32 - 1)


def patterns(element: FloatElement) -> np.ndarray:
    return np.arange(1 << element.bits, dtype=np.uint8 if element.bits <= 8 else np.uint16)


def read(codes: np.ndarray, oracle: type) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return codes.view(oracle).astype(np.float32)


def write(numbers: np.ndarray, oracle: type) -> np.ndarray:
    """The oracle's bit patterns."""
    with np.errstate(all="ignore"):
        narrow = numbers.astype(oracle)
    return narrow.view(np.uint8 if narrow.itemsize == 1 else np.uint16)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def finite_levels(element: FloatElement) -> np.ndarray:
    """All finite numbers of a format once, ascending, float64."""
    levels = element.decode(patterns(element)).astype(np.float64)
    return np.unique(levels[np.isfinite(levels)])


def halves(element: FloatElement) -> np.ndarray:
    """Exactly halfway between neighbours, and between the largest and what would come next."""
    levels = finite_levels(element)
    halfway = (levels[1:] + levels[:-1]) / 2
    beyond = levels[-1] + (levels[-1] - levels[-2]) / 2
    return np.concatenate([halfway, [beyond, -beyond]])


def hard_numbers(element: FloatElement) -> np.ndarray:
    """Float32 of all exponents, ties, what lies next to ties and levels, and everything special."""
    generator = np.random.default_rng(7)
    anywhere = generator.integers(0, 2**32, 400_000, np.uint32).view(np.float32)
    largest = finite_levels(element)[-1]
    near = generator.uniform(-1.1, 1.1, 100_000).astype(np.float64) * min(largest, 1e38)
    low = generator.standard_normal(100_000) * 2.0 ** (3 - element.bias)
    exact = np.concatenate([halves(element), finite_levels(element)])
    with np.errstate(over="ignore"):
        anchors = exact.astype(np.float32)
    assert (anchors == exact).all() or element is FLOAT8_E8M0
    special = [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3.4028235e38]
    up, down = (np.nextafter(anchors, np.float32(to)) for to in (np.inf, -np.inf))
    parts = [anywhere, near, low, anchors, up, down, np.float32(special)]
    return np.concatenate([part.astype(np.float32) for part in parts])


# ------------------------------------------------------------------ floats


@every_float
def test_every_pattern_is_read_as_the_oracle_reads_it(element: FloatElement) -> None:
    codes = patterns(element)

    ours, theirs = element.decode(codes), read(codes, ORACLES[element])

    missing = np.isnan(theirs)
    assert (np.isnan(ours) == missing).all()
    assert same_bits(ours[~missing], theirs[~missing])
    assert (np.signbit(ours) == np.signbit(theirs))[missing].all() or element.is_scale


@every_float
@pytest.mark.parametrize("saturate", [False, True])
def test_every_pattern_comes_back(element: FloatElement, saturate: bool) -> None:
    codes = patterns(element)
    numbers = element.decode(codes)

    again = element.encode(numbers, saturate)

    kept = np.isfinite(numbers) if saturate else ~np.isnan(numbers)
    assert same_bits(again[kept], codes[kept])
    assert np.isnan(element.decode(again[np.isnan(numbers)])).all()
    wide = element.encode(numbers.astype(np.float64), saturate)
    assert same_bits(wide, again)


@every_float
def test_numbers_are_written_as_the_oracle_writes_them(element: FloatElement) -> None:
    numbers = hard_numbers(element)
    if element.specials == "none":
        numbers = numbers[~np.isnan(numbers)]

    ours, theirs = element.encode(numbers, saturate=False), write(numbers, ORACLES[element])

    # numpy keeps what it can of a NaN's payload; the canonical one is compared bit by bit.
    canonical = ~np.isnan(numbers) | (np.abs(numbers).view(np.uint32) == 0x7FC00000)
    kept = canonical | (element is not FLOAT16)
    assert same_bits(ours[kept], theirs[kept])
    assert np.isnan(element.decode(ours[~kept])).all()
    assert (np.signbit(element.decode(ours)) == np.signbit(numbers)).all() or element.is_scale


@every_float
def test_saturated_numbers_are_those_that_are_clipped_before(element: FloatElement) -> None:
    numbers = hard_numbers(element)
    numbers = numbers[~np.isnan(numbers)]
    largest = np.float32(finite_levels(element)[-1])

    clipped = write(np.clip(numbers, -largest, largest), ORACLES[element])

    assert same_bits(element.encode(numbers), clipped)
    assert element.is_scale or np.isfinite(element.decode(clipped)).all()


def test_what_cannot_be_represented() -> None:
    numbers = np.float32([np.inf, -np.inf, 1e30, -1e30, np.nan, -np.nan])

    def decoded(element: FloatElement, saturate: bool, numbers: np.ndarray = numbers) -> list[str]:
        return [str(n) for n in element.decode(element.encode(numbers, saturate))]

    assert decoded(FLOAT8_E5M2, False) == ["inf", "-inf", "inf", "-inf", "nan", "nan"]
    assert decoded(FLOAT8_E4M3FN, False) == ["nan"] * 6
    assert decoded(FLOAT8_E5M2, True)[:4] == ["57344.0", "-57344.0"] * 2
    assert decoded(FLOAT8_E4M3FN, True) == ["448.0", "-448.0"] * 2 + ["nan"] * 2
    assert decoded(FLOAT4_E2M1, False, numbers[:4]) == ["6.0", "-6.0"] * 2
    assert FLOAT8_E4M3FN.encode(numbers[4:]).tolist() == [0x7F, 0xFF]
    assert FLOAT8_E5M2.encode(numbers[4:]).tolist() == [0x7E, 0xFE]
    assert BFLOAT16.encode(numbers[4:]).tolist() == [0x7FC0, 0xFFC0]
    assert FLOAT8_E8M0.encode(np.float32([0, -0.0, -1, -np.inf, 1])).tolist() == [255] * 4 + [127]


@pytest.mark.parametrize("element", [FLOAT6_E2M3, FLOAT6_E3M2, FLOAT4_E2M1, LOG2, INT4, NF4])
def test_formats_without_nan_refuse_it(element: FloatElement | IntegerElement) -> None:
    with pytest.raises(ValueError, match="no code for NaN"):
        element.encode(np.float32([1.0, np.nan]))


def test_float64_is_rounded_once() -> None:
    numbers = np.concatenate(
        [
            np.random.default_rng(3).integers(0, 2**64, 100_000, np.uint64).view(np.float64),
            np.random.default_rng(4).standard_normal(100_000) * 1e-5,
            halves(FLOAT16),
            np.nextafter(halves(FLOAT16), np.inf),
            np.nextafter(halves(FLOAT16), -np.inf),
        ]
    )
    numbers = numbers[~np.isnan(numbers)]

    assert same_bits(FLOAT16.encode(numbers, saturate=False), write(numbers, np.float16))


@every_float
def test_float64_next_to_a_tie_goes_to_its_side(element: FloatElement) -> None:
    levels = finite_levels(element)
    levels = levels[levels > 0][element.is_scale :]
    halfway = (levels[1:] + levels[:-1]) / 2

    above = element.encode(np.nextafter(halfway, np.inf))
    below = element.encode(np.nextafter(halfway, 0.0))

    assert (element.decode(above) == levels[1:]).all()
    assert (element.decode(below) == levels[:-1]).all()


def test_what_lies_above_the_lowest_scale_is_rounded_up() -> None:
    lowest = 2.0**-127
    numbers = np.float32([1e-45, lowest / 2, lowest, lowest * 1.001, lowest * 1.25, lowest * 2])

    codes = FLOAT8_E8M0.encode(numbers)

    assert codes.tolist() == [0, 0, 0, 1, 1, 1]
    assert same_bits(codes, write(numbers, ml_dtypes.float8_e8m0fnu))


@pytest.mark.parametrize("element", [e for e in ORACLES if not e.is_scale], ids=lambda e: e.name)
def test_errors_are_at_most_half_an_ulp_and_reach_it(element: FloatElement) -> None:
    levels = finite_levels(element)
    positive = levels[levels > 0]
    mantissa = element.mantissa_bits
    normal = positive[positive >= 2.0 ** (1 - element.bias)]
    generator = np.random.default_rng(11)
    numbers = np.exp2(generator.uniform(np.log2(normal[0]), np.log2(normal[-1]), 50_000))
    numbers = np.concatenate([numbers, normal[:-1] + np.diff(normal) / 2])
    small = generator.uniform(0, normal[0], 50_000)

    errors = np.abs(element.decode(element.encode(numbers)) - numbers) / numbers
    low_errors = np.abs(element.decode(element.encode(small)) - small)

    # The relative error is worst at the tie above a power of two.
    half_ulp = 2.0 ** -(mantissa + 1)
    assert errors.max() == half_ulp / (1 + half_ulp)
    assert 0.99 * positive[0] / 2 < low_errors.max() <= positive[0] / 2


@settings(deadline=None)
@given(st.sampled_from(list(ORACLES)), st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_encoding_keeps_order_and_mirrors_signs(element: FloatElement, some: list[float]) -> None:
    numbers = np.sort(np.abs(np.float32(some))) + np.float32(2.0**-149)

    decoded = element.decode(element.encode(numbers))

    assert (np.diff(decoded) >= 0).all()
    if not element.is_scale:
        assert same_bits(element.decode(element.encode(-numbers)), -decoded)


# ------------------------------------------------------------------ integers, powers of two, tables


@pytest.mark.parametrize(
    ("element", "oracle"),
    [(INT8, np.int8), (INT4, ml_dtypes.int4), (INT2, ml_dtypes.int2)],
    ids=["int8", "int4", "int2"],
)
def test_integers(element: IntegerElement, oracle: type) -> None:
    high = 2 ** (element.bits - 1) - 1
    steps = np.arange(-4 * high - 8, 4 * high + 9, dtype=np.float32) / 4
    numbers = np.concatenate([steps, np.float32([np.inf, -np.inf, 1e30])])

    codes = element.encode(numbers)

    expected = np.clip(np.rint(numbers), -high, high)
    assert codes.dtype == np.uint8
    assert (element.codebook[codes] == expected).all()
    assert (codes.max() < 2**element.bits) and (1 << (element.bits - 1)) not in codes
    mask = np.uint8(2**element.bits - 1)
    assert same_bits(codes, expected.astype(np.int8).astype(oracle).view(np.uint8) & mask)


def test_integers_of_mx_are_sixty_fourths() -> None:
    numbers = np.float32([0, 1, 1 / 64, -1 / 64, 1 / 128, 3 / 128, 1.99, -2, 5])

    codes = MX_INT8.encode(numbers)

    assert codes.tolist() == [0, 64, 1, 255, 0, 2, 127, 129, 127]
    assert MX_INT8.codebook[codes].tolist()[6:] == [127 / 64, -127 / 64, 127 / 64]


def test_powers_of_two() -> None:
    powers = [2.0**e for e in range(-6, 1)]

    assert LOG2.codebook.tolist() == [0.0, *powers, -0.0, *(-p for p in powers)]
    numbers = np.float32([0, 2**-7, 0.0079, 0.74, 0.75, 0.76, -0.38, 1, 9])
    decoded = LOG2.codebook[LOG2.encode(numbers)]
    assert decoded.tolist() == [0, 0, 2**-6, 0.5, 1, 1, -0.5, 1, 1]


def test_normal_levels_are_those_published() -> None:
    published = [
        *(-1.0, -0.6961928, -0.52507305, -0.39491748, -0.28444138, -0.18477343, -0.09105003, 0.0),
        *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
    ]

    assert np.abs(NF4.codebook - published).max() < 5e-7
    assert (NF4.bits, NF4.codebook[7]) == (4, 0.0)


def test_levels_of_a_table_are_the_nearest() -> None:
    numbers = np.random.default_rng(5).uniform(-1.2, 1.2, 20_000).astype(np.float32)

    distances = np.abs(numbers[:, None].astype(np.float64) - NF4.codebook)

    assert (NF4.encode(numbers) == distances.argmin(axis=1)).all()
    assert (NF4.encode(NF4.codebook) == np.arange(16)).all()


# ------------------------------------------------------------------ weights


def weight_of(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Heavy-tailed, with a range of magnitudes along the last axis, and some zeros."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(3, shape) * np.exp2(generator.integers(-20, 20, shape[-1:]))
    weight[generator.random(shape) < 0.05] = 0.0
    return weight.astype(np.float32)


def steps_of(encoded: Encoded) -> np.ndarray:
    """The scale of each number, spread by repetition, float64."""
    steps = encoded.scales.astype(np.float64)
    for axis, (length, count) in enumerate(
        zip(encoded.codes.shape, encoded.scales.shape, strict=True)
    ):
        assert length % count == 0
        steps = steps.repeat(length // count, axis)
    return steps if encoded.factor is None else steps * np.float64(encoded.factor)


def test_the_formats() -> None:
    assert {name: (f.bits, f.block, f.scale) for name, f in FORMATS.items()} == {
        "float8e4m3fn": (8, None, "float32"),
        "float8e5m2": (8, None, "float32"),
        "mxfp8": (8, 32, "e8m0"),
        "mxfp8e5m2": (8, 32, "e8m0"),
        "mxfp6": (6, 32, "e8m0"),
        "mxfp6e3m2": (6, 32, "e8m0"),
        "mxfp4": (4, 32, "e8m0"),
        "mxint8": (8, 32, "e8m0"),
        "nvfp4": (4, 16, "e4m3"),
        "nf4": (4, 64, "float32"),
        "log2": (4, None, "float32"),
        "int8": (8, None, "float32"),
        "int4": (4, 32, "float32"),
        "int2": (2, 32, "float32"),
    }


@every_format
def test_codebooks_are_finite_and_in_the_order_of_the_codes(name: str) -> None:
    format = FORMATS[name]
    codebook = format.codebook

    assert (codebook.shape, codebook.dtype) == ((2**format.bits,), np.float32)
    assert np.isfinite(codebook).all()
    if isinstance(format.element, FloatElement):
        decoded = format.element.decode(np.arange(2**format.bits))
        real = np.isfinite(decoded)
        assert same_bits(codebook[real], decoded[real])
        assert (np.abs(codebook[~real]) == codebook.max()).all()


@every_format
@settings(deadline=None, max_examples=20)
@given(seed=seeds, axis=st.integers(-2, 1))
def test_each_number_is_at_the_nearest_level(name: str, seed: int, axis: int) -> None:
    weight = weight_of(seed, (64, 128))

    encoded = encode(weight, FORMATS[name], axis)

    assert (encoded.codes.dtype, encoded.codes.shape) == (np.uint8, weight.shape)
    assert encoded.scales.ndim == 2 and (encoded.scales.astype(np.float32) > 0).all()
    assert encoded.codes.max() < len(encoded.codebook)
    steps = steps_of(encoded)
    errors = np.abs(encoded.codebook[encoded.codes] * steps - weight) / steps
    used = encoded.codebook[encoded.codebook >= -encoded.codebook.max()]
    distances = np.abs(used - (weight / steps)[..., None]).min(axis=-1)
    # The quotient is a float32: what lies that close to a tie may go to either side.
    assert (errors <= distances + 2.0**-22 * encoded.codebook.max()).all()


@every_format
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_numbers_are_codebook_times_scales(name: str, seed: int) -> None:
    weight = weight_of(seed, (3, 64, 2))

    encoded = encode(weight, FORMATS[name], 1)

    # The product with a scale is exact in float64, and so is rounded once, or twice with a factor.
    products = encoded.codebook[encoded.codes] * steps_of(replace(encoded, factor=None))
    expected = products.astype(np.float32)
    if encoded.factor is not None:
        expected *= encoded.factor
    assert same_bits(encoded.numbers(), expected)


@every_format
def test_codes_that_stand_for_nan_or_infinity_are_never_produced(name: str) -> None:
    magnitudes = np.exp2(np.random.default_rng(1).uniform(-149, 128, (256, 64)))
    weight = np.minimum(magnitudes, 3.4028235e38).astype(np.float32)
    weight[::2] *= -1
    weight[0, :3] = [3.4028235e38, -3.4028235e38, np.nextafter(np.float32(3.4028235e38), 0)]
    weight[1] = 3.4028235e38
    weight[2] = 1e-45
    format = FORMATS[name]

    with np.errstate(over="raise", invalid="raise", divide="raise"):
        encoded = encode(weight, format, 1)
        numbers = encoded.numbers()

    assert np.isfinite(numbers).all()
    assert np.isfinite(encoded.scales.astype(np.float32)).all()
    if isinstance(format.element, FloatElement):
        assert np.isfinite(format.element.decode(encoded.codes)).all()


@pytest.mark.parametrize("name", ["float8e4m3fn", "float8e5m2", "nf4", "log2", "int8", "int4"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_float32_scales_take_the_largest_magnitude_to_the_largest_level(
    name: str, seed: int
) -> None:
    weight = weight_of(seed, (8, 64))
    format = replace(FORMATS[name], block=16)

    encoded = encode(weight, format, 1)

    largest = np.abs(weight).reshape(8, 4, 16).max(axis=2)
    assert encoded.scales.dtype == np.float32
    expected = np.where(largest > 0, largest / format.codebook.max(), np.float32(1))
    assert same_bits(encoded.scales, expected)
    reached = np.abs(encoded.codebook[encoded.codes]).reshape(8, 4, 16).max(axis=2)
    assert (reached[largest > 0] == format.codebook.max()).all()


# ------------------------------------------------------------------ MX


def floor_log2(number: float) -> int:
    """By comparison of exact fractions."""
    exponent = -200
    while Fraction(2) ** (exponent + 1) <= Fraction(number):
        exponent += 1
    return exponent


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize(
    "largest",
    [
        *(1.0, 0.99999994, 1.0000001, 1.9999999, 2.0, 1.5, 3.0, 448.0, 6.0, 7.9999995),
        *(2.0**-126, 2.0**-127, 2.0**-149, 1e-41, 2.0**-119, 2.0**-118, 1.1754942e-38),
        *(2.0**127, 3.4028235e38, 1.7014117e38),
    ],
)
def test_shared_scales_follow_the_specification(name: str, largest: float) -> None:
    emax, _ = MX[name]
    weight = np.zeros((1, 64), np.float32)
    weight[0, 5], weight[0, 40] = -largest, 1.0
    weight[0, 20] = largest / 3

    scales = encode(weight, FORMATS[name], 1).scales

    assert scales.dtype == ml_dtypes.float8_e8m0fnu
    exponent = max(floor_log2(float(np.float32(largest))) - emax, -127)
    assert scales.astype(np.float64).tolist() == [[2.0**exponent, 2.0**-emax]]


@pytest.mark.parametrize("name", MX)
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_mx_elements_are_rounded_to_even_and_saturate(name: str, seed: int) -> None:
    _, oracle = MX[name]
    weight = weight_of(seed, (4, 96))
    format = FORMATS[name]

    encoded = encode(weight, format, 1)

    quotients = (weight / steps_of(encoded)).astype(np.float32)
    highest = format.codebook.max()
    if oracle is None:
        assert (
            MX_INT8.codebook[encoded.codes] * 64 == np.clip(np.rint(quotients * 64), -127, 127)
        ).all()
    else:
        assert same_bits(encoded.codes, write(np.clip(quotients, -highest, highest), oracle))
    again = encode(encoded.numbers(), format, 1)
    assert same_bits(again.codes, encoded.codes) or (again.numbers() == encoded.numbers()).all()
    assert same_bits(again.scales.view(np.uint8), encoded.scales.view(np.uint8))


def test_an_mx_block_by_hand() -> None:
    weight = np.zeros((32, 1), np.float32)
    weight[:6, 0] = [5.0, -0.25, 0.75, 7.0, -1.75, 2.5]

    encoded = encode(weight, FORMATS["mxfp4"], 0)

    # The largest is in [4, 8), and so is the largest of E2M1: a scale of 1; 7 saturates.
    assert encoded.scales.astype(np.float32).tolist() == [[1.0]]
    assert encoded.codes[:6, 0].tolist() == [0b0110, 0b1000, 0b0010, 0b0111, 0b1100, 0b0100]
    assert encoded.numbers()[:6, 0].tolist() == [4.0, 0.0, 1.0, 6.0, -2.0, 2.0]


@every_format
def test_blocks_of_zeros(name: str) -> None:
    format = FORMATS[name]
    encoded = encode(np.zeros((2, 64), np.float32), format, 1)

    assert not encoded.numbers().any()
    assert (encoded.codes == (7 if name == "nf4" else 0)).all()
    scale = {"float32": 1.0, "e8m0": 2.0**-127, "e4m3": 2.0**-9}[format.scale]
    assert (encoded.scales.astype(np.float64) == scale).all()
    assert encoded.factor == (1 if name == "nvfp4" else None)


# ------------------------------------------------------------------ NVFP4


@settings(deadline=None)
@given(seed=seeds)
def test_nvfp4_has_a_scale_for_the_tensor_and_for_each_block(seed: int) -> None:
    weight = weight_of(seed, (4, 48))

    encoded = encode(weight, FORMATS["nvfp4"], 1)

    factor = np.float32(np.abs(weight).max() / np.float32(6 * 448))
    assert encoded.factor == factor and isinstance(encoded.factor, np.float32)
    assert (encoded.scales.dtype, encoded.scales.shape) == (ml_dtypes.float8_e4m3fn, (4, 3))
    for row in range(4):
        for block in range(3):
            numbers = weight[row, 16 * block : 16 * block + 16]
            share = max(float(np.abs(numbers).max()) / (6 * float(factor)), 2.0**-9)
            # Ours is rounded once; the oracle, of float64, goes by way of float32.
            scale = np.float32(share).astype(ml_dtypes.float8_e4m3fn)
            assert encoded.scales[row, block] == scale
            quotients = numbers / (np.float32(scale) * factor)
            codes = write(np.clip(quotients, -6, 6), ml_dtypes.float4_e2m1fn)
            assert same_bits(encoded.codes[row, 16 * block : 16 * block + 16], codes)
    assert encoded.scales.astype(np.float32).max() == 448


def test_nvfp4_blocks_that_are_small_beside_the_largest() -> None:
    weight = np.ones((1, 48), np.float32)
    weight[0, :16] *= 6 * 448
    weight[0, 16:32] *= 2.0**-9
    weight[0, 32:] *= 2.0**-11

    encoded = encode(weight, FORMATS["nvfp4"], 1)

    # The tensor's scale is 1, and no block's is less than 2^-9.
    assert encoded.scales.astype(np.float32).tolist() == [[448.0, 2.0**-9, 2.0**-9]]
    assert encoded.numbers()[0, ::16].tolist() == [6 * 448.0, 2.0**-9, 0.0]


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("shape", "axis", "block", "scales"),
    [
        ((8, 64), 1, 32, (8, 2)),
        ((8, 64), -2, 32, (1, 64)),
        ((64, 8), 0, 16, (4, 8)),
        ((8, 64), 1, None, (8, 1)),
        ((8, 24), 1, 32, (8, 1)),
        ((8, 48), 1, 32, (8, 3)),
        ((8, 100), 1, 32, (8, 25)),
        ((2, 33), 1, 32, (2, 33)),
        ((8, 96), 1, 48, (8, 2)),
        ((8, 104), 1, 48, (8, 13)),
        ((8, 64), 1, 48, (8, 2)),
        ((64,), 0, 32, (2,)),
        ((8, 64, 3, 3), (1, 2, 3), None, (8, 1, 1, 1)),
        ((8, 64, 3, 3), (1, 2, 3), 32, (8, 2, 3, 3)),
        ((8, 3, 3, 3), (1, 2, 3), 32, (8, 1, 1, 1)),
        ((8, 16, 4, 4), (1, 2, 3), 64, (8, 1, 1, 4)),
        ((8, 16, 3, 3), (1, 2, 3), 32, (8, 1, 3, 3)),
        ((8, 64), (1, 1, -1), None, (8, 1)),
        ((8, 64), (), None, (8, 64)),
        ((0, 64), 1, 32, (0, 2)),
        ((8, 0), 1, 32, (8, 0)),
    ],
)
def test_blocks(
    shape: tuple[int, ...],
    axis: int | tuple[int, ...],
    block: int | None,
    scales: tuple[int, ...],
) -> None:
    for name in ("int4", "mxfp4", "nvfp4"):
        encoded = encode(np.ones(shape, np.float32), replace(FORMATS[name], block=block), axis)

        assert encoded.scales.shape == scales
        assert encoded.numbers().shape == shape
        assert (np.abs(encoded.numbers() - 1) <= 2.0**-22).all()


def test_scales_are_normal_numbers_however_small_the_weights() -> None:
    weight = np.float32([[1e-45, 2e-45], [3e-38, 1e-40], [127 * 2.0**-125, 2.0**-125]])

    encoded = encode(weight, FORMATS["int8"], 1)

    # 2e-45 / 127 is no float32 at all; with any scale, such numbers are zero.
    assert encoded.scales.tolist() == [[1.0], [2.0**-126], [2.0**-125]]
    assert encoded.codes.tolist() == [[0, 0], [3, 0], [127, 1]]


def test_a_block_is_encoded_as_it_would_be_alone() -> None:
    weight = weight_of(9, (4, 6, 64))
    format = FORMATS["mxfp6"]

    whole = encode(weight, format, 2)
    alone = [encode(weight[2, 3, start : start + 32], format, 0) for start in (0, 32)]
    turned = encode(np.moveaxis(weight, 2, 0), format, 0)

    assert same_bits(whole.codes[2, 3], np.concatenate([part.codes for part in alone]))
    assert (whole.scales[2, 3] == np.concatenate([part.scales for part in alone])).all()
    assert (np.moveaxis(turned.codes, 0, 2) == whole.codes).all()
    assert (np.moveaxis(turned.numbers(), 0, 2) == whole.numbers()).all()


def test_weights_of_other_types() -> None:
    weight = weight_of(2, (4, 64))
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = np.clip(weight, -6e4, 6e4).astype(dtype)
        for format in (FORMATS["mxfp8"], FORMATS["int8"]):
            ours = encode(narrow, format, 1)
            assert same_bits(ours.codes, encode(narrow.astype(np.float32), format, 1).codes)


def test_the_weight_stays_as_it_is() -> None:
    weight = weight_of(2, (4, 64))
    before = weight.copy()
    weight.flags.writeable = False

    for format in FORMATS.values():
        encode(weight, format, 1).numbers()

    assert same_bits(weight, before)


@every_format
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e39])
def test_weights_that_are_not_finite_are_refused(name: str, number: float) -> None:
    weight = np.ones((2, 64))
    weight[1, 3] = number

    with pytest.raises(ValueError, match="must be finite"):
        encode(weight, FORMATS[name], 1)


@pytest.mark.parametrize(("shape", "axis"), [((2, 64), 2), ((2, 64), (0, -3)), ((), 0)])
def test_axes_that_a_weight_has_not_are_refused(
    shape: tuple[int, ...], axis: int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="has no axis"):
        encode(np.ones(shape, np.float32), FORMATS["mxfp4"], axis)


def test_formats_are_values() -> None:
    assert replace(FORMATS["int4"], block=32) == FORMATS["int4"]
    assert Format("int4", IntegerElement(4), block=32) == FORMATS["int4"]


@every_format
def test_memory_is_a_small_multiple_of_the_weight(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 4096)).astype(np.float32)

    tracemalloc.start()
    encode(weight, FORMATS[name], 1).numbers()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 7 * weight.nbytes
