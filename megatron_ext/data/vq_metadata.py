"""The entry ``vq`` of a data set's metadata (``VQModel.metadata``): the tokenizer of its images, and their size."""


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
