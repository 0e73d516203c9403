"""Converts a checkpoint to other projections of the same model.

Training that started with one matrix for all tokens can continue with more, or the other way round. The model computes
the same function::

    shared          -> any kind        image tokens get copies of W, or deltas that are zero
    separate       <-> delta           W + D = W_image
    any kind        -> rank r          if every difference has at most rank r
    both tasks      -> one per task    each task gets the matrix that both used
    any kind        -> shared,         if the merged matrices are equal
    one per task    -> both tasks
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import Tensor

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights
from megatron_ext.config import Config, ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.plan import Projections
from megatron_ext.training.config_checks import validate
from megatron_ext.training.run import Progress
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve

TOLERANCE = 1e-6
_PROJECTION = re.compile(r"(.+\.linear_(qkv|proj|fc1|fc2))\.(\w+)")
_KEY = "plan.projections"


def convert(checkpoint: Path, out: Path, overrides: Sequence[str], tolerance: float = TOLERANCE) -> dict:
    """Write the model of ``checkpoint`` with other projections as iteration 0 of a run, into ``out``/iter_0000000.

    Its optimizer has taken no step; its configuration is the source's with the overrides. Joins and leaves a process
    group of this process only.

    Args:
        checkpoint: a complete checkpoint, saved under any layout.
        out: a folder without checkpoints.
        overrides: ``plan.projections.key=value`` for the source's configuration.
        tolerance: see :func:`converted`.

    Returns:
        The new "checkpoint", its "projections" and its number of "parameters"; the same of the "source".

    Raises:
        UserError: names the checkpoint, folder, override or weight at fault.
    """
    marker = checkpoint_folder.read_marker(checkpoint)
    if present := checkpoint_folder.checkpoints(out):
        raise UserError(f"{out}: already holds checkpoints, such as {present[-1].name}; name another folder")
    before = config_file.from_tree(Config, marker["state"]["config"])
    after = _with_overrides(before, overrides)
    resolved_before, resolved_after = (resolve(single_process(config)) for config in (before, after))
    source, target = resolved_before.plan.projections, resolved_after.plan.projections
    if source.identity == target.identity:
        raise UserError(f"{checkpoint}: with {' '.join(overrides)} its projections stay as they are")
    vocab_size = _vocab_size(checkpoint, marker)
    state = marker["state"] | {
        "progress": dataclasses.asdict(Progress()),
        "config": dataclasses.asdict(after),
        "plan": {"projections": target.identity},
    }
    # No step is taken here: groups matter to the run that trains on, whose moments start from zero for all parameters.
    config = dataclasses.replace(
        resolved_after.config, optimizer=dataclasses.replace(resolved_after.config.optimizer, groups=[])
    )
    distributed.initialize(config)
    try:
        chunks = build_model(dataclasses.replace(resolved_after, config=config, padded_vocab_size=vocab_size))
        originals = build_chunks(dataclasses.replace(resolved_before, padded_vocab_size=vocab_size))
        _fill(chunks[0].module, checkpoint, originals, source, target, tolerance)
        Checkpointer(out, keep=0).save(0, chunks, build_optimizer(config, chunks), state)
    finally:
        distributed.shut_down()
    numbers = {
        "checkpoint": str(out / "iter_0000000"),
        "projections": target.identity,
        "parameters": parameter_count(after.model, vocab_size, target),
    }
    numbers["source"] = {
        "checkpoint": str(checkpoint),
        "projections": source.identity,
        "parameters": parameter_count(before.model, vocab_size, source),
    }
    return numbers


@torch.no_grad()
def _fill(
    model: torch.nn.Module,
    checkpoint: Path,
    originals: list[torch.nn.Module],
    source: Projections,
    target: Projections,
    tolerance: float,
) -> None:
    """Load a checkpoint into ``originals`` and copy its converted weights into ``model``."""
    load_weights(checkpoint, originals)
    parameters = dict(model.named_parameters())
    weights = converted(dict(originals[0].named_parameters()), source, target, parameters, tolerance)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    if model.code_vectors is not None:
        model.code_vectors.load_state_dict(originals[0].code_vectors.state_dict())


@torch.no_grad()
def converted(
    weights: Mapping[str, Tensor],
    source: Projections,
    target: Projections,
    fresh: Mapping[str, Tensor],
    tolerance: float = TOLERANCE,
) -> dict[str, Tensor]:
    """The parameters that compute the same function with other projections.

    Args:
        weights: the source model's parameters by name, in one process.
        source: the source model's projections.
        target: the target model's projections.
        fresh: initial parameters of the target model. Where a difference needs less than rank r, the unused rows of
            ``down`` keep their initial values, and the unused columns of ``up`` are zero.
        tolerance: matrices count as the same when they differ by at most this share of W, in Frobenius norm.

    Returns:
        The parameters of the target model, in the types of the source.

    Raises:
        UserError: names a matrix that the target projections cannot express, with its relative difference.
    """
    parameters = {}
    for name, weight in weights.items():
        match = _PROJECTION.fullmatch(name)
        if match and match[3] not in ("weight", "bias"):
            continue
        parameters[name] = weight
        if match and match[3] == "weight":
            prefix, module, _ = match.groups()
            before, after = (p if module in p.modules else Projections() for p in (source, target))
            parameters |= _Projection(prefix, weights, before, tolerance).converted(after, fresh)
    return parameters


@dataclass(frozen=True)
class _Projection:
    """One projection of one layer of the source model; computes in float64."""

    prefix: str
    weights: Mapping[str, Tensor]
    source: Projections
    tolerance: float

    def converted(self, target: Projections, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target's parameters other than W."""
        components = self.source.components
        if not target.components:
            for component in components:
                self._require_same(component, None)
        elif len(components) > len(target.components):
            self._require_same(*components)
        parameters = {}
        for component in target.components:
            origin = component if component in components else components[0] if components else None
            for kind, value in self._as(target, component, origin, fresh).items():
                parameters[f"{self.prefix}.{component}_{kind}"] = value
        return parameters

    def _as(
        self, target: Projections, component: str, origin: str | None, fresh: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The parameters of a target component that replaces the source's ``origin``, or W."""
        dtype = self._weight.dtype
        if origin and (self.source.kind, self.source.rank) == (target.kind, target.rank):
            return {kind: self._parameter(origin, kind).clone() for kind in _parameters(target)}
        if target.kind == "separate":
            return {"weight": (self._weight.double() + self._difference(origin)).to(dtype)}
        if target.rank is None:
            return {"delta": self._difference(origin).to(dtype)}
        down = fresh[f"{self.prefix}.{component}_down"]
        factors = self._factors(origin, target.rank, down.double())
        return dict(zip(("down", "up"), (factor.to(dtype) for factor in factors)))

    def _factors(self, component: str | None, rank: int, down: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` [rank, in] and ``up`` [out, rank] whose product is the difference, of equal norms."""
        difference = self._difference(component)
        up, down = difference.new_zeros(difference.shape[0], rank), down.clone()
        if self._relative(difference) <= self.tolerance:
            return down, up
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        # Element k is the relative norm of the error without all but the k largest values.
        left_out = values.square().flip(0).cumsum(0).flip(0).sqrt() / self._norm
        needed = int((left_out > self.tolerance).sum())
        if needed > rank:
            raise UserError(
                f"{self._name(component)}: differs from W by a matrix of rank {needed}, of which rank {rank} leaves "
                f"out {float(left_out[rank]):.1e} of W (tolerance {self.tolerance:.0e}); take {_KEY}.rank={needed} or "
                f"more, or null for full rank, or {_KEY}.kind=separate"
            )
        root = values[:needed].sqrt()
        down[:needed], up[:, :needed] = root[:, None] * right[:needed], left[:, :needed] * root
        return down, up

    def _require_same(self, component: str, other: str | None) -> None:
        difference = self._relative(self._difference(component) - self._difference(other))
        if not difference <= self.tolerance:  # also refuses NaN
            remedy = f"set {_KEY}.per_task=true" if other else f"take {_KEY}.kind=separate or delta"
            raise UserError(
                f"{self._name(component)}: its matrix differs from {f'that of {other}' if other else 'W'} by "
                f"{difference:.1e} of W (tolerance {self.tolerance:.0e}), so they cannot be merged; {remedy}, "
                f"with {self.prefix.rsplit('_', 1)[1]} in {_KEY}.modules"
            )

    def _difference(self, component: str | None) -> Tensor:
        """A component's matrix minus W."""
        if component is None:
            return torch.zeros_like(self._weight, dtype=torch.float64)
        parameters = [self._parameter(component, kind).double() for kind in _parameters(self.source)]
        if self.source.kind == "separate":
            return parameters[0] - self._weight.double()
        return parameters[0] if self.source.rank is None else parameters[1] @ parameters[0]

    def _relative(self, difference: Tensor) -> float:
        return float(difference.norm() / self._norm)

    @property
    def _norm(self) -> Tensor:
        return self._weight.double().norm().clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def _weight(self) -> Tensor:
        return self.weights[f"{self.prefix}.weight"]

    def _parameter(self, component: str, kind: str) -> Tensor:
        return self.weights[f"{self.prefix}.{component}_{kind}"]

    def _name(self, component: str) -> str:
        return f"{self.prefix}.{component}_{_parameters(self.source)[-1]}"


def _parameters(projections: Projections) -> tuple[str, ...]:
    """The names of a component's parameters."""
    if projections.kind == "separate":
        return ("weight",)
    return ("delta",) if projections.rank is None else ("down", "up")


def _with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The validated configuration with other projections."""
    for override in overrides:
        if not f"{override.partition('=')[0]}.".startswith(f"{_KEY}."):
            raise UserError(f"override '{override}': only {_KEY}.* can be converted; set others when training")
    changed = config_file.override(config, overrides)
    validate(changed, changed.parallel.tensor * changed.parallel.pipeline)
    return changed


def single_process(config: Config) -> Config:
    """The same model for one process, in a form that builds on any hardware."""
    model = dataclasses.replace(config.model, implementation="local")
    training = dataclasses.replace(config.training, fp8="none")
    return dataclasses.replace(config, model=model, training=training, parallel=ParallelConfig())


def _vocab_size(checkpoint: Path, marker: dict) -> int:
    """Rows of the saved embedding table, whose padding depends on the layout."""
    # All files but those of tensors are unpickled, so verify that they are as written.
    unpickled = sorted(name for name in marker["files"] if not name.endswith(".distcp"))
    if damage := checkpoint_folder.damage(checkpoint, marker["files"], unpickled):
        raise UserError(damage[0] + checkpoint_folder.remedy(checkpoint))
    return load_sharded_metadata(str(checkpoint))["embedding.word_embeddings.weight"].global_shape[0]
