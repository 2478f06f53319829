"""The recipes that come with graphopt."""

from __future__ import annotations

from graphopt.recipes import Recipe

BASIC = Recipe(
    summary="lossless: fewer nodes and bytes, the same outputs, standard operators only",
    passes=(
        "inline-functions,raise-opset,lift-constants,drop-unused,drop-defaults,drop-identity,fold-constants,"
        "merge-common-subexpressions,merge-transposes,merge-reshapes,fuse-pad,"
        "drop-zero-bias,fuse-batchnorm,fuse-scale,fuse-bias,merge-duplicates,merge-views,drop-unused"
    ),
    repeat=True,
)
