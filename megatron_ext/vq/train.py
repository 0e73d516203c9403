"""Training a small VQ tokenizer of LlamaGen's kind (transformers' ``JanusVQVAE``) from scratch.

Latents and codes are unit vectors (LlamaGen, arXiv 2406.06525, section 3.1). The codebook is not trained by gradients:
each code follows the mean of the latents that chose it (exponential moving average; van den Oord et al., arXiv
1711.00937, appendix A), it starts from k-means over real latents once the autoencoder has learnt to draw without it,
and a code that nothing chooses is moved to a latent that is far from every code: most of a picture may be background,
and codes that start at random latents would all tell apart shades of it (k-means++, Arthur and Vassilvitskii 2007).
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
from megatron_ext.vq.model import VQModel, load, nearest
from megatron_ext.vq.pixels import from_bytes, to_bytes


@dataclass
class TrainConfig:
    """What a small tokenizer is like and how it is trained.

    Attributes:
        image_size, grid: pixels and codes along a side.
        patch: pixels along a side that the network takes in at once; larger is faster and coarser.
        local: the encoder sees nothing of a picture but the patch that a code stands for, and the norms' statistics:
            codes are spent on what there is in a patch, not on what lies around. For pictures of many different
            patches without halvings: of few flat colors the norms leave too little.
        channels: of the convolutions at the finest level; doubled once, at the first halving. The norms have 32 groups,
            and with one channel a group they would take the picture's colors away: 64 or more.
        warmup: share of the steps before there is a codebook.
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


def train(pictures: Tensor, out: Path, config: TrainConfig, save_every: int = 500) -> dict:
    """Train on ``pictures`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    An interrupted training goes on from its last state in ``OUT/.training``, to the same weights on the same machine.

    Returns:
        The numbers of ``OUT/training.json``: held-out PSNR (dB), codebook use and perplexity, and the settings.

    Raises:
        UserError: too few pictures, or ``out`` holds a training with other settings.
    """
    if len(pictures) <= config.held_out:
        raise UserError(f"{len(pictures)} pictures are too few: {config.held_out} are held out to measure with")
    held_out, pictures = pictures[: config.held_out], pictures[config.held_out :]
    run = _Training(config)
    state_file = out / ".training" / "state.pt"
    run.resume(state_file)
    losses = []
    with progress(total=config.steps, initial=run.step, desc="VQ", unit="step") as bar:
        while run.step < config.steps:
            losses.append(run.train_step(pictures))
            bar.update()
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
            if run.step % save_every == 0 and run.step < config.steps:
                run.save(state_file)
    _publish(run.network, out)
    vq = load(out)
    codes, reconstructed = reconstruct(vq, held_out)
    numbers = {
        **quality(held_out, reconstructed, codes, config.codebook_size),
        "pictures": len(pictures),
        "fingerprint": vq.fingerprint,
        "settings": asdict(config),
    }
    save_sheet(held_out[:16], reconstructed[:16], out / "reconstructions.png")
    write_json(out / "training.json", numbers)
    shutil.rmtree(state_file.parent, ignore_errors=True)
    return numbers


