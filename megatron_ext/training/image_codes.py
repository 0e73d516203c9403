"""What a model with several codes an image token takes from its vocabulary and its VQ tokenizer."""

import dataclasses

from torch import Tensor

from megatron_ext import distributed, vq
from megatron_ext.config import Config
from megatron_ext.data import Mixture
from megatron_ext.errors import UserError
from megatron_ext.transformer.config_checks import validate_image_codes
from megatron_ext.vocabulary import Vocabulary


def with_tokenizer(config: Config, vocabulary: Vocabulary) -> tuple[Config, Tensor | None]:
    """The configuration with what ``model.image_codes`` leaves to the vocabulary and to the VQ tokenizer, and the code
    vectors [codebook_size, width], None for one code an image token and for learned embeddings. Collective: rank 0
    reads the tokenizer.

    Raises:
        UserError: the tokenizer is missing, or is not that of the vocabulary or of the configuration.
    """
    codes, of_tokenizer, vectors = config.model.image_codes, {}, None
    if codes.depth == 1:
        return config, None
    if codes.codebook:
        of_tokenizer, vectors = distributed.from_rank_zero(lambda: _read_tokenizer(codes.codebook))
    return _filled(config, vocabulary, of_tokenizer), vectors


def with_code_shape(config: Config, vocabulary: Vocabulary | None) -> Config:
    """The configuration with the sizes that the cost of several codes an image token depends on; the VQ tokenizer is
    read only for what the configuration leaves out, by :func:`megatron_ext.vq.code_shape`.

    Args:
        vocabulary: None: not there.

    Raises:
        UserError: the tokenizer is missing, or is not that of the vocabulary or of the configuration.
    """
    codes = config.model.image_codes
    if codes.depth == 1:
        return config
    known = codes.width is not None and not (vocabulary is None and codes.codebook_size is None)
    return _filled(config, vocabulary, vq.code_shape(codes.codebook) if codes.codebook and not known else {})


def check_images(config: Config, mixture: Mixture, key: str) -> None:
    """Refuse data whose images were encoded by another tokenizer than that of the model's code vectors.

    Raises:
        UserError: names ``key``, the section of the configuration, and both tokenizers.
    """
    own, images = config.model.image_codes.fingerprint, mixture.vq
    if own and images and images["fingerprint"] != own:
        raise UserError(
            f"config: '{key}': images were encoded with VQ model {images['fingerprint']}, the code vectors of "
            f"'model.image_codes.codebook' are those of {own}; encode the images again, or name their tokenizer"
        )


def _filled(config: Config, vocabulary: Vocabulary | None, of_tokenizer: dict) -> Config:
    """The configuration with what the tokenizer and the vocabulary say about ``model.image_codes``, and checked."""
    codes, sizes = config.model.image_codes, dict(of_tokenizer)
    if vocabulary is not None:
        own = sizes.setdefault("codebook_size", vocabulary.codebook_size)
        if own != vocabulary.codebook_size:
            raise UserError(
                f"{codes.codebook}: has {own} codes, the vocabulary {vocabulary.folder} {vocabulary.codebook_size}"
            )
    for key, value in sizes.items():
        given = getattr(codes, key)
        if given not in (None, value):
            source = codes.codebook or vocabulary.folder
            raise UserError(f"config: 'model.image_codes.{key}' is {given}, {source} has {value}")
    model = dataclasses.replace(config.model, image_codes=dataclasses.replace(codes, **sizes))
    config = dataclasses.replace(config, model=model)
    validate_image_codes(config)
    return config


def _read_tokenizer(folder: str) -> tuple[dict, Tensor]:
    tokenizer = vq.load(folder)
    vectors = tokenizer.vectors.cpu()
    sizes = {"depth": tokenizer.depth, "codebook_size": len(vectors), "width": vectors.shape[1]}
    return sizes | {"fingerprint": tokenizer.fingerprint}, vectors
