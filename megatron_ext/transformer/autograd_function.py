"""Autograd functions without autograd's overhead where gradients are disabled."""

from types import SimpleNamespace

import torch


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` for few rows, as in decoding, where autograd takes longer than the operations."""

    @classmethod
    def call(cls, *arguments):
        """``apply``, or only ``forward`` where gradients are disabled."""
        if torch.is_grad_enabled():
            return cls.apply(*arguments)
        return cls.forward(SimpleNamespace(save_for_backward=_ignore, set_materialize_grads=_ignore), *arguments)


def _ignore(*arguments) -> None:
    """Saves nothing."""
