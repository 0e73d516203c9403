"""The z-loss over a vocabulary that is cut over the tensor-parallel group."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.training.z_loss import cross_entropy_and_square
from support.ranks import world

TOKENS, VOCABULARY, C = 7, 24, 0.3
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def errors(tensor: int) -> list[float]:
    """On this rank, per precision, the largest error of losses, (log Z)^2 and gradients, relative to the largest
    number."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor)
    rank = parallel_state.get_tensor_model_parallel_rank()
    largest = []
    for dtype in TOLERANCES:
        random = torch.Generator().manual_seed(0)
        logits = (5 * torch.randn(TOKENS, VOCABULARY, generator=random)).to(dtype)
        labels = torch.randint(VOCABULARY, (TOKENS,), generator=random)
        weights = torch.rand(TOKENS, generator=random)

        whole = logits.double().clone().requires_grad_()
        squares = whole.logsumexp(1).square()
        losses = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
        ((losses + C * squares) * weights).sum().backward()

        ours = logits.chunk(tensor, 1)[rank].clone().unsqueeze(1).requires_grad_()
        own_losses, own_squares = cross_entropy_and_square(ours, labels)
        ((own_losses + C * own_squares) * weights).sum().backward()
        assert own_losses.dtype == torch.promote_types(dtype, torch.float32) and ours.grad.dtype == dtype
        assert torch.equal(ours.detach()[:, 0], logits.chunk(tensor, 1)[rank])  # not overwritten
        gradient = whole.grad.chunk(tensor, 1)[rank]
        pairs = ((own_losses, losses), (own_squares, squares), (ours.grad[:, 0], gradient))
        largest.append(max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs))
    return largest


def all_layouts() -> list[list[float]]:
    return [errors(tensor) for tensor in (1, 2, 4)]


def test_value_and_gradient_are_those_of_cross_entropy_and_logsumexp(tmp_path):
    for rank, of_layouts in enumerate(world(4, all_layouts, folder=tmp_path)):
        for tensor, of_precisions in zip((1, 2, 4), of_layouts):
            for (dtype, tolerance), error in zip(TOLERANCES.items(), of_precisions):
                assert error < tolerance, (rank, tensor, dtype)


def no_tokens() -> tuple[int, float]:
    parallel_state.initialize_model_parallel(2)
    logits = torch.zeros(0, 1, 8, requires_grad=True)
    losses, squares = cross_entropy_and_square(logits, torch.zeros(0, dtype=torch.int64))
    (losses + squares).sum().backward()
    return len(losses), float(logits.grad.sum())


def test_a_micro_batch_without_loss_tokens_contributes_nothing(tmp_path):
    assert world(2, no_tokens, folder=tmp_path) == [(0, pytest.approx(0.0))] * 2
