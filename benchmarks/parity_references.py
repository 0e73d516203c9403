"""References that one process computes, and how far a rank of any layout is from them.

The ranks of a layout hold slices of parameters and of logits; the references are whole. They are computed on a CPU in
float32 and can be carried to another machine: a GPU is compared with them, never with itself.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext import cpu
from megatron_ext.errors import UserError

MAKE = "python benchmarks/parity.py --layouts tp1 --references FOLDER"


@dataclass
class Measured:
    """What a rank measures in the first optimizer steps of a model.

    Attributes:
        gradients: of the first step, by the parameter's global name.
        logits: of the first step's micro-batches, [n, 1, vocabulary] each; none on a stage without the output layer.
        losses, norms: loss and gradient norm of each step.
        targets: for each of these micro-batches, which of its targets the logits are of; other context ranks have the
            others.
    """

    gradients: dict[str, Tensor]
    logits: list[Tensor]
    losses: list[float]
    norms: list[float]
    targets: list[Tensor] = field(default_factory=list)


class References:
    """A folder with a file for each plan.

    Args:
        numbers: sampled from a seed as weights and rows are; files written with other numbers are refused.
    """

    def __init__(self, folder: Path, numbers: Tensor):
        self._folder = folder
        self._numbers = numbers

    def missing(self, plans: list[str]) -> list[str]:
        """The plans without a reference."""
        return [plan for plan in plans if not self._file(plan).exists()]

    def save(self, plan: str, measured: Measured) -> None:
        """Save what one process on a CPU measured.

        Raises:
            UserError: this is a GPU.
        """
        if not cpu.available():
            raise UserError(f"{self._file(plan)}: no reference, and a GPU computes none; on a CPU: {MAKE}")
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save({"numbers": self._numbers, **asdict(measured)}, self._file(plan))

    def load(self, plan: str) -> Measured:
        """The reference of a plan.

        Raises:
            UserError: it was computed from other weights or rows.
        """
        stored = torch.load(self._file(plan))
        numbers = stored.pop("numbers")
        if numbers.shape != self._numbers.shape or not torch.allclose(numbers, self._numbers, rtol=1e-5, atol=1e-6):
            raise UserError(
                f"{self._file(plan)}: computed with other settings, or by a torch with other random numbers; delete it "
                f"and compute it again on a CPU: {MAKE}"
            )
        return Measured(**stored)

    def _file(self, plan: str) -> Path:
        return self._folder / f"{plan.replace(' ', '_')}.pt"


def errors(measured: Measured, expected: Measured) -> dict[str, float]:
    """Relative errors, the largest over all ranks, by name."""
    return {
        "loss": relative(measured.losses[:1], expected.losses),
        "logits": _worst_logits(measured, expected.logits),
        "gradient": _worst_gradient(measured.gradients, expected.gradients),
        "gradient_norm": relative(measured.norms[:1], expected.norms),
        "later_losses": relative(measured.losses, expected.losses),
    }


def relative(values: list[float], expected: list[float]) -> float:
    """Largest relative error of the first ``len(values)`` numbers."""
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected))


def _worst_logits(measured: Measured, expected: list[Tensor]) -> float:
    """The largest error of this replica's micro-batches; a tensor-parallel rank holds a slice of the vocabulary."""
    from megatron.core import parallel_state

    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    logits, targets = measured.logits, measured.targets
    first = parallel_state.get_data_parallel_rank() * len(targets)
    slices = [whole.chunk(size, -1)[rank][own] for whole, own in zip(expected[first:], targets)]
    errors = [float((x - e).double().norm() / e.double().norm()) for x, e in zip(logits, slices) if e.numel()]
    return _largest(torch.tensor(max(errors, default=0.0), dtype=torch.float64))


def _worst_gradient(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of all parameters, each taken whole."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ext.transformer.initialization import shard

    assert expected.keys() >= gradients.keys()
    # Squared errors of the slices of one parameter add up over the tensor-parallel group.
    names = sorted(gradients)
    squares = torch.stack([(gradients[n] - shard(expected[n], n)).double().square().sum() for n in names])
    squares = squares.to(torch.cuda.current_device())
    dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    sizes = torch.stack([expected[n].double().norm() for n in names]).to(squares.device)
    return _largest((squares.sqrt() / sizes.clamp(min=1e-30)).max())


def _largest(value: Tensor) -> float:
    import torch.distributed as dist

    value = value.to(torch.cuda.current_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
