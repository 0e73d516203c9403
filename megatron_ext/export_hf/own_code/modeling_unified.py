"""A unified vision-language model: a Llama over text and VQ image tokens, in which a token has a role in every layer.

The table ``config.roles[layer][use][modality]`` is the method. In a layer

    full       a token has a query, a key and a value, and passes through the FFN
    kv_only    it has a key and a value, from its normed hidden state; the hidden state itself stays as it is
    skip       it takes no part

so a query sees the keys of all earlier tokens that do not skip the layer. Nothing is computed and masked afterwards:
the rows of the tokens that take part are gathered first. Image tokens may have matrices of their own
(``config.projections``).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_unified import UnifiedCache
from .configuration_unified import FULL, GENERATION, KV_ONLY, SKIP, TEXT, UNDERSTANDING, UnifiedConfig
from .generation_unified import UnifiedGenerationMixin
from .vq_unified import ImageTokensMixin, build_network

ROLES = {FULL: 0, KV_ONLY: 1, SKIP: 2}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 at least."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class SplitLinear(nn.Linear):
    """A linear layer with a matrix of its own for each component of image tokens; one bias serves all.

    A component is a matrix, or of low rank: the difference up(down(x)) from text's product.
    """

    def __init__(self, in_features, out_features, bias, components, rank):
        super().__init__(in_features, out_features, bias=bias)
        self.rank = rank
        self.components = nn.ModuleDict()
        for name in components:
            if rank is None:
                self.components[name] = nn.Linear(in_features, out_features, bias=False)
            else:
                down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
                self.components[name] = nn.ModuleDict({"down": down, "up": up})

    def forward(self, rows, component):
        """Rows [n, in], of which each uses component [n]: 0 text's, k the k-th of image tokens."""
        if not self.components:
            return super().forward(rows)
        output = rows.new_zeros(len(rows), self.out_features)
        for number, matrix in enumerate([None, *self.components.values()]):
            index = (component == number).nonzero().squeeze(1)
            x = rows[index]
            y = F.linear(x, self.weight) if matrix is None or self.rank else matrix(x)
            if matrix is not None and self.rank:
                y = y + matrix["up"](matrix["down"](x))
            output = output.index_copy(0, index, y)
        return output if self.bias is None else output + self.bias


def split_linear(config, name, in_features, out_features, bias=False):
    """A layer's linear layer, with components if ``config.projections`` names it."""
    split = config.projections
    components = split["components"] if name in split["modules"] else []
    return SplitLinear(in_features, out_features, bias, components, split["rank"])


@dataclass
class Tokens:
    """Some of b rows of n tokens, and the columns that hold any of them.

    Attributes:
        index: their places among the b * n tokens.
        columns: those columns, counted over the whole rows, cached tokens included.
        present: [b, columns], whether the row's token is one of them.
        cells: their places among the b * columns cells of a grid.
    """

    index: torch.Tensor
    columns: torch.Tensor
    present: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def of(cls, chosen, first_column):
        """Of chosen [b, n]."""
        columns = chosen.any(0).nonzero().squeeze(1)
        present = chosen[:, columns]
        cells = present.flatten().nonzero().squeeze(1)
        return cls(chosen.flatten().nonzero().squeeze(1), columns + first_column, present, cells)

    def grid(self, rows):
        """Their rows [tokens, heads, d] as [b, heads, columns, d]."""
        grid = rows.new_zeros(self.present.numel(), *rows.shape[1:]).index_copy(0, self.cells, rows)
        return grid.unflatten(0, self.present.shape).transpose(1, 2)

    def rows(self, grid):
        """The inverse of :meth:`grid`."""
        return grid.transpose(1, 2).flatten(0, 1)[self.cells]


