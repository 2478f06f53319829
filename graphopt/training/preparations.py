"""The preparations of a configuration, `[[prepare]]`, by their names."""

from __future__ import annotations

from typing import Final

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.activations import RoundedActivations
from graphopt.training.binary import Binary
from graphopt.training.codebooks import Codebook
from graphopt.training.config import Config, Table
from graphopt.training.grids import Quantized
from graphopt.training.masking import Masks, Sparsity
from graphopt.training.preparation import Preparation
from graphopt.training.prepared_weights import PreparedWeights, WeightOptions
from graphopt.training.reading import section_of

NAMES: Final[dict[str, type[WeightOptions]]] = {
    "binary": Binary,
    "codebook": Codebook,
    "masks": Masks,
    "quantized": Quantized,
    "sparsity": Sparsity,
}


def preparation_of(table: Table) -> PreparedWeights:
    """The preparation that a table of `[[prepare]]` states.

    Raises:
        ConfigError: there is none of its name, or a key or value is wrong.
    """
    name = table.get("name")
    if name is None:
        raise ConfigError(f"[[prepare]] needs its key 'name', one of {', '.join(sorted(NAMES))}")
    if not isinstance(name, str) or name not in NAMES:
        raise ConfigError(
            f"prepare.name is {name!r}, which is no preparation{did_you_mean(str(name), NAMES)}"
        )
    return PreparedWeights(section_of(NAMES[name], table))


def preparations_of(config: Config) -> list[Preparation]:
    """All preparations of a run, in order.

    Raises:
        ConfigError: one is wrong, or does not go with the strategy.
    """
    words = config.strategy.name.split()
    found = list(map(preparation_of, config.prepare))
    rounded = [
        RoundedActivations(one.options)
        for one in found
        if isinstance(one.options, Quantized) and one.options.activations is not None
    ]
    if "pipeline" in words and any(one.options.sees_all_weights for one in found):
        raise ConfigError(
            "prepare.scope is 'global', and no process of a pipeline has all weights; use 'layer'"
        )
    others = [word for word in words if word not in ("single", "ddp", "x")]
    if rounded and others:
        raise ConfigError(
            f"prepare.activations goes with the strategies single and ddp, not with {others[0]}"
        )
    return [*found, *rounded]
