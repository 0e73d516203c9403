"""Parameters that are frozen, or trained at a rate of their own: the groups of an ``OptimizerConfig``.

A frozen parameter has no gradient, no gradient buffer and no optimizer state; it stays in the checkpoint, since it is a
weight of the model. Patterns are matched against names that number layers over the whole model, so a group is the same
under every layout.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_ext.config import Config, OptimizerConfig, ParameterGroup
from megatron_ext.errors import UserError
from megatron_ext.transformer.initialization import global_parameters

_MULTIPLIER = "lr_multiplier"
"""Attribute of a parameter that is trained at a rate of its own."""
_NOT_DECAYED = ("*depth_head.positions*",)
"""Parameters of two dimensions without weight decay."""


def assign(chunks: Sequence[torch.nn.Module], config: Config) -> None:
    """Freeze parameters, and mark those with a rate of their own. Before data parallelism wraps the chunks; collective.

    Raises:
        UserError: a pattern matches no parameter of the model, or all parameters are frozen.
    """
    groups = config.optimizer.groups
    if not groups:
        return
    matched, trained, names = set(), False, set()
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            names.add(name)
            matching = [i for i, group in enumerate(groups) if fnmatchcase(name, group.parameters)]
            matched.update(matching)
            multiplier = groups[matching[0]].lr_multiplier if matching else 1.0
            parameter.requires_grad_(multiplier > 0)
            trained |= multiplier > 0
            if multiplier not in (0, 1):
                setattr(parameter, _MULTIPLIER, multiplier)
        if config.training.recompute == "full" and chunk.pre_process:
            chunk.embedding.register_forward_hook(_with_gradient)
    _check(groups, matched, trained, names)


def overrides(megatron_config, config: OptimizerConfig) -> dict:
    """What Megatron-Core's optimizer does differently for some parameters: no weight decay, another learning rate."""
    changes = get_standard_config_overrides(megatron_config)
    changes[ParamKey(name=_NOT_DECAYED)] = {"wd_mult": 0.0}
    for multiplier in dict.fromkeys(group.lr_multiplier for group in config.groups):
        if multiplier in (0, 1):
            continue

        def at_this_rate(parameter, multiplier=multiplier) -> bool:
            return getattr(parameter, _MULTIPLIER, 1.0) == multiplier

        key = ParamKey(predicate=ParamPredicate(f"{_MULTIPLIER} {multiplier}", at_this_rate))
        # The scheduler reads the rates; lr_mult tells the groups apart when Megatron-Core loads a checkpoint.
        changes[key] = {
            "lr_mult": multiplier,
            "max_lr": multiplier * config.lr,
            "min_lr": multiplier * config.min_lr,
        }
    return changes


def _with_gradient(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Layers that are recomputed get gradients only if their input has one, which frozen embeddings do not give it."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _check(groups: list[ParameterGroup], matched: set[int], trained: bool, names: set[str]) -> None:
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (matched, trained, names))
    for number, group in enumerate(groups):
        if not any(number in of_rank for of_rank, _, _ in gathered):
            known = sorted({name for _, _, of_rank in gathered for name in of_rank})
            raise UserError(
                f"config: 'optimizer.groups[{number}].parameters' is {group.parameters!r}, which matches no parameter; "
                f"names are like {known[0]} and {known[-1]}"
            )
    if not any(of_rank for _, of_rank, _ in gathered):
        raise UserError("config: 'optimizer.groups' freeze every parameter; leave some out, or give them a rate")
