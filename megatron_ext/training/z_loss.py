"""The z-loss (PaLM, section 5 of arXiv 2204.02311): a term c (log Z)^2 for every loss token, beside its cross-entropy.

Z is the sum of the exponentials of a token's logits. The term keeps log Z near 0, where logits would drift; Chameleon
(arXiv 2405.09818) trains text and image tokens together with c = 1e-5.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def cross_entropy_and_square(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and (log Z)^2 of each token, both [n], float32 at least.

    One function for both: Megatron-Core's cross-entropy overwrites float32 logits in place.

    Args:
        logits: [n, 1, vocabulary / tensor-parallel size]; padding of the vocabulary is part of Z, as it is of the loss.
        labels: [n].
    """
    return _CrossEntropyAndSquare.apply(logits, labels)


class _CrossEntropyAndSquare(torch.autograd.Function):
    """Saves the logits, which are there anyway, and log Z."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        x = _wide(logits)
        columns = labels - group.rank() * x.shape[1]  # of this rank's slice of the vocabulary
        here = (columns >= 0) & (columns < x.shape[1])
        columns = torch.where(here, columns, 0)
        peak = x.amax(1)
        if group.size() > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        total = (x - peak[:, None]).exp_().sum(1)
        sums = torch.stack([total, torch.where(here, x.gather(1, columns[:, None])[:, 0], 0)])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        total, of_label = sums
        log_z = total.log() + peak
        ctx.save_for_backward(logits, log_z, columns, here)
        return log_z - of_label, log_z.square()

    @staticmethod
    def backward(ctx, grad_loss: Tensor, grad_square: Tensor) -> tuple[Tensor, None]:
        """softmax (grad_loss + 2 log Z grad_square) - grad_loss at the label."""
        logits, log_z, columns, here = ctx.saved_tensors
        grad = (_wide(logits) - log_z[:, None]).exp_()  # the softmax
        grad *= (grad_loss + 2 * log_z * grad_square)[:, None]
        grad[torch.arange(len(columns), device=columns.device), columns] -= torch.where(here, grad_loss, 0)
        return grad.to(logits.dtype).unsqueeze(1), None


def _wide(logits: Tensor) -> Tensor:
    return logits.squeeze(1).to(torch.promote_types(logits.dtype, torch.float32))
