"""The shape of the model: the ``model`` section of a configuration (:mod:`megatron_ext.config`)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.errors import UserError


@dataclass
class RotaryScalingConfig:
    """Llama 3's scaling of the rotary frequencies for long contexts, under Hugging Face's names.

    A frequency whose wavelength exceeds ``original_max_position_embeddings / low_freq_factor`` positions is divided by
    ``factor``; below ``original_max_position_embeddings / high_freq_factor`` it is kept; in between it is interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class DepthHeadConfig:
    """The depth transformer: it predicts the codes of an image token one after the other
    (``transformer/depth_head.py``)."""

    num_layers: int = 4
    hidden_size: int = 1024
    num_attention_heads: int = 16
    chunk: int = 0
    """Image tokens computed at once; the activations of a chunk are recomputed in the backward pass, so that memory
    holds those of one chunk. 0: all at once, without recomputation."""


@dataclass
class ImageCodesConfig:
    """What an image token consists of: one VQ code, or several codes of a residual quantizer (arXiv 2203.01941)."""

    depth: int = 1
    """D, codes of an image token. 1: image tokens are rows of the embedding and of the output layer, like text. More:
    the token enters as a function of the sum of its code vectors, and the depth head predicts its codes."""
    codebook: str = ""
    """Folder of the VQ tokenizer whose code vectors, frozen, make up an image token, through a projector of two layers.
    Empty: learned embeddings of the codes of each depth."""
    codebook_size: int | None = None
    """K, codes of the codebook; None: that of the vocabulary."""
    width: int | None = None
    """Width e of a code vector; None: that of ``codebook``."""
    fingerprint: str | None = None
    """Fingerprint of the VQ tokenizer; None: that of ``codebook``."""
    head: DepthHeadConfig = field(default_factory=DepthHeadConfig)


@dataclass
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention.

    Raises:
        UserError: both forms of the rotary scaling are given.
    """

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    """Key/value heads; None: one per attention head."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU FFN; None: 8/3 of hidden_size, rounded up to a multiple of 64."""
    head_size: int | None = None
    """Width of an attention head; None: hidden_size / num_attention_heads."""
    qkv_bias: bool = False
    """A bias in the query, key and value projection (Qwen2). One bias serves text and image tokens."""
    qk_norm: bool = False
    """RMSNorm of every head's query and key before the rotation (Qwen3). One norm serves text and image tokens."""
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScalingConfig | None = None
    """Scaling of the rotary frequencies; None: none."""
    rotary_scaling_factor: float | None = None
    """Short form of ``rotary_scaling`` with Llama 3's other values."""
    rotary_interpolation_factor: float = 1.0
    """Linear interpolation of positions for long contexts (arXiv 2306.15595): rotary frequencies are divided by it."""
    image_codes: ImageCodesConfig = field(default_factory=ImageCodesConfig)
    max_image_tokens: int = 0
    """Learned embeddings of the position inside an image, one for each of its tokens, added to the token embeddings.
    Small models learn spatial relations from fewer images with them; rotary positions stay as they are. 0: none."""
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Source of linear layers, norms and attention; auto: Transformer Engine if it is installed, a GPU is present and
    training.precision is bf16, else local."""

    def __post_init__(self):
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.ffn_hidden_size = self.ffn_hidden_size or -(-self.hidden_size * 8 // 3 // 64) * 64
        if self.head_size is None:
            # Validation refuses what is left over.
            self.head_size = self.hidden_size // max(1, self.num_attention_heads)
        if self.rotary_scaling_factor is not None:
            if self.rotary_scaling is not None:
                raise UserError(
                    "config: 'model.rotary_scaling_factor' is a short form of 'model.rotary_scaling'; give only one"
                )
            self.rotary_scaling, self.rotary_scaling_factor = RotaryScalingConfig(self.rotary_scaling_factor), None

    @property
    def identity(self) -> dict:
        """The keys on which a checkpoint and the run that loads it must agree.

        Keys that older checkpoints lack are left out where their value is what those checkpoints were trained with.
        """
        identity = dataclasses.asdict(self)
        for free in ("implementation", "init_std"):
            del identity[free]
        if self.head_size * self.num_attention_heads == self.hidden_size:
            del identity["head_size"]
        for switch in ("qkv_bias", "qk_norm"):
            if not identity[switch]:
                del identity[switch]
        if self.rotary_interpolation_factor == 1:
            del identity["rotary_interpolation_factor"]
        if self.image_codes.depth == 1:
            del identity["image_codes"]
        else:
            del identity["image_codes"]["codebook"], identity["image_codes"]["head"]["chunk"]
        scaling = self.rotary_scaling
        if scaling is None or scaling == RotaryScalingConfig(scaling.factor):
            del identity["rotary_scaling"]
            identity["rotary_scaling_factor"] = None if scaling is None else scaling.factor
        return identity