class UnifiedAttention(nn.Module):
    """Queries of full tokens attend to the keys of full and kv_only tokens."""

    def __init__(self, config):
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        self.head_dim = d
        self.q_proj = split_linear(config, "q_proj", h, q, config.qkv_bias)
        self.k_proj = split_linear(config, "k_proj", h, kv, config.qkv_bias)
        self.v_proj = split_linear(config, "v_proj", h, kv, config.qkv_bias)
        self.o_proj = split_linear(config, "o_proj", q, h)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, normed, queries, keys, component, angles, cached):
        """Normed hidden states [keys, h] to the outputs of queries, [queries, h].

        Args:
            queries, keys: :class:`Tokens` that are full; that are full or kv_only.
            component: [b * n], the matrices that each token uses.
            angles: cosines and sines of each token, [b * n, 1, d / 2].
            cached: the :class:`LayerCache`, or None.
        """
        uses = component[keys.index]
        key = self.k_norm(self.k_proj(normed, uses).unflatten(-1, (-1, self.head_dim)))
        key = keys.grid(rotate(key, angles, keys.index))
        value = keys.grid(self.v_proj(normed, uses).unflatten(-1, (-1, self.head_dim)))
        columns, present = keys.columns, keys.present
        if cached is not None:
            key, value, columns, present = cached.append(key, value, columns, present)
        if not len(queries.index):
            return normed[:0]

        normed, uses = normed[torch.searchsorted(keys.index, queries.index)], component[queries.index]
        query = self.q_norm(self.q_proj(normed, uses).unflatten(-1, (-1, self.head_dim)))
        query = queries.grid(rotate(query, angles, queries.index))
        visible = (columns <= queries.columns[:, None]) & present[:, None]  # [b, query columns, key columns]
        visible = visible | ~visible.any(-1, keepdim=True)  # cells without a query must see something, lest they be NaN
        attended = F.scaled_dot_product_attention(query, key, value, visible[:, None], enable_gqa=True)
        return self.o_proj(queries.rows(attended).flatten(1), uses)


class UnifiedMLP(nn.Module):
    """The FFN of full tokens."""

    def __init__(self, config):
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = split_linear(config, "gate_proj", h, f), split_linear(config, "up_proj", h, f)
        self.down_proj = split_linear(config, "down_proj", f, h)

    def forward(self, rows, component):
        return self.down_proj(F.silu(self.gate_proj(rows, component)) * self.up_proj(rows, component), component)


class UnifiedLayer(nn.Module):
    """Llama's layer, computed for the tokens that take part in it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = UnifiedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = UnifiedMLP(config)

    def forward(self, x, queries, keys, component, angles, cached):
        """Hidden states [b * n, h] before the layer to those after it; arguments as in :class:`UnifiedAttention`."""
        if not len(keys.index):
            return x
        normed = self.input_layernorm(x[keys.index])
        full = x[queries.index] + self.self_attn(normed, queries, keys, component, angles, cached)
        full = full + self.mlp(self.post_attention_layernorm(full), component[queries.index])
        return x.index_copy(0, queries.index, full)  # kv_only and skip: as it was


def rotate(x, angles, index):
    """Rotary positions: x [tokens, heads, d] at the places ``index`` among all tokens."""
    cosine, sine = (angle[index].to(x.dtype) for angle in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def inverse_frequencies(config, device):
    """[d / 2], float32, with linear or Llama 3's scaling if configured."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] in ("default", "linear"):
        return frequencies / rope.get("factor", 1.0)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)  # within the original length
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, scaled; 1: fast, as it was
    return (1 - smooth) * frequencies / factor + smooth * frequencies


