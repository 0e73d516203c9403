"""CLIP score: how near a picture is to its prompt in the space of a CLIP model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_ext.errors import UserError


class Clip:
    """A CLIP model in a local folder, as transformers' ``save_pretrained`` writes it; nothing is ever downloaded.

    Args:
        folder: model and processor: config.json, weights, tokenizer and preprocessor files.

    Attributes:
        name: goes with every number; scores of two models have nothing to do with one another.

    Raises:
        UserError: there is no CLIP model with its processor in the folder, or its weights are incomplete.
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
        # transformers would give random values to weights that are not in the file.
        if absent := sorted(loaded["missing_keys"]):
            raise UserError(f"{folder}: its weights lack {absent[0]}; it must be a whole CLIP model")
        # In no file; and transformers 5 leaves them unset where torch's factories have been redirected (cpu.py).
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
        """Of each picture and its text 100 max(cos, 0), float64 [n]: CLIPScore without its factor of 2.5 and without
        words before the text (Hessel et al., arXiv 2104.08718), as most image generation work gives it. A text is cut
        to what the model reads, 77 tokens in the released ones."""
        given = self._processor(
            text=list(texts),
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._longest,
        )
        made = self._model(**given.to(self._device))
        cosines = torch.nn.functional.cosine_similarity(made.image_embeds.double(), made.text_embeds.double())
        return 100 * cosines.clamp(min=0).cpu().numpy()
