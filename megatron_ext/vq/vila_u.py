"""VILA-U's vision tower (arXiv 2409.04429): SigLIP's image encoder, residual codes of one codebook, a VQGAN decoder.

The folder is ``vision_tower/`` of a published VILA-U folder. The networks are transformers' own: SigLIP without its
last block and its final norm, which the latents do not pass through, and Janus's decoder, whose levels are numbered the
other way round. Their sizes are those of the weights. Text encoder and depth transformer are not read.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.vq.image_decoder import SQUASH, Preparation
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes

_PREFIX = "rqvaesiglip."
_VISION = "siglip_model.vision_model."
_BOOK = re.compile(r"quantizer\.codebooks\.\d+\.weight")
_UNUSED = re.compile(r"siglip_model\.text_model\.|siglip_model\.vision_model\.(post_layernorm|head)\.|(.*\.)?logit_")

_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Attention heads of the published SigLIP encoders, by width: no weight tells them."""


class VilaUVisionTower(VQModel):
    """The vision tower. Pictures are truncated to bytes, as VILA-U does, so they lie on the values of bytes.

    Attributes:
        left_out: names of the tensors of encoder, quantizer and decoder in the folder that encoding and decoding do not
            need.
    """

    kind = "rqvaesigliptransformer_model"
    memory_format = torch.contiguous_format
    preparation = Preparation(filter="bicubic", from_top=True, understanding=SQUASH)

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "VilaUVisionTower":
        """Build the networks from the weights in ``folder`` and ``config``, whose unknown keys are ignored.

        Raises:
            UserError: a key or a weight is missing, sizes contradict each other, or each depth has its own codebook.
        """
        settings = _Settings(folder, config)
        weights = _Weights(folder)
        network = nn.Module()
        network.vision_model = _vision_model(folder, settings, weights)
        network.quantize = nn.Embedding.from_pretrained(_codebook(settings, weights))
        network.post_quant_conv = nn.Conv2d(*reversed(weights["post_quant_conv.weight"].shape[:2]), 1)
        network.decoder = _decoder(settings, weights)
        left_out = _load(network, weights, settings.blocks)
        tower = cls(network, folder, settings.grid, settings.image_size, settings.depth)
        tower.decoder_latent_shape, tower.left_out = settings.decoder_latent_shape, left_out
        return tower

    def _codebook(self) -> Tensor:
        return self.network.quantize.weight

    def _latents(self, images: Tensor) -> Tensor:
        hidden = self.network.vision_model.embeddings(images)
        hidden = self.network.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
        return hidden.transpose(1, 2).unflatten(2, self.grid)

    def _images(self, latents: Tensor) -> Tensor:
        return from_bytes(((self._decoded(latents).float() + 1) * 127.5).clamp(0, 255).floor())

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.decoder_latent_shape:
            latents = F.interpolate(latents, self.decoder_latent_shape, mode="bilinear")
        latents = latents.to(self.network.post_quant_conv.weight.dtype)
        return self.network.decoder(self.network.post_quant_conv(latents))


class _Settings:
    """What config.json and preprocessor_config.json tell.

    Attributes:
        file: config.json.
        grid, depth: positions (h, w), and codes of each.
        codebook_size: K, without the padding row.
        decoder_latent_shape: to which latents are resized before they are decoded; None: not.
        shared: one codebook for all depths, so that its further copies may be left out of the file.
        encoder: SigLIP's own configuration if ``pretrained_model`` is a folder, else empty.
        blocks: of the encoder that the latents pass through; set with the encoder.
    """

    def __init__(self, folder: Path, config: dict):
        self.file, section = folder / "config.json", config.get("rqvaesiglip")
        for key in ("code_shape", "n_embed"):
            if not isinstance(section, dict) or key not in section:
                raise UserError(f"{self.file}: 'rqvaesiglip.{key}' is missing")
        *grid, self.depth = section["code_shape"]
        self.codebook_size = section["n_embed"]
        self.grid = tuple(grid)
        latents = section.get("latent_shape", section["code_shape"])[:2]
        if latents != grid:
            raise UserError(
                f"{self.file}: code_shape {grid} and latent_shape {latents}: a code of several latents is not known"
            )
        shape = section.get("decoder_latent_shape")
        self.decoder_latent_shape = tuple(shape) if shape else None
        self.shared = bool(section.get("shared_codebook"))
        pretrained = Path(section.get("pretrained_model") or folder) / "config.json"
        self.encoder = read_json(pretrained).get("vision_config", {}) if pretrained.is_file() else {}
        self.image_size = _image_size(folder / "preprocessor_config.json")
        self.blocks = 0


def _image_size(file: Path) -> tuple[int, int]:
    if not file.is_file():
        raise UserError(f"{file}: not found; it tells the size of the images")
    config = read_json(file)
    size = config.get("crop_size") or config.get("size")
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise UserError(f"{file}: expected 'crop_size' or 'size' with 'height' and 'width', found {size!r}")


