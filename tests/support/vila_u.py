"""Tiny folders in the layout of VILA-U, and of its vision tower alone, with random weights."""

import json
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from megatron_ext import text_model, tokenizer
from support.published_models import LINEAR, make_published
from support.text_models import sentences


def write_vision_tower(
    folder: Path,
    *,
    depth: int = 4,
    codebook_size: int = 24,
    width: int = 32,
    grid: int = 8,
    patch: int = 4,
    language_hidden: int = 32,
    head_width: int = 32,
    head_heads: int = 4,
    head_layers: int = 2,
    changes: dict[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Write ``vision_tower/``'s files: images of grid * patch pixels, codes grid x grid x depth, an encoder of two
    blocks, a decoder of log2(patch) halvings, a depth transformer.

    Args:
        language_hidden: width of the language model, h.
        changes: by name, tensors that replace those of the same name; None leaves one out.

    Returns:
        The tensors of model.safetensors.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    encoder, config = _encoder(width, grid * patch, patch)
    tensors = {f"rqvaesiglip.siglip_model.{name}": tensor for name, tensor in encoder.items()}
    tensors |= {f"rqvaesiglip.{name}": encoder[name].clone() for name in ("logit_scale", "logit_bias")}
    book = torch.cat([torch.randn(codebook_size, width), torch.zeros(1, width)])
    for number in range(depth):
        prefix = f"rqvaesiglip.quantizer.codebooks.{number}"
        tensors[f"{prefix}.weight"] = book.clone()
        tensors[f"{prefix}.embed_ema"] = book[:-1].clone()
        tensors[f"{prefix}.cluster_size_ema"] = torch.ones(codebook_size)
    tensors |= {f"rqvaesiglip.{name}": tensor for name, tensor in _decoder(width, patch).items()}
    tensors |= {
        f"rqtransformer.{name}": tensor
        for name, tensor in _depth_transformer(
            width, language_hidden, head_width, head_layers, depth, codebook_size
        ).items()
    }
    tensors |= changes or {}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder / "siglip")
    size = {"height": grid * patch, "width": grid * patch}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "crop_size": size, "resample": 3}))
    rqtransformer = {
        "block_size": [grid, grid, depth],
        "input_embed_dim_1": width,
        "input_embed_dim_2": language_hidden,
        "embed_dim": head_width,
        "vocab_size": codebook_size,
        "head": {"n_layer": head_layers, "block": {"n_head": head_heads, "embed_dim": head_width}},
    }
    rqvaesiglip = _tower_config(width, grid, patch, depth, codebook_size) | {"pretrained_model": str(folder / "siglip")}
    top = {"model_type": "rqvaesigliptransformer_model", "hidden_size": width, "a_key_of_the_future": 1}
    (folder / "config.json").write_text(json.dumps({**top, "rqvaesiglip": rqvaesiglip, "rqtransformer": rqtransformer}))
    return tensors


def _tower_config(width: int, grid: int, patch: int, depth: int, codebook_size: int) -> dict:
    return {
        "embed_dim": width,
        "n_embed": codebook_size,
        "latent_shape": [grid, grid, width],
        "code_shape": [grid, grid, depth],
        "shared_codebook": True,
        "restart_unused_codes": True,
        "decay": 0.99,
        "latent_loss_weight": 0.25,
        "ddconfig": {
            "ch": 32,
            "ch_mult": [1] * patch.bit_length(),
            "num_res_blocks": 1,
            "attn_resolutions": [grid],
            "z_channels": 32,
            "resolution": grid * patch,
            "in_channels": 3,
            "out_ch": 3,
            "dropout": 0.0,
        },
    }


def _encoder(width: int, image_size: int, patch: int) -> tuple[dict[str, Tensor], transformers.SiglipConfig]:
    blocks = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 32, "max_position_embeddings": 8, "projection_size": width}
    config = transformers.SiglipConfig(
        text_config={**blocks, **text, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**blocks, "image_size": image_size, "patch_size": patch},
    )
    model = transformers.SiglipModel(config)
    with torch.no_grad():  # as initialized, all images give nearly the same latents
        for parameter in model.vision_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, config


