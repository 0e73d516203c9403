"""Image <-> code tokens: published VQ tokenizers behind one interface, and the training of small ones.

::

    vq = load("checkpoints/janus-pro-1b", device="cuda")     # recognised from its config.json
    codes = vq.encode(images)                                 # [n, 3, H, W] in [-1, 1]  ->  [n, h*w*D]
    images = vq.decode(codes)                                 # and back

    loading.py            a folder -> a tokenizer
    model.py              the interface; the fingerprint and the metadata that data sets store
    adapters.py           Janus (LlamaGen's VQ-16), Emu3, Chameleon
    vila_u.py             VILA-U's vision tower
    patch_dictionary.py   patches of pixels, without a network
    codebook.py           nearest codes; k-means, and moving averages for training
    residual_codebook.py  moving averages of several codes a position
    training.py           training a small tokenizer; dictionary_training.py fits a patch dictionary
    training_config.py    settings of both
    trained_folder.py     what both write: the tokenizer, its quality on held-out images
    training_images.py    the images to train it on
    image_decoder.py      image files -> pixels of the tokenizer's size, with Pillow

This package imports its members on first use: settings and finished files are read without torch.
"""

from megatron_ext.lazy_members import lazy_members

_HOMES = {"VQModel": "model", "load": "loading", "code_shape": "loading"}
__all__ = list(_HOMES)
__getattr__ = lazy_members(__name__, _HOMES)
