"""Training a small VQ tokenizer of LlamaGen's kind (transformers' ``JanusVQVAE``) from scratch.

Latents and codes are unit vectors (LlamaGen, arXiv 2406.06525, section 3.1). The autoencoder first learns to
reconstruct without a codebook; then the codebook starts from its latents (:mod:`megatron_ext.vq.codebook`).
"""

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.vq.codebook import MovingAverageCodebook, nearest
from megatron_ext.vq.loading import load
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes, to_bytes


@dataclass
class VQTrainingConfig:
    """The shape of a small tokenizer and its training.

    Attributes:
        image_size, grid: pixels and codes along a side.
        patch: pixels along a side of the network's input patches; larger is faster and coarser.
        local: the encoder sees only the patch of a code (and the norms' statistics of the image), so codes describe
            what is in a patch, not what surrounds it. Needs a network without halvings. For images of many different
            patches: on images of a few flat colors the norms remove too much.
        channels: of the convolutions at the finest level; doubled once, at the first halving. At least 64: the norms
            have 32 groups, and with one channel per group they would remove the colors.
        warmup: fraction of the steps before the codebook starts.
        commitment: weight of the distance between a latent and its code.
    """

    image_size: int = 64
    grid: int = 8
    patch: int = 4
    codebook_size: int = 512
    embed_dim: int = 8
    channels: int = 64
    steps: int = 2000
    batch_size: int = 16
    lr: float = 2e-3
    local: bool = False
    warmup: float = 0.3
    commitment: float = 0.25
    codebook_decay: float = 0.97
    held_out: int = 128
    seed: int = 1234

    def __post_init__(self):
        halvings = math.log2(self.image_size / self.patch / self.grid) if self.image_size % self.patch == 0 else 0.5
        if halvings < 0 or halvings % 1:
            raise UserError(
                f"image size {self.image_size}, patch {self.patch}, grid {self.grid}: image size / patch / grid "
                "must be a power of two"
            )
        if self.channels % 32 or self.channels < 64:
            raise UserError(f"channels {self.channels}: must be a multiple of 32 (the groups of the norms), 64 or more")
        if self.local and halvings:
            raise UserError(f"local: image size / patch / grid must be 1, it is {2**halvings:g}")
        self.multipliers = [1] + [2] * int(halvings)


def train(images: Tensor, out: Path, config: VQTrainingConfig, save_every: int = 500) -> dict:
    """Train on ``images`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    An interrupted training resumes from its last state in ``OUT/.training`` and ends with the same weights on the same
    machine.

    Returns:
        The contents of ``OUT/training.json``: held-out PSNR (dB), codebook use and perplexity, and the settings.

    Raises:
        UserError: there are too few images, or ``out`` holds a training with other settings.
    """
    if len(images) <= config.held_out:
        raise UserError(f"{len(images)} images are too few: {config.held_out} are held out for evaluation")
    held_out, images = images[: config.held_out], images[config.held_out :]
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
    _publish(trainer.network, out)
    vq = load(out)
    codes, reconstructed = reconstruct(vq, held_out)
    numbers = {
        **quality(held_out, reconstructed, codes, config.codebook_size),
        "pictures": len(images),
        "fingerprint": vq.fingerprint,
        "settings": asdict(config),
    }
    save_reconstructions(held_out[:16], reconstructed[:16], out / "reconstructions.png")
    write_json(out / "training.json", numbers)
    shutil.rmtree(state_file.parent, ignore_errors=True)
    return numbers


def reconstruct(vq: VQModel, images: Tensor, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Codes [n, h*w] of images uint8 [n, 3, s, s], and the images decoded from them, uint8."""
    codes = torch.cat([vq.encode(from_bytes(batch)) for batch in images.split(batch_size)])
    decoded = torch.cat([vq.decode(batch) for batch in codes.split(batch_size)])
    return codes, to_bytes(decoded).cpu()


def quality(originals: Tensor, reconstructed: Tensor, codes: Tensor, codebook_size: int) -> dict:
    """Peak signal-to-noise ratio (dB, mean over images), share of codes in use, and their perplexity."""
    error = (originals.float() - reconstructed.float()).square().mean((1, 2, 3)).clamp(min=1e-3)
    share = torch.bincount(codes.flatten().cpu(), minlength=codebook_size).double() / codes.numel()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {
        "psnr": float((10 * torch.log10(255**2 / error)).mean()),
        "codebook_use": float((share > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
    }


def save_reconstructions(originals: Tensor, reconstructed: Tensor, file: Path) -> None:
    """Save a PNG of images uint8 [n, 3, s, s] beside their reconstructions, four pairs per row."""
    from PIL import Image

    pairs = torch.cat([originals, reconstructed], dim=3)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(4) if len(row) == 4]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).contiguous()
    Image.fromarray(sheet.numpy()).save(file)


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


def _publish(network, out: Path) -> None:
    """Write the tokenizer to ``out``; config.json, without which it does not load, comes last."""
    fresh = out / ".new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    network.config.save_pretrained(fresh)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    fresh.rmdir()
