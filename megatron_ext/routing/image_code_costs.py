"""What image tokens of several codes cost besides the layers: the projector at their entry, the depth head at the end.

Multiply-adds of a forward pass, D codes of a token out of K, code vectors of width e, hidden size h; E and L are the
width and the layers of the depth head::

    projector     e*h + h*h                                      every image token
    depth head    h*E + (D-1)*e*E                                its two entries, a token with code targets
                  + L * (12*D*E*E + E*D*(D+1))                   its layers: projections and FFN of 4*E; attention
                  + D*E*K                                        its classifier

Learned embeddings of codes (``image_codes.codebook: ""``) enter without a product: no projector, no entry of codes.
"""

from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError


def projector_multiply_adds(model: ModelConfig) -> int:
    """Multiply-adds of the projector for one image token."""
    width = vector_width(model)
    return 0 if width is None else width * model.hidden_size + model.hidden_size**2


def depth_head_multiply_adds(model: ModelConfig) -> int:
    """Multiply-adds of the depth head for one token with code targets."""
    if model.image_codes.depth == 1:
        return 0
    depth, head = model.image_codes.depth, model.image_codes.head
    width = head.hidden_size
    entries = model.hidden_size * width + (depth - 1) * (vector_width(model) or 0) * width
    layers = head.num_layers * (12 * depth * width**2 + width * depth * (depth + 1))
    return entries + layers + depth * width * codebook_size(model)


def projector_parameters(model: ModelConfig) -> int:
    """Parameters that make an image token of its codes; frozen code vectors are none."""
    h, width = model.hidden_size, vector_width(model)
    if model.image_codes.depth == 1:
        return 0
    if width is None:
        return model.image_codes.depth * codebook_size(model) * h
    return (width + 1) * h + (h + 1) * h


def depth_head_parameters(model: ModelConfig) -> int:
    """Parameters of the depth head."""
    if model.image_codes.depth == 1:
        return 0
    depth, head, codes = model.image_codes.depth, model.image_codes.head, codebook_size(model)
    width, of_vectors = head.hidden_size, vector_width(model)
    # Nothing sees the last code of a token.
    entry = (depth - 1) * codes * width if of_vectors is None else (of_vectors + 1) * width
    entries = (model.hidden_size + 1) * width + entry + depth * width
    layer = 12 * width**2 + 13 * width  # biases of four projections, of the FFN's 4 * width and width, and two norms
    return entries + head.num_layers * layer + 2 * width + (width + 1) * codes


def vector_width(model: ModelConfig) -> int | None:
    """e, width of the frozen code vectors; None where there are none.

    Raises:
        UserError: the configuration does not say.
    """
    codes = model.image_codes
    return _known(codes.width, "width") if codes.codebook else codes.width


def codebook_size(model: ModelConfig) -> int:
    """K, codes that the depth head tells apart.

    Raises:
        UserError: the configuration does not say.
    """
    return _known(model.image_codes.codebook_size, "codebook_size")


def _known(value: int | None, key: str) -> int:
    if value is None:
        raise UserError(
            f"config: 'model.image_codes.{key}' is empty; set it, or data.vocabulary, to count several codes"
        )
    return value
