"""The depth head: a small Transformer over the D codes of one image token (RQ-Transformer, arXiv 2203.01941; VILA-U).

Its sequence has D places. The input of place 1 is a linear layer of the stack's hidden state, after the final norm, of
the token before; that of place d > 1 a linear layer of the sum of the vectors of the token's first d - 1 codes. Each
adds a learned position. Causal blocks follow, then a LayerNorm and one classifier for all depths: place d gives the
logits of code d. There is no dropout (VILA-U has 0.1 after attention and FFN).

Image tokens do not see each other here. The head runs on the last pipeline stage, for tokens whose codes are targets.
"""

import copy

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.model_config import ImageCodesConfig
from megatron_ext.transformer.code_vectors import CodeVectors, LearnedCodes
from megatron_ext.transformer.depth_layer import NORM_EPSILON, ColumnLinear, DepthLayer, KeyValueCache
from megatron_ext.transformer.initialization import cut


class DepthHead(torch.nn.Module):
    """Losses and logits of the codes of image tokens, given the hidden states of the tokens before.

    The tensor-parallel group cuts attention heads, the FFN and the classes. Every rank has all rows, also under
    sequence parallelism, so parameters that are not cut have the same gradients on all ranks.
    """

    def __init__(self, config: TransformerConfig, image_codes: ImageCodesConfig):
        """
        Args:
            config: of the stack.
            image_codes: with ``codebook_size``. Without ``width`` the head learns vectors of its own.
        """
        super().__init__()
        # Were biases marked as sequence-parallel, their gradients would be summed over ranks that have the same rows.
        self.config, gathered = copy.copy(config), config.sequence_parallel
        self.config.sequence_parallel = False
        depth, head, classes = image_codes.depth, image_codes.head, image_codes.codebook_size
        self.depth, self.chunk = depth, head.chunk
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        # A rank's gradient of the hidden state is a partial sum. Under sequence parallelism the gather of the rows,
        # outside, sums it over the ranks; else this layer does.
        self.hidden_linear = ColumnLinear(
            config.hidden_size, head.hidden_size, self.config, gather_output=True, disable_grad_reduce=gathered
        )
        if image_codes.width is None:
            # Nothing sees the last code of a token.
            self.code_embedding = LearnedCodes(self.config, depth - 1, classes, head.hidden_size)
        else:
            self.code_linear = torch.nn.Linear(image_codes.width, head.hidden_size, **options)
        self.positions = torch.nn.Embedding(depth, head.hidden_size, **options)
        sizes = head.hidden_size, head.num_attention_heads
        self.layers = torch.nn.ModuleList(DepthLayer(self.config, *sizes) for _ in range(head.num_layers))
        self.norm = torch.nn.LayerNorm(head.hidden_size, NORM_EPSILON, **options)
        self.classifier = ColumnLinear(head.hidden_size, classes, self.config)

    def losses(self, hidden: Tensor, target_codes: Tensor, vectors: CodeVectors | None = None) -> Tensor:
        """Cross-entropy of every code given the codes before it, [n, D], float32.

        Computed for ``head.chunk`` image tokens at once, whose activations the backward pass recomputes.

        Args:
            hidden: [n, h], of the tokens before. With n = 0 all weights get zeros as gradients.
            target_codes: [n, D].
            vectors: of the codes; None where the head learns its own.
        """
        if not 0 < self.chunk < len(hidden):
            return self._losses(hidden, target_codes, vectors)
        # A reentrant checkpoint would hand over a weight's gradient once a chunk; Megatron-Core expects it once.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        chunks = zip(hidden.split(self.chunk), target_codes.split(self.chunk))
        return torch.cat([checkpoint(self._losses, *chunk, vectors, **options) for chunk in chunks])

    def logits(self, hidden: Tensor, codes: Tensor, vectors: CodeVectors | None = None) -> Tensor:
        """Logits [n, D, K / tensor-parallel size] of every code given the codes before it, from ``hidden`` [n, h] and
        ``codes`` [n, D]."""
        later = self._code_inputs(self._vectors(vectors).prefixes(codes))
        return self(torch.cat([self._hidden_input(hidden), later], 1))

    def decoding(self, hidden: Tensor, vectors: CodeVectors | None = None) -> "DepthDecoding":
        """Choose the codes of the tokens after ``hidden`` [n, h] one depth after the other."""
        return DepthDecoding(self, hidden, self._vectors(vectors))

    def forward(self, inputs: Tensor, first_place: int = 0, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits [n, m, K / tensor-parallel size] of m places from their inputs [n, m, E] without positions."""
        places = torch.arange(first_place, first_place + inputs.shape[1], device=inputs.device)
        x = inputs + self.positions(places)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x = layer(x, cache)
        return self.classifier(self.norm(x))

    def _vectors(self, vectors: CodeVectors | None) -> CodeVectors | LearnedCodes:
        return self.code_embedding if vectors is None else vectors

    def _hidden_input(self, hidden: Tensor) -> Tensor:
        """Input [n, 1, E] of the first place."""
        return self.hidden_linear(hidden).unsqueeze(1)

    def _code_inputs(self, sums: Tensor) -> Tensor:
        """Inputs [n, m, E] of later places from sums of code vectors [n, m, e]."""
        sums = sums.to(self.positions.weight.dtype)
        return self.code_linear(sums) if hasattr(self, "code_linear") else sums

    def _losses(self, hidden: Tensor, target_codes: Tensor, vectors: CodeVectors | None) -> Tensor:
        logits = self.logits(hidden, target_codes, vectors)
        target_codes = target_codes.long()
        if self.config.cross_entropy_loss_fusion:
            group = parallel_state.get_tensor_model_parallel_group()
            return fused_vocab_parallel_cross_entropy(logits, target_codes, group)
        return vocab_parallel_cross_entropy(logits, target_codes)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The parameters, cut as :func:`~megatron_ext.transformer.initialization.cut` says."""
        state = {name: x for name, x in self.state_dict(keep_vars=True).items() if not name.endswith("_extra_state")}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {name: dim for name in state if (dim := cut(name)[0]) is not None},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class DepthDecoding:
    """The codes of n image tokens, one depth after the other: take the logits, choose, append, D times.

    Keys and values of the places so far are kept; the results are those of :meth:`DepthHead.logits`.
    """

    def __init__(self, head: DepthHead, hidden: Tensor, vectors: CodeVectors | LearnedCodes):
        self._head, self._vectors = head, vectors
        self._codes: list[Tensor] = []
        self._caches = [KeyValueCache(head.depth) for _ in head.layers]
        self._logits = self._next(head._hidden_input(hidden))

    def logits(self) -> Tensor:
        """Logits [n, K / tensor-parallel size] of the next code."""
        return self._logits

    def append(self, codes: Tensor) -> None:
        """Add the next depth's codes [n]."""
        self._codes.append(codes)
        if len(self._codes) < self._head.depth:
            sums = self._vectors(torch.stack(self._codes, 1))
            self._logits = self._next(self._head._code_inputs(sums.unsqueeze(1)))

    def _next(self, inputs: Tensor) -> Tensor:
        return self._head(inputs, len(self._codes), self._caches)[:, 0]