class _Weights:
    """The tensors below ``rqvaesiglip.`` by name, read when they are asked for, as float32."""

    def __init__(self, folder: Path):
        self.folder, index = folder, folder / "model.safetensors.index.json"
        parts = {*read_json(index)["weight_map"].values()} if index.is_file() else {"model.safetensors"}
        self._files = {}
        for name in sorted(parts):
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name}: cannot be read ({' '.join(str(error).split())})") from None
            names = list(file.keys())
            self._files |= {key.removeprefix(_PREFIX): file for key in names if key.startswith(_PREFIX)}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self.folder}: the weight {_PREFIX}{name} is missing")
        return self._files[name].get_tensor(_PREFIX + name).float()

    def count(self, pattern: str) -> int:
        """How many numbers stand at the group of ``pattern`` at the start of a name."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})


def _vision_model(folder: Path, settings: _Settings, weights: _Weights) -> nn.Module:
    patches = weights[f"{_VISION}embeddings.patch_embedding.weight"].shape
    positions = len(weights[f"{_VISION}embeddings.position_embedding.weight"])
    (height, width), patch = settings.image_size, patches[-1]
    grid = (height // patch, width // patch)
    if height != width or grid != settings.grid or positions != grid[0] * grid[1]:
        raise UserError(
            f"{folder}: images of {height} x {width} pixels in patches of {patch}, {positions} encoder positions and "
            f"codes {list(settings.grid)} contradict each other"
        )
    # The latents are the output of the block before the last.
    settings.blocks = weights.count(rf"{re.escape(_VISION)}encoder\.layers\.(\d+)\.") - 1
    heads = settings.encoder.get("num_attention_heads") or _HEADS.get(patches[0])
    if heads is None:
        raise UserError(
            f"{settings.file}: attention heads of a SigLIP encoder of width {patches[0]} are unknown; let "
            "'rqvaesiglip.pretrained_model' be a folder with its config.json"
        )
    sizes = {
        "hidden_size": patches[0],
        "intermediate_size": len(weights[f"{_VISION}encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": settings.blocks,
        "num_attention_heads": heads,
        "image_size": height,
        "patch_size": patch,
        "vision_use_head": False,
    }
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**settings.encoder, **sizes}))
    del model.post_layernorm
    return model


def _codebook(settings: _Settings, weights: _Weights) -> Tensor:
    """The code vectors [K, e], without the padding row that the file keeps last."""
    names = [f"quantizer.codebooks.{depth}.weight" for depth in range(settings.depth)]
    for name in weights:
        if _BOOK.fullmatch(name) and name not in names:
            raise UserError(
                f"{settings.file}: 'rqvaesiglip.code_shape' tells {settings.depth} codes a position, but "
                f"{weights.folder} holds {_PREFIX}{name}"
            )
    book, rows = weights[names[0]], settings.codebook_size + 1
    if len(book) != rows or book[-1].any():
        actual = f"{len(book)} rows" if len(book) != rows else "another last row"
        raise UserError(
            f"{weights.folder}: {_PREFIX}{names[0]} has {actual}, expected 'rqvaesiglip.n_embed' + 1 = {rows} rows, "
            "the last one of zeros"
        )
    for name in names[1:]:
        if settings.shared and name not in weights:
            continue
        if not torch.equal(weights[name], book):
            raise UserError(
                f"{weights.folder}: {_PREFIX}{name} differs from {_PREFIX}{names[0]}; a codebook for each depth is "
                "not supported, all depths must share one"
            )
    return book[:-1].clone()


def _decoder(settings: _Settings, weights: _Weights) -> nn.Module:
    levels = weights.count(r"decoder\.up\.(\d+)\.")
    key = "decoder_latent_shape" if settings.decoder_latent_shape else "code_shape"
    latents = settings.decoder_latent_shape or settings.grid
    drawn = tuple(side << (levels - 1) for side in latents)
    if drawn != settings.image_size:
        raise UserError(
            f"{settings.file}: 'rqvaesiglip.{key}' {list(latents)} and a decoder of {levels} levels make pictures of "
            f"{list(drawn)} pixels, but those that are encoded have {list(settings.image_size)}"
        )
    channels = [len(weights[f"decoder.up.{level}.block.0.conv1.bias"]) for level in range(levels)]
    config = transformers.JanusVQVAEConfig(
        latent_channels=weights["decoder.conv_in.weight"].shape[1],
        base_channels=1,
        channel_multiplier=channels,
        num_res_blocks=weights.count(r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        out_channels=len(weights["decoder.conv_out.bias"]),
    )
    return JanusVQVAEDecoder(config)


def _load(network: nn.Module, weights: _Weights, blocks: int) -> list[str]:
    """Fill the networks. Returns the names of the tensors that none of them has."""
    levels = len(network.decoder.up)
    expected = {_stored_name(name, levels): tensor for name, tensor in network.state_dict().items()}
    del expected["quantize.weight"]
    # The last block, at least, is there and not used.
    unused = re.compile(rf"{_UNUSED.pattern}|quantizer\.|{re.escape(_VISION)}encoder\.layers\.{blocks}\.")
    for name in weights:
        if name not in expected and not unused.match(name):
            raise UserError(f"{weights.folder}: the weight {_PREFIX}{name} is not one of the networks that are known")
    with torch.no_grad():
        for name, tensor in expected.items():
            stored = weights[name]
            if stored.shape != tensor.shape:
                raise UserError(
                    f"{weights.folder}: {_PREFIX}{name} is {list(stored.shape)}, expected {list(tensor.shape)}"
                )
            tensor.copy_(stored)
    return [_PREFIX + name for name in weights if name not in expected and not _BOOK.fullmatch(name)]


def _stored_name(name: str, levels: int) -> str:
    """The name in the folder of a network's weight; there, the decoder's coarsest level is the last."""
    if name.startswith("vision_model."):
        return "siglip_model." + name
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
