"""The entry ``vq`` of a data set's metadata (``VQModel.metadata``): the tokenizer of its images, and their size."""

from megatron_ext.errors import UserError

MAX_CODEBOOK = 1 << 16
"""Most codes of a codebook of which an image token has several: packed rows have 16 bits for each."""


def depth_of(vq: dict | None) -> int:
    """Codes of an image token, from the metadata's entry ``vq``."""
    return vq.get("depth", 1) if vq else 1


def codes_of_image(vq: dict) -> int:
    """Codes of an image, from the metadata's entry ``vq``."""
    height, width = vq["grid"]
    return height * width * depth_of(vq)


def grid_text(vq: dict) -> str:
    """The grid of the metadata's entry ``vq``, for messages."""
    height, width = vq["grid"]
    return f"the VQ grid is {height} x {width}" + (f" of {depth_of(vq)} codes" if depth_of(vq) > 1 else "")


def check_codebook(vq: dict | None, prefix) -> None:
    """Refuse a codebook of which packed rows cannot hold several codes a token.

    Raises:
        UserError: names the data set at ``prefix`` and the size.
    """
    if depth_of(vq) > 1 and vq["codebook_size"] > MAX_CODEBOOK:
        raise UserError(
            f"{prefix}: a codebook of {vq['codebook_size']} codes; with {depth_of(vq)} codes an image token at most "
            f"{MAX_CODEBOOK} are possible"
        )