def reconstruct(vq: VQModel, pictures: Tensor, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Codes [n, h*w] of pictures uint8 [n, 3, s, s], and the pictures decoded from them, uint8."""
    codes = torch.cat([vq.encode(from_bytes(some)) for some in pictures.split(batch_size)])
    decoded = torch.cat([vq.decode(some) for some in codes.split(batch_size)])
    return codes, to_bytes(decoded).cpu()


def quality(originals: Tensor, reconstructed: Tensor, codes: Tensor, codebook_size: int) -> dict:
    """Peak signal-to-noise ratio (dB, mean over pictures), share of codes in use, and their perplexity."""
    error = (originals.float() - reconstructed.float()).square().mean((1, 2, 3)).clamp(min=1e-3)
    share = torch.bincount(codes.flatten().cpu(), minlength=codebook_size).double() / codes.numel()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {
        "psnr": float((10 * torch.log10(255**2 / error)).mean()),
        "codebook_use": float((share > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
    }


def save_sheet(originals: Tensor, reconstructed: Tensor, file: Path) -> None:
    """A PNG of pictures uint8 [n, 3, s, s] side by side with their reconstructions, four pairs a row."""
    from PIL import Image

    pairs = torch.cat([originals, reconstructed], dim=3)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(4) if len(row) == 4]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).contiguous()
    Image.fromarray(sheet.numpy()).save(file)


class _Training:
    """The state of a training: network, codebook averages, optimizer, generator, step."""

    def __init__(self, config: TrainConfig):
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
        self.codebook = self.network.quantize.embedding.weight
        self.codebook.requires_grad_(False)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._keep_local()
        self.counts = torch.ones(config.codebook_size)
        self.sums = torch.zeros_like(self.codebook)

    @property
    def quantizing(self) -> bool:
        return self.step >= self.config.warmup * self.config.steps

    def train_step(self, pictures: Tensor) -> float:
        """One step on a random batch; returns the reconstruction loss."""
        config, network = self.config, self.network
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1, (self.step + 1) / 50) * self._cosine()
        chosen = torch.randint(len(pictures), (config.batch_size,), generator=self.generator)
        images = F.pixel_unshuffle(from_bytes(pictures[chosen]), config.patch).contiguous(
            memory_format=torch.channels_last
        )
        if self.step == math.ceil(config.warmup * config.steps):
            self._start_codebook(pictures)
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

    @torch.no_grad()
    def _keep_local(self) -> None:
        """What keeps a local encoder from looking beyond a patch: no weights there."""
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
        """Latents [n, d, h, w] replaced by their codes (gradients pass straight through), and the commitment loss."""
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        codes = nearest(flat.detach(), self.codebook)
        self._follow(flat.detach(), codes)
        picked = F.embedding(codes, self.codebook).view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return latents + (picked - latents).detach(), (latents - picked).square().sum(1).mean()

    @torch.no_grad()
    def _follow(self, flat: Tensor, codes: Tensor) -> None:
        decay = self.config.codebook_decay
        self.counts.mul_(decay).add_(torch.bincount(codes, minlength=len(self.counts)), alpha=1 - decay)
        self.sums.mul_(decay).index_add_(0, codes, flat, alpha=1 - decay)
        self.codebook.copy_(F.normalize(self.sums, dim=1))
        # A code that wins less than a tenth of its fair share is dead: it starts again at a random latent.
        dead = self.counts < 0.1 * len(flat) / len(self.counts)
        self._place(dead, flat)

    def _place(self, which: Tensor, flat: Tensor) -> None:
        """Move codes to latents [m, d] drawn by their squared distance from the other codes; where there are no others,
        one code after the other."""
        dead = which.nonzero().flatten()
        if not len(dead):
            return
        if len(dead) < min(len(which), len(flat)):
            square = (2 - 2 * (flat @ self.codebook[~which].T).max(1).values).clamp(min=0) + 1e-9
            self.codebook[dead] = flat[torch.multinomial(square, len(dead), generator=self.generator)]
        else:
            square = torch.full((len(flat),), 4.0)  # the largest between unit vectors
            for code in dead.tolist():
                self.codebook[code] = flat[torch.multinomial(square + 1e-9, 1, generator=self.generator)]
                square = torch.minimum(square, (2 - 2 * (flat @ self.codebook[code])).clamp(min=0))
        self.counts[which] = fair = len(flat) / len(self.counts)
        self.sums[which] = self.codebook[which] * fair

    @torch.no_grad()
    def _start_codebook(self, pictures: Tensor) -> None:
        """k-means on the sphere over the latents of some pictures."""
        chosen = torch.randint(len(pictures), (min(len(pictures), 512),), generator=self.generator)
        images = F.pixel_unshuffle(from_bytes(pictures[chosen]), self.config.patch)
        flat = torch.cat(
            [F.normalize(self.network.quant_conv(self.network.encoder(some)), dim=1) for some in images.split(32)]
        )
        flat = flat.permute(0, 2, 3, 1).flatten(0, 2)
        everything = torch.ones_like(self.counts, dtype=torch.bool)
        self._place(everything, flat)
        for _ in range(10):
            codes = nearest(flat, self.codebook)
            self.counts = torch.bincount(codes, minlength=len(self.counts)).float()
            self.sums = torch.zeros_like(self.sums).index_add_(0, codes, flat)
            self.codebook.copy_(F.normalize(self.sums, dim=1))
            self._place(self.counts == 0, flat)

    def save(self, file: Path) -> None:
        """Save everything that a resumed training needs; the file appears only when it is whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "counts": self.counts,
            "sums": self.sums,
        }
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def resume(self, file: Path) -> None:
        """Go on from a saved state, if there is one."""
        if not file.is_file():
            return
        state = torch.load(file)
        if state["config"] != asdict(self.config):
            raise UserError(f"{file}: a training with other settings was interrupted here; delete it or change --out")
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.counts, self.sums = state["counts"], state["sums"]


def _publish(network, out: Path) -> None:
    """Put the tokenizer into ``out``; its config.json, without which it does not load, comes last."""
    fresh = out / ".new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    network.config.save_pretrained(fresh)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    fresh.rmdir()
