"""Image <-> code tokens: published VQ tokenizers behind one interface, and the training of a small one.

::

    vq = load("checkpoints/janus-pro-1b", device="cuda")     # recognised from its config.json
    codes = vq.encode(images)                                 # [n, 3, H, W] in [-1, 1]  ->  [n, h*w]
    images = vq.decode(codes)                                 # and back

    loading.py            a folder -> a tokenizer
    model.py              the interface; the fingerprint and the metadata that data sets store
    adapters.py           Janus (LlamaGen's VQ-16), Emu3, Chameleon
    codebook.py           nearest codes; k-means start and moving averages for training
    training.py           training a small tokenizer
    training_images.py    the images to train it on
    image_decoder.py      image files -> pixels of the tokenizer's size, with Pillow
"""

from megatron_ext.vq.loading import load
from megatron_ext.vq.model import VQModel

__all__ = ["VQModel", "load"]
