"""A checkpoint of the same model with other projections.

Training that began with one matrix for all tokens goes on with more, or the other way round, and the model computes
what it computed before::

    shared      -> any kind        image tokens get copies of W, or differences that are zero
    separate   <-> delta      W + D = W_image
    any kind    -> rank r          where every difference has at most rank r
    one         -> one per task    both tasks get what both used
    any kind    -> shared,         where the matrices that become one are the same
    one per task -> one
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
from megatron_ext.routing.cost import parameter_count
from megatron_ext.routing.plan import Projections
from megatron_ext.training.run import Progress
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.validation import validate
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve

TOLERANCE = 1e-6
_PROJECTION = re.compile(r"(.+\.linear_(qkv|proj|fc1|fc2))\.(\w+)")
_KEY = "plan.projections"


def convert(checkpoint: Path, out: Path, overrides: Sequence[str], tolerance: float = TOLERANCE) -> dict:
    """Write the model of ``checkpoint`` with other projections as iteration 0 of a run, into ``out``/iter_0000000.

    Its optimizer has taken no step, and its configuration is the source's with the overrides. Joins a process group
    of its own, of this process alone, and leaves it.

    Args:
        checkpoint: a complete checkpoint, saved under any layout.
        out: a folder without checkpoints.
        overrides: ``plan.projections.key=value`` over the source's configuration.
        tolerance: see :func:`converted`.

    Returns:
        The new "checkpoint", its "projections" and its number of "parameters"; the same of the "source".

    Raises:
        UserError: the checkpoint, the folder, an override, or a weight that cannot be converted, named.
    """
    marker = checkpoint_folder.read_marker(checkpoint)
    if present := checkpoint_folder.checkpoints(out):
        raise UserError(f"{out}: holds checkpoints already, such as {present[-1].name}; name another folder")
    before = config_file.from_tree(Config, marker["state"]["config"])
    after = _with_overrides(before, overrides)
    source, target = (resolve(alone(config)).plan.projections for config in (before, after))
    if source.identity == target.identity:
        raise UserError(f"{checkpoint}: with {' '.join(overrides)} its projections stay as they are")
    vocab_size = _vocab_size(checkpoint, marker)
    state = marker["state"] | {
        "progress": dataclasses.asdict(Progress()),
        "config": dataclasses.asdict(after),
        "plan": {"projections": target.identity},
    }
    distributed.initialize(alone(after))
    try:
        chunks = build_model(resolve(alone(after), vocab_size))
        trained = build_chunks(resolve(alone(before), vocab_size))
        _fill(chunks[0].module, checkpoint, trained, source, target, tolerance)
        Checkpointer(out, keep=0).save(0, chunks, build_optimizer(alone(after), chunks), state)
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
    theirs: list[torch.nn.Module],
    source: Projections,
    target: Projections,
    tolerance: float,
) -> None:
    """Give ``model`` the weights of a checkpoint, which are loaded into ``theirs``."""
    load_weights(checkpoint, theirs)
    parameters = dict(model.named_parameters())
    made = converted(dict(theirs[0].named_parameters()), source, target, parameters, tolerance)
    for name, parameter in parameters.items():
        parameter.copy_(made[name])


@torch.no_grad()
def converted(
    weights: Mapping[str, Tensor],
    source: Projections,
    target: Projections,
    fresh: Mapping[str, Tensor],
    tolerance: float = TOLERANCE,
) -> dict[str, Tensor]:
    """Weights of the same function with other projections.

    Args:
        weights: a model's parameters by name, in one process.
        source: its projections.
        target: those wanted.
        fresh: initial parameters of the model wanted: where a difference of rank r has a smaller rank, the rest of
            its ``down`` is theirs, and of its ``up`` zero.
        tolerance: matrices count as the same when they differ by at most this share of W, in Frobenius norm.

    Returns:
        The parameters of the model wanted, of the types that they had.

    Raises:
        UserError: a matrix that the projections wanted cannot express, named with its relative difference.
    """
    made = {}
    for name, weight in weights.items():
        match = _PROJECTION.fullmatch(name)
        if match and match[3] != "weight":
            continue
        made[name] = weight
        if match:
            prefix, module, _ = match.groups()
            own, wanted = (p if module in p.modules else Projections() for p in (source, target))
            made |= _Projection(prefix, weights, own, tolerance).converted(wanted, fresh)
    return made


@dataclass(frozen=True)
class _Projection:
    """One projection of one layer as the source has it; computes in float64."""

    prefix: str
    weights: Mapping[str, Tensor]
    own: Projections
    tolerance: float

    def converted(self, target: Projections, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target's parameters beside W."""
        components = self.own.components
        if not target.components:
            for component in components:
                self._require_same(component, None)
        elif len(components) > len(target.components):
            self._require_same(*components)
        made = {}
        for component in target.components:
            origin = component if component in components else components[0] if components else None
            for kind, value in self._as(target, component, origin, fresh).items():
                made[f"{self.prefix}.{component}_{kind}"] = value
        return made

    def _as(
        self, target: Projections, component: str, origin: str | None, fresh: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The parameters of a component of the target, which takes the place of the source's ``origin``, or of W."""
        dtype = self._weight.dtype
        if origin and (self.own.kind, self.own.rank) == (target.kind, target.rank):
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
        # Element k is the norm of what the k largest leave out.
        left_out = values.square().flip(0).cumsum(0).flip(0).sqrt() / self._norm
        needed = int((left_out > self.tolerance).sum())
        if needed > rank:
            raise UserError(
                f"{self._name(component)}: differs from W by a matrix of rank {needed}, of which rank {rank} leaves "
                f"out {float(left_out[rank]):.1e} of W (tolerance {self.tolerance:.0e}); take {_KEY}.rank={needed} or "
                f"more, or null for a whole matrix, or {_KEY}.kind=separate"
            )
        root = values[:needed].sqrt()
        down[:needed], up[:, :needed] = root[:, None] * right[:needed], left[:, :needed] * root
        return down, up

    def _require_same(self, one: str, other: str | None) -> None:
        difference = self._relative(self._difference(one) - self._difference(other))
        if not difference <= self.tolerance:  # NaN is no reason to go on
            remedy = f"set {_KEY}.per_task=true" if other else f"take {_KEY}.kind=separate or delta"
            raise UserError(
                f"{self._name(one)}: its matrix differs from {f'that of {other}' if other else 'W'} by "
                f"{difference:.1e} of W (tolerance {self.tolerance:.0e}), so that they cannot become one; {remedy}, "
                f"with {self.prefix.rsplit('_', 1)[1]} in {_KEY}.modules"
            )

    def _difference(self, component: str | None) -> Tensor:
        """A component's matrix minus W."""
        if component is None:
            return torch.zeros_like(self._weight, dtype=torch.float64)
        own = [self._parameter(component, kind).double() for kind in _parameters(self.own)]
        if self.own.kind == "separate":
            return own[0] - self._weight.double()
        return own[0] if self.own.rank is None else own[1] @ own[0]

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
        return f"{self.prefix}.{component}_{_parameters(self.own)[-1]}"


def _parameters(projections: Projections) -> tuple[str, ...]:
    """What a component's parameters are called."""
    if projections.kind == "separate":
        return ("weight",)
    return ("delta",) if projections.rank is None else ("down", "up")


def _with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with other projections, checked."""
    for override in overrides:
        if not f"{override.partition('=')[0]}.".startswith(f"{_KEY}."):
            raise UserError(f"override '{override}': only {_KEY}.* can be converted; set others when training")
    changed = config_file.override(config, overrides)
    validate(changed, changed.parallel.tensor * changed.parallel.pipeline)
    return changed


def alone(config: Config) -> Config:
    """The same model in one process, in a form that every machine can build."""
    model = dataclasses.replace(config.model, implementation="local")
    training = dataclasses.replace(config.training, fp8="none")
    return dataclasses.replace(config, model=model, training=training, parallel=ParallelConfig())


def _vocab_size(checkpoint: Path, marker: dict) -> int:
    """Rows of the embedding table as saved, which depend on the layout."""
    # The files beside the tensors' are unpickled, so they must be the ones that were written.
    unpickled = sorted(name for name in marker["files"] if not name.endswith(".distcp"))
    if damage := checkpoint_folder.damage(checkpoint, marker["files"], unpickled):
        raise UserError(damage[0] + checkpoint_folder.remedy(checkpoint))
    return load_sharded_metadata(str(checkpoint))["embedding.word_embeddings.weight"].global_shape[0]
