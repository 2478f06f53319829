"""The recipes that come with graphopt."""

from __future__ import annotations

from graphopt.recipes import Recipe

BASIC = Recipe(
    summary="lossless: fewer nodes and bytes, the same outputs, standard operators only",
    passes=",".join(
        (
            "inline-functions,raise-opset,lift-constants,drop-unused,drop-defaults,drop-identity",
            "fold-shapes,fold-constants,inline-branches,merge-common-subexpressions",
            "merge-transposes,merge-reshapes",
            # Before anything takes their numbers apart.
            "fuse-layer-normalization,fuse-rms-normalization,fuse-gelu,fuse-hard-swish,fuse-relu",
            "fuse-softmax,fuse-attention",
            "absorb-unsqueezes,merge-shuffles,merge-slices,merge-concats,merge-pads,merge-expands",
            "merge-casts,merge-clips,simplify-logic,simplify-signs,merge-reductions",
            "fuse-pad,drop-zero-bias,fuse-batchnorm,fuse-scale,fuse-bias,fuse-gemm",
            # After the fusions, which leave a shared weight alone.
            "merge-duplicates,merge-views",
            # After those: of a constant that stays for others, it makes no second one.
            "merge-arithmetic,drop-unused",
        )
    ),
    repeat=True,
)

TRANSFORMERS = Recipe(
    summary=(
        "basic, then fusions into onnxruntime's own operators (com.microsoft): the result runs on "
        "onnxruntime only"
    ),
    # Before basic's own fusions, which leave nothing of the graphs that these look for.
    passes=(
        "inline-functions,raise-opset,lift-constants,drop-identity,fold-constants,"
        f"fuse-transformers,{BASIC.passes}"
    ),
    repeat=True,
)

# Before codes, which another order of summation would change.
READY = "widen-halves,pool-means,flatten-convs,merge-reshapes,fuse-transpose,pad-channels"
# Reshapes around folded columns; zero points that are the same in many layers.
TIDY = "merge-transposes,merge-reshapes,merge-duplicates"

INT8 = Recipe(
    summary="basic, then 8-bit integers wherever they are faster and the samples allow it",
    passes=",".join(
        (
            BASIC.passes,
            READY,
            "quantize-static,quantize-dynamic,quantize-weights{min-elements=512}",
            TIDY,
        )
    ),
    repeat=True,
)

INT8_CODEBOOK = Recipe(
    summary=(
        "the speed of int8 in a file of a sixth: weights share few values, and nodes that "
        "onnxruntime computes at load make int8 of them"
    ),
    passes=",".join(
        (
            BASIC.passes,
            READY,
            "quantize-static,quantize-dynamic",
            TIDY,
            "drop-metadata,shorten-names,pack-constants{weights=false}",
            "cluster-weights{size=0.165,min-elements=512}",
            # What clusters do not reach, or where they cost too much, takes a quarter.
            "quantize-weights{min-elements=512}",
        )
    ),
    repeat=True,
)

SMALL = Recipe(
    summary=(
        "basic, then weights that share few values, as few as the error allows: the smallest file, "
        "at the speed and in the memory of the float model"
    ),
    passes=(
        f"{BASIC.passes},drop-metadata,shorten-names,pack-constants{{weights=false}},"
        "cluster-weights{error=0.1},pack-constants"
    ),
    repeat=True,
)

FP16 = Recipe(
    summary="basic, then float16 throughout: half the bytes, and faster on a GPU only",
    passes=f"{BASIC.passes},convert-numbers{{format=float16}}",
    repeat=True,
)

INT4 = Recipe(
    summary=(
        "basic, then weights in 4 bits, a sixth of the bytes. Where samples have few rows (a token "
        "at a time), those of MatMul and Gemm stay narrow in memory and are faster; else, and for "
        "all others, only the file is smaller"
    ),
    passes=",".join(
        (
            BASIC.passes,
            "raise-opset{opset=21}",
            "quantize-weights{bits=4,block=32,form=kernel,min-elements=1024}",
            # What the clock, where models are timed, does not leave to the kernel.
            "quantize-weights{bits=4,block=32,min-elements=1024}",
        )
    ),
    repeat=True,
)
