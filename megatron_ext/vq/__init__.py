"""Image <-> code tokens: published VQ tokenizers behind one interface, and the training of a small one.

::

    vq = load("checkpoints/janus-pro-1b", device="cuda")     # recognised from its config.json
    codes = vq.encode(images)                                 # [n, 3, H, W] in [-1, 1]  ->  [n, h*w]
    images = vq.decode(codes)                                 # and back
"""

from megatron_ext.vq.model import VQModel, load

__all__ = ["VQModel", "load"]
