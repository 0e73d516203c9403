"""Text and pictures to the inputs of the model, and its outputs back to pictures."""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from .configuration_unified import GENERATION, UNDERSTANDING


class UnifiedImageProcessor(BaseImageProcessor):
    """A picture's largest centred rectangle of the right shape, scaled (bilinear), in [-1, 1]."""

    model_input_names = ["pixel_values"]

    def __init__(self, image_size=(16, 16), **kwargs):
        super().__init__(**kwargs)
        self.image_size = list(image_size)

    def preprocess(self, images, return_tensors="pt", **unused):
        """Pictures (Pillow, arrays [H, W, 3] of bytes, files or addresses, lists of them) to ``pixel_values``
        [n, 3, H, W]."""
        pixels = np.stack([np.array(self._fit(image)) for image in _flat(images)])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _fit(self, image):
        image = load_image(image) if isinstance(image, str) else image
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image = ImageOps.exif_transpose(image).convert("RGB")
        height, width = self.image_size
        scale = min(image.height / height, image.width / width)
        h, w = height * scale, width * scale
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = left, top, left + w, top + h
        return image.resize((width, height), Image.Resampling.BILINEAR, box)


class UnifiedProcessor(ProcessorMixin):
    """Prompts as in training: ``<bos>`` first, ``<image>`` is ``<boi>``, a place for each code, ``<eoi>``."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_length=16,
        text_prefix="",
        repeats_leading_space=False,
        **kwargs,
    ):
        """
        Args:
            image_length: codes of a picture.
            text_prefix: what training put before texts. A chat template writes it; captions, and texts after an image,
                get it here.
            repeats_leading_space: whether training had a space more in stretches of text that begin with one.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_length, self.text_prefix = image_length, text_prefix
        self.repeats_leading_space = repeats_leading_space

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, generation_mode="text", drawn=None, return_tensors="pt", **unused):
        """Prompts, padded on the left: ``input_ids``, ``attention_mask``, and ``pixel_values`` if there are images.

        Args:
            images: one for each ``<image>``, in order; lists of them are joined.
            text: a prompt or a list of prompts.
            generation_mode: ``image`` adds the ``<boi>`` that a picture follows.
            drawn: numbers, from 0, of the prompt's images that were drawn in the course of the document; a list of such
                lists for several prompts. ``token_uses`` says so to the model.
        """
        if text is None:
            raise ValueError(f"text is missing: a prompt, with {self.tokenizer.image_token} for each image")
        texts = [text] if isinstance(text, str) else list(text)
        images = [] if images is None else _flat(images)
        wanted = sum(text.count(self.tokenizer.image_token) for text in texts)
        if wanted != len(images):
            raise ValueError(f"{wanted} times {self.tokenizer.image_token} in the text, but {len(images)} images")
        ids = [self._ids(text, begin_image=generation_mode == "image") for text in texts]
        inputs = self.tokenizer.pad({"input_ids": ids}, padding_side="left")
        if images:
            inputs["pixel_values"] = self.image_processor(images)["pixel_values"]
        if drawn is not None:
            inputs["token_uses"] = self._uses(inputs["input_ids"], drawn, generation_mode == "image")
        return BatchFeature(dict(inputs), tensor_type=return_tensors)

    def _ids(self, text, begin_image):
        tokenizer = self.tokenizer
        boi, eoi, place = tokenizer.convert_tokens_to_ids(
            [tokenizer.boi_token, tokenizer.eoi_token, tokenizer.image_token]
        )
        parts = text.split(tokenizer.image_token)
        if text.startswith(tokenizer.bos_token):  # written by a chat template
            ids = []
        else:
            ids = [tokenizer.bos_token_id]
            parts = [self.text_prefix + part if part and (i or begin_image) else part for i, part in enumerate(parts)]
        # What stands between two images is encoded by itself, as in training.
        for i, part in enumerate(parts):
            ids += [boi, *[place] * self.image_length, eoi] if i else []
            space = " " if self.repeats_leading_space and part.startswith(" ") else ""
            ids += tokenizer(space + part, add_special_tokens=False)["input_ids"]
        return ids + [boi] * begin_image

    def _uses(self, rows, drawn, begin_image):
        """The use of each token of prompts, as :meth:`generate` has it by default, but with images that were drawn."""
        drawn = [drawn] if all(isinstance(number, int) for number in drawn) else drawn
        if len(drawn) != len(rows):
            raise ValueError(f"drawn={drawn}: lists for {len(drawn)} prompts, but there are {len(rows)}")
        places = np.array(rows) == self.tokenizer.convert_tokens_to_ids(self.tokenizer.image_token)
        uses = np.full(places.shape, UNDERSTANDING)
        for row, place, numbers in zip(uses, places, drawn):
            images = place.sum() // self.image_length
            if not set(numbers) <= set(range(images)):
                raise ValueError(f"drawn={numbers}: the prompt has {images} images, numbered from 0")
            row[place] = np.where(np.isin(np.arange(images), numbers), GENERATION, UNDERSTANDING).repeat(
                self.image_length
            )
            if begin_image and not images:
                row[:] = GENERATION
        return uses.tolist()

    def batch_decode(self, *arguments, **kwargs):
        return self.tokenizer.batch_decode(*arguments, **kwargs)

    def decode(self, *arguments, **kwargs):
        return self.tokenizer.decode(*arguments, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """Token ids as text; with ``generation_mode="image"`` pixels [n, 3, H, W] in [-1, 1] as Pillow images."""
        if generation_mode != "image":
            return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)
        pixels = ((generated_outputs + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def _flat(images):
    if isinstance(images, (list, tuple)):
        return [image for inner in images for image in _flat(inner)]
    return [images]
