"""The unified model: Megatron-Core's GPTModel over packed rows of text and image tokens."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.model_config import ImageCodesConfig
from megatron_ext.routing.route import Route
from megatron_ext.transformer.code_vectors import CodeVectors, LearnedCodes
from megatron_ext.transformer.depth_head import DepthHead
from megatron_ext.transformer.forward_context import Attend, ForwardContext
from megatron_ext.transformer.hidden_states import join
from megatron_ext.transformer.initialization import initialize
from megatron_ext.transformer.kernels.functions import permute
from megatron_ext.transformer.projector import Projector
from megatron_ext.transformer.resolved import ResolvedConfig
from megatron_ext.transformer.rotary import rotary_table, scaled_frequencies
from megatron_ext.transformer.specs import block_spec, transformer_config


class UnifiedModel(GPTModel):
    """One pipeline stage (or virtual stage) of the model.

    The stack sees the tokens of a micro-batch as hidden states [T, 1, h] in the stored order of its
    :class:`~megatron_ext.routing.route.Route` (T / R of them on each of R ranks under sequence parallelism), which also
    tells every layer which tokens take part and where documents begin and end. Logits are computed for the route's
    targets only.

    With several codes an image token (``model.image_codes``), an image token enters as what the projector makes of the
    sum of its code vectors, and its codes are predicted by the depth head.

    Attributes:
        code_depth: codes of an image token.
    """

    def __init__(self, resolved: ResolvedConfig, vp_stage: int | None = None):
        """
        Args:
            resolved: the run's configuration, with the size of its vocabulary.
            vp_stage: which model chunk of this pipeline stage, with an interleaved schedule.
        """
        config, transformer = resolved.config, transformer_config(resolved)
        edges = {"ignore_virtual": False, "vp_stage": vp_stage}
        super().__init__(
            config=transformer,
            transformer_layer_spec=block_spec(resolved, transformer, vp_stage),
            vocab_size=resolved.padded_vocab_size,
            max_sequence_length=config.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**edges),
            post_process=parallel_state.is_pipeline_last_stage(**edges),
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb.inv_freq = scaled_frequencies(self.rotary_pos_emb.inv_freq, config.model)
        self._rotary_table: Tensor | None = None
        self.image_positions = None
        if config.model.max_image_tokens and self.pre_process:
            count, h = config.model.max_image_tokens, config.model.hidden_size
            self.image_positions = torch.nn.Embedding(count, h, dtype=transformer.params_dtype)
            # Every tensor-parallel rank adds to its own rows: Megatron-Core sums such parameters' gradients over them.
            self.image_positions.weight.sequence_parallel = transformer.sequence_parallel
        self._add_image_codes(config.model.image_codes, transformer)
        if self.post_process and transformer.sequence_parallel:
            # The rows are gathered, and their gradients reduced, outside of the output layer (see _head_rows).
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True

    def _add_image_codes(self, image_codes: ImageCodesConfig, transformer: TransformerConfig) -> None:
        """The modules of this stage for image tokens of several codes, if they have several."""
        self.code_vectors = self.code_embedding = self.projector = self.depth_head = None
        depth, codebook_size, width = image_codes.depth, image_codes.codebook_size, image_codes.width
        self.code_depth = depth
        if depth == 1:
            return
        if width is not None and (self.pre_process or self.post_process):
            self.code_vectors = CodeVectors(codebook_size, width)
        if self.pre_process and width is not None:
            self.projector = Projector(transformer, width)
        elif self.pre_process:
            self.code_embedding = LearnedCodes(transformer, depth, codebook_size, transformer.hidden_size)
        if self.post_process:
            self.depth_head = DepthHead(transformer, image_codes)

    def forward(
        self, route: Route, attend: Attend | None = None, hidden_rows: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this stage on one micro-batch.

        Args:
            attend: replaces the core attention of all layers.
            hidden_rows: with several codes an image token: return hidden states of the code targets, not losses.

        Returns:
            On the last stage the logits [n, 1, vocabulary / tensor-parallel size] of the route's n targets, else hidden
            states [T / R, 1, h] in the route's stored order. With several codes an image token, on the last stage a
            pair: these logits, and of the m code targets the losses [m, D], float32, or the hidden states [m, 1, h]
            after the final norm.
        """
        context = ForwardContext.of(route, self._rotary_table_for(route), attend)
        hidden_states = self._embed(route) if self.pre_process else None
        hidden_states = self.decoder(hidden_states=hidden_states, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        rows = self._head_rows(hidden_states, route)
        logits = self.output_layer(permute(route.head_rows, rows), weight=weight)[0]
        if self.depth_head is None:
            return logits
        rows = permute(route.code_head_rows, rows)
        if hidden_rows:
            return logits, rows
        return logits, self.depth_head.losses(rows.squeeze(1), route.target_codes, self.code_vectors)

    def _rotary_table_for(self, route: Route) -> Tensor:
        """Cosines and sines [2, positions, d / 2] of at least the positions in ``route``.

        Computed on the first use, and again when generation exceeds its positions. Not a buffer, which would be rounded
        to bf16 along with the weights.
        """
        table, device = self._rotary_table, route.tokens.device
        if table is None or table.shape[1] < route.longest_document or table.device != device:
            positions = self.max_sequence_length
            while positions < route.longest_document:
                positions *= 2
            precision = torch.promote_types(torch.float32, next(self.parameters()).dtype)
            table = self._rotary_table = rotary_table(self.rotary_pos_emb.inv_freq.to(device, precision), positions)
        return table

    def _embed(self, route: Route) -> Tensor:
        """[T / R, 1, h]"""
        embedded = self.embedding(input_ids=route.tokens, position_ids=None)
        if self.projector is not None or self.code_embedding is not None:
            embedded = self._with_image_tokens(embedded, route)
        if self.image_positions is None:
            return embedded
        if route.longest_image > self.image_positions.num_embeddings:
            raise UserError(
                f"an image has {route.longest_image} tokens, model.max_image_tokens is "
                f"{self.image_positions.num_embeddings}"
            )
        places = route.image_places
        if self.config.sequence_parallel:
            places = places.view(-1, embedded.shape[0])[parallel_state.get_tensor_model_parallel_rank()]
        added = self.image_positions((places - 1).clamp(min=0)) * (places > 0)[:, None]
        return embedded + added.unsqueeze(1)

    def _with_image_tokens(self, embedded: Tensor, route: Route) -> Tensor:
        """``embedded`` [T / R, 1, h] with the rows of image tokens. Without any, the weights get gradients of zero:
        gradients that are reduced as they become ready wait for every weight."""
        rank = parallel_state.get_tensor_model_parallel_rank() if self.config.sequence_parallel else 0
        codes = route.codes[rank]
        image = self.code_embedding(codes) if self.projector is None else self.projector(self.code_vectors(codes))
        return embedded.index_copy(0, route.image_rows[rank], image.to(embedded.dtype).unsqueeze(1))

    def _head_rows(self, hidden_states: Tensor, route: Route) -> Tensor:
        """Hidden states [rows, 1, h] of the slices that hold targets; under sequence parallelism those of all ranks."""
        slices = hidden_states.split(route.head.sizes) if route.head.sizes else ()
        rows = join([slices[i] for i in route.head.full], hidden_states)
        return gather_from_sequence_parallel_region(rows) if self.config.sequence_parallel else rows

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each token, [n], float32, from logits [n, 1, vocabulary / tensor-parallel size] and labels
        [n]."""
        return self.compute_language_model_loss(labels.unsqueeze(0), logits).squeeze(0)

    def sharded_state_dict(self, prefix: str = "", *arguments, **options) -> dict:
        """Megatron-Core's, where the code vectors of the last stage are a copy of the first stage's."""
        state = super().sharded_state_dict(prefix, *arguments, **options)
        if self.code_vectors is not None and not self.pre_process:
            stored = state[f"{prefix}code_vectors.weight"]
            stored.replica_id = (1, *stored.replica_id[1:])
        return state


def build_chunks(resolved: ResolvedConfig, code_vectors: Tensor | None = None) -> list[UnifiedModel]:
    """This rank's model chunks, on its device, with initial weights that do not depend on the layout.

    Args:
        code_vectors: [codebook_size, width] of the VQ tokenizer, for image tokens of several codes; None: zeros, for a
            checkpoint that will be loaded.
    """
    config = resolved.config
    stages = range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline > 1 else [None]
    chunks = [UnifiedModel(resolved, vp_stage=stage).cuda(torch.cuda.current_device()) for stage in stages]
    initialize(chunks, config.model, config.training.seed)
    for chunk in chunks:
        if code_vectors is not None and chunk.code_vectors is not None:
            chunk.code_vectors.weight.copy_(code_vectors)
    return chunks
