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
            "fuse-pad,drop-zero-bias,fuse-batchnorm,fuse-scale,fuse-bias,fuse-gemm",
            "fuse-relu,fuse-hard-swish,fuse-gelu,fuse-softmax",
            "fuse-layer-normalization,fuse-rms-normalization",
            # After the fusions, which leave a shared weight alone.
            "merge-duplicates,merge-views,drop-unused",
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
