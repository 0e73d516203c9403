"""Autograd functions that cost nothing extra where no gradient is wanted."""

from types import SimpleNamespace

import torch


class Function(torch.autograd.Function):
    """For a few rows, as in decoding, autograd's machinery takes longer than the operations themselves."""

    @classmethod
    def of(cls, *arguments):
        """``apply``; without gradients the forward pass and nothing around it."""
        if torch.is_grad_enabled():
            return cls.apply(*arguments)
        return cls.forward(SimpleNamespace(save_for_backward=_forget, set_materialize_grads=_forget), *arguments)


def _forget(*arguments) -> None:
    """Nothing is kept."""
