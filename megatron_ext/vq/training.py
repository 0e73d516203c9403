"""Training a small VQ tokenizer of LlamaGen's kind (transformers' ``JanusVQVAE``) from scratch.

Latents and codes are unit vectors (LlamaGen, arXiv 2406.06525, section 3.1), or, with several codes a position, sums of
residual codes (VILA-U, arXiv 2409.04429). The autoencoder first learns to reconstruct without a codebook; then the
codebook starts from its latents (:mod:`.codebook`, :mod:`.residual_codebook`). The loss has no perceptual and no
adversarial term: their networks would have to be downloaded.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.vq.adapters import ResidualVQ
from megatron_ext.vq.alignment import Alignment
from megatron_ext.vq.codebook import MovingAverageCodebook, nearest
from megatron_ext.vq.loading import load
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes
from megatron_ext.vq.residual_codebook import ResidualCodebook
from megatron_ext.vq.trained_folder import evaluate, publish, reconstruct, split_held_out
from megatron_ext.vq.training_config import VQTrainingConfig


def train(
    images: Tensor, out: Path, config: VQTrainingConfig, save_every: int = 500, captions: list[str] | None = None
) -> dict:
    """Train on ``images`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    An interrupted training resumes from its last state in ``OUT/.training`` and ends with the same weights on the same
    machine.

    Args:
        captions: of the images; the codes learn to agree with them (:mod:`.alignment`), with the weight of the
            reconstruction.

    Returns:
        The contents of ``OUT/training.json``: held-out PSNR (dB), codebook use and perplexity, and the settings; with
        captions the share of held-out pictures whose own caption is the nearest.

    Raises:
        UserError: there are too few images, or ``out`` holds a training with other settings or captions.
    """
    held_out, images = split_held_out(images, config.held_out)
    trainer = _Trainer(config, captions[config.held_out :] if captions else None)
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
    network_config = json.loads(trainer.network.config.to_json_string())
    if config.depth > 1:
        network_config |= {"model_type": ResidualVQ.kind, "depth": config.depth}
    publish(out, trainer.network.state_dict(), network_config)
    facts = {"pictures": len(images), "settings": config.settings()}
    if captions:
        facts |= trainer.retrieval(load(out), held_out, captions[: config.held_out])
    numbers = evaluate(out, held_out, facts)
    shutil.rmtree(state_file.parent, ignore_errors=True)
    return numbers


class _Trainer:
    """The state of a training: network, codebook averages, optimizer, generator, step."""

    def __init__(self, config: VQTrainingConfig, captions: list[str] | None = None):
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
        self.alignment = Alignment(captions, config.embed_dim, config.grid**2) if captions else None
        self.caption_ids = self.alignment.ids(captions) if captions else None
        self.captions_hash = hashlib.sha256(json.dumps(captions).encode()).hexdigest() if captions else None
        trained = [p for module in self._trained() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._keep_local()
        if config.depth > 1:
            self.codebook = ResidualCodebook(vectors, config.depth, config.codebook_decay, self.generator)
        else:
            self.codebook = MovingAverageCodebook(vectors, config.codebook_decay, self.generator)

    @property
    def quantizing(self) -> bool:
        return self.step >= self.config.warmup * self.config.steps

    def train_step(self, all_images: Tensor) -> float:
        """Train on a random batch; returns the reconstruction loss."""
        config, network = self.config, self.network
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1, (self.step + 1) / 50) * self._cosine()
        selected = self._select(all_images, config.batch_size)
        images = self._input(all_images[selected]).contiguous(memory_format=torch.channels_last)
        if self.step == math.ceil(config.warmup * config.steps):
            self._start_codebook(all_images)
        latents = self._latents(images)
        quantized, commitment = self._quantize(latents) if self.quantizing else (latents, 0.0)
        decoded = network.decoder(network.post_quant_conv(quantized))
        error = decoded - images
        reconstruction = error.abs().mean() + error.square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss = reconstruction + config.commitment * commitment
        if self.alignment:
            loss = loss + self.alignment.loss(quantized, self.caption_ids[selected])
        loss.backward()
        for module in self._trained():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.optimizer.step()
        self._keep_local()
        self.step += 1
        return float(reconstruction.detach())

    def retrieval(self, vq: VQModel, images: Tensor, captions: list[str]) -> dict:
        """How well captions find images uint8 [n, 3, s, s] by their codes; see :meth:`.Alignment.retrieval`."""
        codes, _ = reconstruct(vq, images)
        latents = vq.quantized(codes).unflatten(1, vq.grid).permute(0, 3, 1, 2)
        return self.alignment.retrieval(latents, self.alignment.ids(captions))

    def _trained(self) -> list[torch.nn.Module]:
        return [self.network, *([self.alignment] if self.alignment else [])]

    def _select(self, all_images: Tensor, count: int) -> Tensor:
        """The numbers of ``count`` random images, with replacement."""
        return torch.randint(len(all_images), (count,), generator=self.generator)

    def _input(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, s, s] as the network's input."""
        return F.pixel_unshuffle(from_bytes(images), self.config.patch)

    def _latents(self, images: Tensor) -> Tensor:
        latents = self.network.quant_conv(self.network.encoder(images))
        return latents if self.config.depth > 1 else F.normalize(latents, dim=1)

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
        if self.config.depth > 1:
            sums = self.codebook.quantize(flat.detach())
            vectors = sums[-1].view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            commitment = torch.stack([(flat - first).square().mean() for first in sums]).mean()
            return latents + (vectors - latents).detach(), commitment
        codes = nearest(flat.detach(), self.codebook.vectors)
        self.codebook.follow(flat.detach(), codes)
        vectors = F.embedding(codes, self.codebook.vectors)
        vectors = vectors.view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return latents + (vectors - latents).detach(), (latents - vectors).square().sum(1).mean()

    @torch.no_grad()
    def _start_codebook(self, all_images: Tensor) -> None:
        images = self._input(all_images[self._select(all_images, min(len(all_images), 512))])
        latents = torch.cat([self._latents(batch) for batch in images.split(32)])
        self.codebook.start(latents.permute(0, 2, 3, 1).flatten(0, 2))

    def _settings(self) -> dict:
        return self.config.settings() | ({"captions": self.captions_hash} if self.alignment else {})

    def save(self, file: Path) -> None:
        """Save everything that a resumed training needs; the file appears only when it is complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": self._settings(),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "counts": self.codebook.counts,
            "sums": self.codebook.sums,
        }
        if self.alignment:
            state["alignment"] = self.alignment.state_dict()
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def resume(self, file: Path) -> None:
        """Resume from a saved state, if there is one.

        Raises:
            UserError: the state was saved with other settings or captions.
        """
        if not file.is_file():
            return
        state = torch.load(file)
        if state["config"] != self._settings():
            raise UserError(
                f"{file}: a training with other settings or captions was interrupted here; delete it or change --out"
            )
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        if self.alignment:
            self.alignment.load_state_dict(state["alignment"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.codebook.counts, self.codebook.sums = state["counts"], state["sums"]