def _decoder(width: int, patch: int) -> dict[str, Tensor]:
    levels = patch.bit_length()
    config = transformers.JanusVQVAEConfig(
        latent_channels=32, base_channels=32, channel_multiplier=[1] * levels, num_res_blocks=1
    )
    tensors = {f"decoder.{name}": tensor for name, tensor in JanusVQVAEDecoder(config).state_dict().items()}
    tensors = {
        # VILA-U numbers the levels from the finest.
        re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name): tensor
        for name, tensor in tensors.items()
    }
    convolution = torch.nn.Conv2d(width, 32, 1)
    return tensors | {f"post_quant_conv.{name}": tensor for name, tensor in convolution.state_dict().items()}


def _depth_transformer(
    width: int, language_hidden: int, head_width: int, layers: int, depth: int, codebook_size: int
) -> dict[str, Tensor]:
    shapes = {
        "in_mlp_1": (head_width, width),
        "in_mlp_2": (head_width, language_hidden),
        "classifier_mlp.layer_norm": (head_width,),
        "classifier_mlp.linear": (codebook_size, head_width),
    }
    for layer in range(layers):
        prefix = f"head_transformer.blocks.{layer}"
        shapes |= {f"{prefix}.{norm}": (head_width,) for norm in ("ln1", "ln2")}
        shapes |= {f"{prefix}.attn.{name}": (head_width, head_width) for name in ("key", "query", "value", "proj")}
        shapes |= {f"{prefix}.mlp.0": (4 * head_width, head_width), f"{prefix}.mlp.2": (head_width, 4 * head_width)}
    tensors = {"pos_emb_d": 0.1 * torch.randn(1, depth, head_width)}
    for name, shape in shapes.items():
        weight = torch.randn(shape) / shape[-1] ** 0.5 if len(shape) == 2 else 1 + 0.1 * torch.randn(shape)
        tensors |= {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(shape[0])}
    return tensors


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def write_llama_tokenizer(file: Path, pieces: int = 400) -> Path:
    """A small SentencePiece model with Llama's conventions."""
    texts = file.with_name("texts.txt")
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("\n".join([*sentences(400), SYSTEM, "USER: what ASSISTANT: red"]))
    tokenizer.train([texts], file, pieces)
    texts.unlink()
    return file


def write_vila_u(folder: Path, dtype: torch.dtype = torch.float32, **tower) -> transformers.LlamaForCausalLM:
    """Write a whole published folder: ``llm`` of two layers with four tokens more than its tokenizer, ``mm_projector``,
    ``vision_tower``.

    Args:
        tower: as :func:`write_vision_tower`.

    Returns:
        The language model.
    """
    h, width = tower.setdefault("language_hidden", 64), tower.setdefault("width", 32)
    text_file = write_llama_tokenizer(folder / "llm" / "tokenizer.model")
    names, size = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>"), text_model.load(text_file).size
    llm = make_published(
        folder / "llm", rows=size + len(names), dtype=dtype, hidden_size=h, rope_parameters=LINEAR, rms_norm_eps=1e-5
    )
    (folder / "llm" / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(names)}))
    tensors = write_vision_tower(folder / "vision_tower", **tower)
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "vision_tower" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    shapes = {"layers.0.weight": (h, width), "layers.0.bias": (h,), "layers.2.weight": (h, h), "layers.2.bias": (h,)}
    projector = {name: 0.2 * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    (folder / "mm_projector").mkdir()
    save_file(projector, folder / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    (folder / "mm_projector" / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu"}))
    flags = {"mm_use_im_start_end": True, "mm_use_vi_start_end": True, "hidden_size": h, "mm_hidden_size": width}
    parts = {"llm_cfg": {}, "vision_tower_cfg": {}, "mm_projector_cfg": {}}
    top = {"architectures": ["VILAULlamaModel"], "model_type": "vila_u_llama", **flags, **parts}
    top["model_dtype"] = str(dtype)
    (folder / "config.json").write_text(json.dumps(top))
    return llm
