"""CLIP score with a tiny random CLIP model, against another implementation's."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from megatron_ext.errors import UserError
from megatron_ext.evaluation.clip import Clip

TEXTS = ["a red cat", "two dogs", "dad", "a cat and a dog on a bed", "zebra", "cab"]


def make_clip(folder):
    """A random CLIP of 16 x 16 pixels and at most 12 letters."""
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**size, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    for parameter in model.parameters():  # so that texts and pictures differ in more than rounding
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pixels, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


class Reference:
    """What torchmetrics asks of a model: features as tensors."""

    def __init__(self, folder):
        # Built, not loaded whole: transformers' loading leaves buffers unset after this process has trained on CPUs.
        self._model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
        self._model.load_state_dict(load_file(folder / "model.safetensors"))
        self.config = self._model.config

    def get_image_features(self, pixels):
        return self._model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self._model.get_text_features(ids, mask).pooler_output

    def to(self, device):
        return self


def test_scores_are_those_of_torchmetrics(tmp_path):
    folder = make_clip(tmp_path / "tiny")
    scores = Clip(folder)([picture(i) for i in range(6)], TEXTS)
    processor = CLIPProcessor.from_pretrained(folder)
    # What is longer than the model reads is cut in another way there: to its first 12 tokens without an end.
    short = [i for i, text in enumerate(TEXTS) if len(text.replace(" ", "")) <= 10]
    assert len(short) == 5
    for i in short:
        pixels = torch.from_numpy(np.asarray(picture(i))).permute(2, 0, 1)
        expected = clip_score(pixels, TEXTS[i], lambda: (Reference(folder), processor))
        assert scores[i] == pytest.approx(float(expected), abs=1e-4)
    # A negative cosine counts as 0: with all pictures turned to the other side, those and only those count.
    model = CLIPModel.from_pretrained(folder)
    model.visual_projection.weight.data.neg_()
    model.save_pretrained(folder)
    turned = Clip(folder)([picture(i) for i in range(6)], TEXTS)
    assert ((scores == 0) == (turned > 0)).all()


def test_long_texts_are_cut_and_the_rest_of_the_batch_stays_as_it_is(tmp_path):
    clip = Clip(make_clip(tmp_path / "tiny"))
    together = clip([picture(0)] * 3, ["cab", "a b c d e f g h i j k l m", "a b c d e f g h i j n o p"])
    assert together[0] == pytest.approx(clip([picture(0)], ["cab"])[0], abs=1e-4)
    assert together[1] == pytest.approx(together[2], abs=1e-4)


def test_an_incomplete_model_is_refused_in_one_line(tmp_path):
    folder = make_clip(tmp_path / "tiny")
    assert Clip(folder).name.startswith("CLIP of tiny (SHA-256 ")
    with pytest.raises(UserError, match="nowhere: no config.json"):
        Clip(tmp_path / "nowhere")
    model = CLIPModel.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    model.save_pretrained(partial, state_dict=state)
    with pytest.raises(UserError, match="lack visual_projection.weight"):
        Clip(partial)
    (folder / "model.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="tiny: not a CLIP model") as caught:
        Clip(folder)
    assert "\n" not in str(caught.value)
