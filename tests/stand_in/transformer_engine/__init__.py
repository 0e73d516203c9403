"""A stand-in for Transformer Engine 2.12 on CPUs, for tests: the layers that this package uses, in plain PyTorch.

It computes in the precision of its inputs. What it does as Transformer Engine does, from whose sources this was learnt:

- FP8 keeps the weights of a step's first micro-batch (``is_first_microbatch``) until the next first one.
- Delayed scaling registers the histories of every module that is called, once, in the order of the calls, and reduces
  them over the ranks as one tensor when the outermost autocast ends; they are part of a module's extra state.
- Fused weight gradients are written (first micro-batch) or added to ``main_grad``, and what autograd gets is garbage.
"""

from transformer_engine import common, pytorch

__version__ = "2.12.0"
__all__ = ["common", "pytorch"]
