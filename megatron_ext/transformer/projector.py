"""From the sum of an image token's code vectors to its embedding: two linear layers, as in LLaVA-1.5 and VILA-U."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Projector(torch.nn.Module):
    """Linear (e -> h), exact GELU, linear (h -> h), with biases; whole on every tensor-parallel rank.

    Under sequence parallelism every rank projects its own rows: the parameters are marked, so that Megatron-Core sums
    their gradients over the tensor-parallel group at the end of the step.
    """

    def __init__(self, config: TransformerConfig, width: int):
        """
        Args:
            width: e, of the code vectors.
        """
        super().__init__()
        h, options = config.hidden_size, {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.linear_in = torch.nn.Linear(width, h, **options)
        self.linear_out = torch.nn.Linear(h, h, **options)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, vectors: Tensor) -> Tensor:
        """Embeddings [n, h] from sums of code vectors [n, e], which may be wider numbers than the weights."""
        hidden = self.linear_in(vectors.to(self.linear_in.weight.dtype))
        return self.linear_out(torch.nn.functional.gelu(hidden))
