"""What a vocabulary's chat template cannot say: ``templates.json`` in the vocabulary's folder.

::

    {"captions": "conversation", "before_image": " ", "after_image": "\\n", "text_after_image": "continued",
     "given_images": "bare"}

Every key may be missing, and so may the file; documents are then as they were before there was one. The words and
control tokens around turns are the chat template's alone (:mod:`megatron_ext.chat_template`).
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import read_json

TEMPLATES = "templates.json"
_CHOICES = {
    "captions": ("plain", "conversation"),
    "text_after_image": ("apart", "continued"),
    "given_images": ("marked", "bare"),
}


@dataclass(frozen=True)
class Templates:
    """How images stand in what a chat template writes.

    Attributes:
        captions: ``conversation``: the chat template writes a caption as what a user says, and its picture as the
            answer. A picture without its caption, for classifier-free guidance, answers an empty turn. ``plain``: a
            caption is text.
        before_image, after_image: put between an image and what stands before or after it in the same turn.
        text_after_image: ``continued``: it is encoded as text that goes on; ``apart``: as a text of its own, with the
            space that a text model may put before one.
        given_images: in questions, ``marked``: between ``<boi>`` and ``<eoi>``, as in training documents; ``bare``:
            without them, and the text after an image is encoded apart.
    """

    captions: str = "plain"
    before_image: str = ""
    after_image: str = ""
    text_after_image: str = "apart"
    given_images: str = "marked"

    @classmethod
    def read(cls, folder: Path) -> "Templates":
        """Those of a vocabulary's folder.

        Raises:
            UserError: the file is damaged, or has a key or value that is none of the above.
        """
        file = folder / TEMPLATES
        if not file.is_file():
            return cls()
        values = read_json(file)
        if not isinstance(values, dict):
            raise UserError(f"{file}: not a JSON object")
        for key, value in values.items():
            if key not in cls.__dataclass_fields__:
                raise UserError(f"{file}: unknown key {key!r}, must be one of {', '.join(cls.__dataclass_fields__)}")
            choices = _CHOICES.get(key)
            if not isinstance(value, str) or (choices and value not in choices):
                expected = " or ".join(map(repr, choices)) if choices else "a text"
                raise UserError(f"{file}: '{key}' is {value!r}, must be {expected}")
        return cls(**values)


NO_TEMPLATES = Templates()
"""Those of a vocabulary without the file."""
