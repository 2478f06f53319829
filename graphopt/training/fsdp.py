"""Fully sharded data parallel: every process holds a piece of each parameter (`fully_shard`).

The modules of `strategy.layers` are gathered one at a time when they are computed, and what is left
of the module as one (Zhao et al., arXiv:2304.11277, in its second form on DTensor).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.config import Precision
from graphopt.training.objectives import Learner
from graphopt.training.precision import DTYPES
from graphopt.training.processes import World
from graphopt.training.strategy import Replicated, sum_gradients


class Fsdp(Replicated):
    """Every process computes its share of each batch and holds a shard of each parameter.

    Args:
        learner: its module is sharded in place.
        world: the processes.
        precision: of the arithmetic; weights are gathered in it.
        mesh: the processes that divide the data, along one axis.
        layers: patterns of the names of the modules that are gathered one at a time.
    """

    def __init__(
        self,
        learner: Learner,
        world: World,
        precision: Precision,
        mesh: DeviceMesh,
        layers: Sequence[str],
    ) -> None:
        super().__init__(learner, world, precision)
        self.data_rank, self.data_ranks = mesh.get_local_rank(), mesh.size()
        self.data_group = mesh.get_group()
        policy = MixedPrecisionPolicy()
        if precision != "float32":
            policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
        for layer in layers_of(learner.module, layers):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        self.sharded: FSDPModule = fully_shard(learner.module, mesh=mesh, mp_policy=policy)
        # The engine takes the mean of gradients over processes; shares need not be equal.
        self.weight_factor = float(self.data_ranks)

    def syncs(self, last: bool) -> AbstractContextManager[object]:
        """See `Replicated.syncs`."""
        self.sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def finish_gradients(self) -> None:
        """Sum the gradients of the objective's own parameters, which are not sharded."""
        adapters = [p for p in self.learner.adapters if p.grad is not None]
        if adapters and self.data_group is not None:
            sum_gradients(adapters, self.data_group)
            for adapter in adapters:
                assert adapter.grad is not None
                adapter.grad.div_(self.data_ranks)


def layers_of(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules with parameters that are sharded each by itself.

    Args:
        module: the whole.
        patterns: of their names, as the shell has them; the elements of the outermost lists of
            modules if there are none, but for those that share parameters with others.

    Raises:
        ConfigError: a pattern matches no module with parameters, or one that shares them.
    """
    if not patterns:
        return [element for element in _elements(module) if not _shares(element, module)]
    names = {name: m for name, m in module.named_modules() if name and _has_parameters(m)}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = {name: m for name, m in names.items() if fnmatchcase(name, pattern)}
        if not matched:
            near = did_you_mean(pattern, names)
            raise ConfigError(f"strategy.layers: {pattern!r} is no module with parameters{near}")
        shared = [name for name, m in matched.items() if _shares(m, module)]
        if shared:
            raise ConfigError(
                f"strategy.layers: {shared[0]!r} shares a parameter with a module outside of it; "
                "name one that holds both, or neither"
            )
        chosen |= matched
    # Inner ones first: a module takes the parameters that are not taken yet.
    return [chosen[name] for name in sorted(chosen, key=lambda n: -n.count("."))]


def _elements(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [child for child in module if _has_parameters(child)]
    return [element for child in module.children() for element in _elements(child)]


def _shares(layer: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of a layer is also one of the module outside of it."""
    within = Counter(map(id, _occurrences(layer)))
    whole = Counter(map(id, _occurrences(module)))
    return any(whole[parameter] > count for parameter, count in within.items())


def _occurrences(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters under each of their names."""
    return (parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList)
