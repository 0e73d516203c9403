"""A block of the depth head: causal attention over the few places of one image token, and an FFN."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

NORM_EPSILON = 1e-5
LARGEST_BATCH = 65535
"""Sequences of one call of attention: fused CUDA kernels have a block for each in a dimension of the grid that holds no
more."""


class ColumnLinear(ColumnParallelLinear):
    """With a bias; outputs are cut over the tensor-parallel group.

    Without gradients it is one call of torch: for few rows, as in decoding, Megatron-Core's calls around a product take
    longer than the product.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, **options):
        super().__init__(inputs, outputs, config=config, init_method=config.init_method, bias=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)[0]
        output = F.linear(x, self.weight, self.bias)
        if self.gather_output and self.tp_group.size() > 1:
            output = gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output


class RowLinear(RowParallelLinear):
    """With a bias, added to the whole sum; inputs are cut over the tensor-parallel group. Without gradients as
    :class:`ColumnLinear`."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig):
        options = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
        super().__init__(inputs, outputs, config=config, init_method=config.init_method, **options)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)[0]
        if self.tp_group.size() == 1:
            return F.linear(x, self.weight, self.bias)
        return reduce_from_tensor_model_parallel_region(F.linear(x, self.weight), group=self.tp_group) + self.bias


class DepthLayer(torch.nn.Module):
    """LayerNorm, causal attention, LayerNorm, FFN of width 4 E with exact GELU; a residual stream around both.

    The rows of ``qkv`` are, head by head, those of the query, the key and the value, Megatron-Core's order: any
    tensor-parallel size cuts them between heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.head_size = hidden_size // num_attention_heads
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.attention_norm = torch.nn.LayerNorm(hidden_size, NORM_EPSILON, **options)
        self.qkv = ColumnLinear(hidden_size, 3 * hidden_size, config)
        self.proj = RowLinear(hidden_size, hidden_size, config)
        self.mlp_norm = torch.nn.LayerNorm(hidden_size, NORM_EPSILON, **options)
        self.fc1 = ColumnLinear(hidden_size, 4 * hidden_size, config)
        self.fc2 = RowLinear(4 * hidden_size, hidden_size, config)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        """[n, m, E] from the places ``x`` [n, m, E]: all of them, or with a ``cache`` the one after those in it."""
        query, key, value = self._heads(self.qkv(self.attention_norm(x)))
        if cache is None:
            attended = _attention(query, key, value, is_causal=True)
        else:
            attended = _attention(query, *cache.append(key, value))
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each [n, heads, m, d], of this rank's heads."""
        return qkv.unflatten(2, (-1, 3, self.head_size)).permute(3, 0, 2, 1, 4).unbind()


def _attention(*heads: Tensor, **options) -> Tensor:
    """Attention [n, heads, m, d] of query, key and value, for any number n of sequences."""
    if len(heads[0]) <= LARGEST_BATCH:
        return F.scaled_dot_product_attention(*heads, **options)
    parts = zip(*(x.split(LARGEST_BATCH) for x in heads))
    return torch.cat([F.scaled_dot_product_attention(*part, **options) for part in parts])


class KeyValueCache:
    """Keys and values of one layer for the places so far, of at most ``depth``."""

    def __init__(self, depth: int):
        self._depth, self._places, self._stored = depth, 0, None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next place's key and value, each [n, heads, 1, d], and return those of all places so far."""
        if self._stored is None:
            n, heads, _, d = key.shape
            self._stored = key.new_empty(2, n, heads, self._depth, d)
        self._stored[0, :, :, self._places] = key[:, :, 0]
        self._stored[1, :, :, self._places] = value[:, :, 0]
        self._places += 1
        keys, values = self._stored[:, :, :, : self._places]
        return keys, values
