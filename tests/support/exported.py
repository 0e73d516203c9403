"""Models with random weights as checkpoints and as Hugging Face folders."""

import dataclasses
from pathlib import Path

import torch

from megatron_ext import config_file, tokenizer
from megatron_ext.config import Config
from megatron_ext.vocabulary import Vocabulary
from support.tiny_vq import CODES

SHAPE = ["model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2"]
ALL_FEATURES = ["model.qkv_bias=true", "model.qk_norm=true", "model.head_size=12", "model.rotary_scaling={factor: 8.0}"]


def llama_vocabulary(folder: Path) -> Vocabulary:
    """A vocabulary over a text model with LLaMA's conventions, as the project trains them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"{n} red circles left of {n + 1} blue squares? what colour is it" for n in range(99)]
    (folder / "texts.txt").write_text("\n".join(texts))
    tokenizer.train([folder / "texts.txt"], folder / "tokenizer.model", 300)
    return Vocabulary.create(folder, folder / "tokenizer.model", CODES)


def randomize(model: torch.nn.Module) -> None:
    """Weights that leave no term of the model invisible."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(
            1 + noise if "norm" in name else 2 * noise if "embed" in name or "image_pos" in name else noise
        )


def write_checkpoint(folder: Path, vocabulary: Vocabulary, *overrides: str) -> Path:
    """A run in ``folder`` whose only checkpoint has random weights. Needs a world of one process."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.training.run import Progress, identity_of
    from megatron_ext.transformer.model import build_chunks
    from megatron_ext.transformer.resolved import padded_vocab_size, resolve

    config = config_file.load(Config, [], [*SHAPE, f"data.vocabulary={vocabulary.folder}", *overrides])
    resolved = resolve(config, padded_vocab_size(config, vocabulary))
    (model,) = build_chunks(resolved)
    randomize(model)
    progress = dataclasses.asdict(Progress())
    state = {
        "progress": progress,
        "config": dataclasses.asdict(config),
        "data": None,
        **identity_of(resolved, vocabulary),
    }
    Checkpointer(folder / "checkpoints", keep=0).save(0, [model], None, state)
    return folder
