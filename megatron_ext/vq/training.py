"""Training a small VQ tokenizer of LlamaGen's kind (transformers' ``JanusVQVAE``) from scratch.

Latents and codes are unit vectors (LlamaGen, arXiv 2406.06525, section 3.1). The autoencoder first learns to
reconstruct without a codebook; then the codebook starts from its latents (:mod:`megatron_ext.vq.codebook`).
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.vq.codebook import MovingAverageCodebook, nearest
from megatron_ext.vq.pixels import from_bytes
from megatron_ext.vq.trained_folder import evaluate, publish, split_held_out
from megatron_ext.vq.training_config import VQTrainingConfig


def train(images: Tensor, out: Path, config: VQTrainingConfig, save_every: int = 500) -> dict:
    """Train on ``images`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    An interrupted training resumes from its last state in ``OUT/.training`` and ends with the same weights on the same
    machine.

    Returns:
        The contents of ``OUT/training.json``: held-out PSNR (dB), codebook use and perplexity, and the settings.

    Raises:
        UserError: there are too few images, or ``out`` holds a training with other settings.
    """
    held_out, images = split_held_out(images, config.held_out)
    trainer = _Trainer(config)
    state_file = out / ".training" / "state.pt"
    trainer.resume(state_file)
    losses = []
    with progress(total=config.steps, initial=trainer.step, desc="VQ", unit="step") as bar:
        while trainer.step < config.steps:
            losses.append(trainer.train_step(images))
            bar.update()
            if trainer.step % 50 == 0:
                bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
            if trainer.step % save_every == 0 and trainer.step < config.steps:
                trainer.save(state_file)
    publish(out, trainer.network.state_dict(), json.loads(trainer.network.config.to_json_string()))
    numbers = evaluate(out, held_out, {"pictures": len(images), "settings": asdict(config)})
    shutil.rmtree(state_file.parent, ignore_errors=True)
    return numbers


class _Trainer:
    """The state of a training: network, codebook averages, optimizer, generator, step."""

    def __init__(self, config: VQTrainingConfig):
        self.config, self.step = config, 0
        torch.manual_seed(config.seed)
        channels = 3 * config.patch**2
        self.network = transformers.JanusVQVAE(
            transformers.JanusVQVAEConfig(
                in_channels=channels,
                out_channels=channels,
                embed_dim=config.embed_dim,
                num_embeddings=config.codebook_size,
                latent_channels=config.channels * config.multipliers[-1],
                base_channels=config.channels,
                channel_multiplier=config.multipliers,
                num_res_blocks=1,
                num_patches=config.grid,
                dropout=0.0,
            )
        ).to(memory_format=torch.channels_last)
        vectors = self.network.quantize.embedding.weight
        vectors.requires_grad_(False)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._keep_local()
        self.codebook = MovingAverageCodebook(vectors, config.codebook_decay, self.generator)

    @property
    def quantizing(self) -> bool:
        return self.step >= self.config.warmup * self.config.steps

    def train_step(self, all_images: Tensor) -> float:
        """Train on a random batch; returns the reconstruction loss."""
        config, network = self.config, self.network
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1, (self.step + 1) / 50) * self._cosine()
        images = self._sample(all_images, config.batch_size).contiguous(memory_format=torch.channels_last)
        if self.step == math.ceil(config.warmup * config.steps):
            self._start_codebook(all_images)
        latents = F.normalize(network.quant_conv(network.encoder(images)), dim=1)
        quantized, commitment = self._quantize(latents) if self.quantizing else (latents, 0.0)
        decoded = network.decoder(network.post_quant_conv(quantized))
        error = decoded - images
        reconstruction = error.abs().mean() + error.square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        (reconstruction + config.commitment * commitment).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimizer.step()
        self._keep_local()
        self.step += 1
        return float(reconstruction.detach())

    def _sample(self, all_images: Tensor, count: int) -> Tensor:
        """``count`` random images, with replacement, as the network's input."""
        selected = torch.randint(len(all_images), (count,), generator=self.generator)
        return F.pixel_unshuffle(from_bytes(all_images[selected]), self.config.patch)

    @torch.no_grad()
    def _keep_local(self) -> None:
        """Zero the weights with which a local encoder would see beyond a patch."""
        if not self.config.local:
            return
        for module in self.network.encoder.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                center = module.weight[:, :, 1, 1].clone()
                module.weight.zero_()[:, :, 1, 1] = center
            elif isinstance(module, JanusVQVAEAttnBlock):
                module.proj_out.weight.zero_()

    def _cosine(self) -> float:
        return 0.05 + 0.95 * (1 + math.cos(math.pi * self.step / self.config.steps)) / 2

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, d, h, w] replaced by their codes (with straight-through gradients), and the commitment loss."""
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        codes = nearest(flat.detach(), self.codebook.vectors)
        self.codebook.follow(flat.detach(), codes)
        vectors = F.embedding(codes, self.codebook.vectors)
        vectors = vectors.view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return latents + (vectors - latents).detach(), (latents - vectors).square().sum(1).mean()

    @torch.no_grad()
    def _start_codebook(self, all_images: Tensor) -> None:
        images = self._sample(all_images, min(len(all_images), 512))
        latents = torch.cat(
            [F.normalize(self.network.quant_conv(self.network.encoder(batch)), dim=1) for batch in images.split(32)]
        )
        self.codebook.start(latents.permute(0, 2, 3, 1).flatten(0, 2))

    def save(self, file: Path) -> None:
        """Save everything that a resumed training needs; the file appears only when it is complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "counts": self.codebook.counts,
            "sums": self.codebook.sums,
        }
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def resume(self, file: Path) -> None:
        """Resume from a saved state, if there is one.

        Raises:
            UserError: the state was saved with other settings.
        """
        if not file.is_file():
            return
        state = torch.load(file)
        if state["config"] != asdict(self.config):
            raise UserError(f"{file}: a training with other settings was interrupted here; delete it or change --out")
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.codebook.counts, self.codebook.sums = state["counts"], state["sums"]
