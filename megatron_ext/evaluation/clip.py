"""CLIP score: the similarity of a picture and its prompt in the embedding space of a CLIP model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_ext.errors import UserError


class Clip:
    """A CLIP model in a local folder, as transformers' ``save_pretrained`` writes it; nothing is downloaded.

    Args:
        folder: model and processor: config.json, weights, tokenizer and preprocessor files.

    Attributes:
        name: accompanies every score, since scores of different models cannot be compared.

    Raises:
        UserError: the folder holds no CLIP model with its processor, or its weights are incomplete.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        # transformers takes seconds to import.
        from safetensors import SafetensorError
        from transformers import CLIPModel, CLIPProcessor

        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there; it must be a folder with a CLIP model and its processor")
        try:
            self._model, loaded = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{folder}: not a CLIP model with its processor ({reason})") from None
        # transformers would initialize missing weights at random.
        if absent := sorted(loaded["missing_keys"]):
            raise UserError(f"{folder}: its weights lack {absent[0]}; it must be a whole CLIP model")
        # They are in no file, and transformers 5 leaves them unset when torch's factories are redirected (cpu.py).
        for module in self._model.modules():
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        self._model.eval().to(device)
        self._device = torch.device(device)
        self._longest = self._model.config.text_config.max_position_embeddings
        digest = hashlib.sha256()
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        self.name = f"CLIP of {folder.resolve().name} (SHA-256 {digest.hexdigest()[:16]})"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """100 max(cos, 0) of each picture and its text, float64 [n]: CLIPScore without its factor of 2.5 and without a
        prefix before the text (Hessel et al., arXiv 2104.08718), as most work on image generation reports it. Texts are
        truncated to the model's context, 77 tokens in the released models."""
        inputs = self._processor(
            text=list(texts),
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._longest,
        )
        outputs = self._model(**inputs.to(self._device))
        cosines = torch.nn.functional.cosine_similarity(outputs.image_embeds.double(), outputs.text_embeds.double())
        return 100 * cosines.clamp(min=0).cpu().numpy()
