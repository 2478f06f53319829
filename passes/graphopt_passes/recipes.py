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

INT8 = Recipe(
    summary="basic, then 8-bit integers wherever they are faster and the samples allow it",
    passes=",".join(
        (
            BASIC.passes,
            # Before codes, which another order of summation would change.
            "widen-halves,pool-means,flatten-convs,merge-reshapes,fuse-transpose,pad-channels",
            "quantize-static,quantize-dynamic,quantize-weights{min-elements=512}",
            # Reshapes around folded columns; zero points that are the same in many layers.
            "merge-transposes,merge-reshapes,merge-duplicates",
        )
    ),
    repeat=True,
)
