"""A stand-in for Transformer Engine 2.12 on CPUs, for tests: the layers that this package uses, in plain PyTorch.

It computes in the precision of its inputs. In these respects it follows Transformer Engine's sources:

- FP8 caches the weights of a step's first micro-batch (``is_first_microbatch``) until the next step's.
- Delayed scaling registers the history of every module once, at its first call, and reduces all histories over the
  ranks as one tensor when the outermost autocast ends; they are part of a module's extra state.
- Fused weight gradients overwrite ``main_grad`` in the first micro-batch and are added to it afterwards; autograd gets
  garbage.
"""

from transformer_engine import common, pytorch

__version__ = "2.12.0"
__all__ = ["common", "pytorch"]