class UnifiedDecoder(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.max_image_tokens:
            self.image_positions = nn.Embedding(config.max_image_tokens, config.hidden_size)
        self.layers = nn.ModuleList(UnifiedLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, real, position_ids, token_uses, cache):
        """Hidden states [b, n, h]; ``real`` [b, n]: tokens that are not padding."""
        config, seen = self.config, 0 if cache is None else cache.get_seq_length()
        image = (input_ids >= config.image_offset) & (input_ids < config.image_offset + config.codebook_size)
        places = image_places(image, None if cache is None else cache.places)
        if cache is not None:
            cache.places = places if cache.places is None else torch.cat([cache.places, places], 1)
        x = self.embed_tokens(input_ids)
        if config.max_image_tokens:
            x = x + self.image_positions((places - 1).clamp(min=0)) * image[..., None]

        per_task = len(config.projections["components"]) == 2
        component = torch.where(image, 1 + per_task * (token_uses != UNDERSTANDING), 0).flatten()
        wide = torch.promote_types(torch.float32, x.dtype)
        angles = torch.outer(position_ids.flatten().to(wide), inverse_frequencies(config, x.device).to(wide)).unsqueeze(
            1
        )
        angles = angles.cos(), angles.sin()

        @functools.cache  # most layers have the same roles
        def tokens(table):
            role = torch.tensor(table, device=x.device)[2 * token_uses + image].masked_fill(~real, ROLES[SKIP])
            return Tokens.of(role == ROLES[FULL], seen), Tokens.of(role != ROLES[SKIP], seen)

        shape, x = x.shape, x.flatten(0, 1)
        for number, (layer, roles) in enumerate(zip(self.layers, config.roles)):
            queries, keys = tokens(tuple(ROLES[role] for use in roles for role in use))
            x = layer(x, queries, keys, component, angles, cache and cache.layers[number])
        return self.norm(x).view(shape)


def image_places(image, before):
    """[b, n]: each token's place in its image, from 1; 0 for text.

    Args:
        image: bool [b, n].
        before: the places of all earlier tokens [b, seen], or None.
    """
    carried = 0 if before is None else before[:, -1:]
    count = carried + image.cumsum(1)
    at_last_text = torch.where(image, 0, count).cummax(1).values
    return (count - at_last_text) * image


class UnifiedForConditionalGeneration(UnifiedGenerationMixin, ImageTokensMixin, PreTrainedModel):
    """The decoder with its head and the VQ image tokenizer."""

    config_class = UnifiedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text", "image")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["vqmodel"]  # rounded weights would give other codes
    _no_split_modules = ["UnifiedLayer"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = UnifiedDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.vq_config is not None:
            self.vqmodel = build_network(config.vq_config, config.codebook_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        token_uses=None,
        labels=None,
        num_items_in_batch=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [b, n, vocab_size] of tokens [b, n].

        Args:
            attention_mask: [b, tokens read + n], 0 for padding, which must stand on the left.
            position_ids: [b, n]; by default from the mask.
            past_key_values: a :class:`UnifiedCache` of the tokens read so far.
            pixel_values: [images, 3, H, W] in [-1, 1]: their codes replace the placeholders ``image_token_id``.
            token_uses: [b, n] of UNDERSTANDING, GENERATION, TEXT; by default all is to be understood.
            labels: [b, n], -100 where nothing is learnt, placeholders where ``input_ids`` has them; the loss is the
                mean cross-entropy of predicting them.
            num_items_in_batch: the loss is the sum by this number instead: of labels in all accumulated batches.
            logits_to_keep: logits of the last so many tokens alone, or of these columns; 0: of all.
        """
        b, n = input_ids.shape
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and labels is None:
            cache = UnifiedCache(self.config.num_hidden_layers)
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(b, seen + n)
        real = attention_mask[:, -n:].bool()
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -n:]
        if token_uses is None:
            token_uses = torch.full_like(input_ids, UNDERSTANDING)
        input_ids = self.fill_placeholders(input_ids, pixel_values)
        hidden = self.model(input_ids, real, position_ids.expand(b, n), token_uses, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            targets = torch.where(labels == self.config.image_token_id, input_ids, labels)[:, 1:].flatten()
            learnt = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum") / learnt
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


__all__ = ["GENERATION", "TEXT", "UNDERSTANDING", "UnifiedCache", "UnifiedForConditionalGeneration"]
