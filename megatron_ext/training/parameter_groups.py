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
        UserError: a pattern has no effect, a bias is trained whose weight is frozen, or all parameters are frozen.
    """
    groups = config.optimizer.groups
    if not groups:
        return
    matching: dict[str, list[int]] = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            matching[name] = _matching(name, groups, config.model.tie_embeddings)
            multiplier = _multiplier(matching[name], groups)
            parameter.requires_grad_(multiplier > 0)
            if multiplier not in (0, 1):
                setattr(parameter, _MULTIPLIER, multiplier)
        if config.training.recompute == "full" and chunk.pre_process:
            chunk.embedding.register_forward_hook(_with_gradient)
    _check(groups, _of_all_ranks(matching))


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


def _matching(name: str, groups: list[ParameterGroup], tied: bool) -> list[int]:
    """Numbers of the groups that match a parameter; a table that is also the output layer has two names."""
    names = [name, "output_layer.weight"] if tied and name == "embedding.word_embeddings.weight" else [name]
    return [i for i, group in enumerate(groups) if any(fnmatchcase(n, group.parameters) for n in names)]


def _multiplier(matching: list[int], groups: list[ParameterGroup]) -> float:
    return groups[matching[0]].lr_multiplier if matching else 1.0


def _of_all_ranks(matching: dict[str, list[int]]) -> dict[str, list[int]]:
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, matching)
    return {name: numbers for of_rank in gathered for name, numbers in sorted(of_rank.items())}


def _check(groups: list[ParameterGroup], matching: dict[str, list[int]]) -> None:
    rates = {name: _multiplier(numbers, groups) for name, numbers in matching.items()}
    for number, group in enumerate(groups):
        matched = [name for name, numbers in matching.items() if number in numbers]
        key = f"config: 'optimizer.groups[{number}].parameters' is {group.parameters!r}, which matches"
        if not matched:
            raise UserError(f"{key} no parameter; names are like {min(matching)} and {max(matching)}")
        hidden = all(matching[name][0] < number for name in matched)
        # One that repeats their rate is accepted: it may name a tied table a second time.
        if hidden and any(rates[name] != group.lr_multiplier for name in matched):
            first = matching[matched[0]][0]
            raise UserError(
                f"{key} only parameters of earlier groups, such as {matched[0]} of optimizer.groups[{first}] "
                f"({groups[first].parameters!r}); the first group that matches counts"
            )
    if not any(rates.values()):
        raise UserError("config: 'optimizer.groups' freeze every parameter; leave some out, or give them a rate")
    for name, rate in rates.items():
        bias = name.removesuffix("weight") + "bias"
        # Megatron-Core's linear layer gives its bias no gradient where the weight has none.
        if name.endswith(".weight") and not rate and rates.get(bias):
            raise UserError(f"config: 'optimizer.groups' freeze {name} but not {bias}; freeze both, or neither")
