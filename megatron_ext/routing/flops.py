"""The cost of a plan on given data: FLOPs of the model (the numerator of the MFU) and parameters.

Multiply-adds of a layer for one token, hidden size h, query width a (heads times head size), key/value width g, FFN
width f (gated)::

    FULL      h*a (query) + 2*h*g (key, value) + a*h (output) + 3*h*f (FFN) + 2*a*(visible keys)
    KV_ONLY   2*h*g
    SKIP      0

plus h*V for the logits of a position, and the projector and depth head of image tokens of several codes
(:mod:`~megatron_ext.routing.image_code_costs`). A multiply-add is two FLOPs; the backward pass costs twice the forward
pass. A low-rank delta (LoRA) costs another r*(in + out) for every token that uses it. A full-rank delta is added to the
weights, not to the activations, so it costs no product per token. Recomputation is not counted, since it is not work of
the model; nor are norms, biases, activations and the embedding.

Parameters are counted as trained, also if ``optimizer.groups`` freeze them: FLOPs of such a run, and its MFU, include
gradients of weights that it does not compute, a third of the FLOPs of a frozen matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import ModelConfig, PlanConfig
from megatron_ext.data.batch import Batch
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.groups import token_classes
from megatron_ext.routing.image_code_costs import (
    depth_head_multiply_adds,
    depth_head_parameters,
    projector_multiply_adds,
    projector_parameters,
)
from megatron_ext.routing.pipeline_layout import stage_layers
from megatron_ext.routing.plan import Plan, Projections
from megatron_ext.routing.roles import Role, task_and_modality
from megatron_ext.routing.visible_keys import visible_keys
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

TRAINING_PER_FORWARD = 3

NUM_CLASSES = len(Task) * len(Modality)


@dataclass(frozen=True)
class Counts:
    """What the cost of packed rows under a plan depends on, without padding. Counts can be added.

    Attributes:
        tokens: tokens of each class, in the order of :attr:`~megatron_ext.routing.plan.Plan.roles`.
        visible: for each layer and class of query, the (query, key) pairs that attention computes.
        logits: positions for which the output head is computed.
        images: image tokens of several codes, which the projector makes; 0 with one code a token.
        codes: positions whose next codes the depth head predicts; 0 with one code a token.
    """

    tokens: tuple[int, ...]
    visible: tuple[tuple[int, ...], ...]
    logits: int
    images: int = 0
    codes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            _sums(self.tokens, other.tokens),
            tuple(map(_sums, self.visible, other.visible)),
            self.logits + other.logits,
            self.images + other.images,
            self.codes + other.codes,
        )

    def scaled(self, share: float) -> "Counts":
        """Of so large a share of the tokens, rounded; of attention's pairs the same share."""
        if share == 1:
            return self

        def part(numbers: Sequence[int]) -> tuple[int, ...]:
            return tuple(round(n * share) for n in numbers)

        return Counts(part(self.tokens), tuple(map(part, self.visible)), *part((self.logits, self.images, self.codes)))


def dense(plan: Plan) -> Plan:
    """The dense plan of the same model: every token FULL in every layer, one set of weights."""
    return Plan("dense", ((Role.FULL,) * NUM_CLASSES,) * plan.num_layers, Projections())


def lossless_dense(plan: Plan) -> Plan:
    """The dense plan of the same model without the work that no loss depends on: preset ``dense_lossless``."""
    return Plan.of(PlanConfig(preset="dense_lossless"), plan.num_layers)


def count(batch: Batch, plan: Plan, selection: Selection | None = None) -> Counts:
    """Count rows [b, s] on the host, with logits (or code targets) for the positions with loss.

    Args:
        selection: the step's selection of the plan's dense share; None: that of evaluation.
    """
    batch = batch.arrays()
    real = (batch.document != PADDING_DOCUMENT).ravel()
    kind = token_classes(batch, plan, selection).ravel()[real]
    first = batch.document_starts().ravel()[real]
    visible = {roles: _visible(kind, first, roles) for roles in set(plan.roles)}
    targets, images, codes = (batch.loss_mask > 0) & (batch.document != PADDING_DOCUMENT), 0, 0
    if batch.codes is not None:
        images = int((batch.modality.ravel()[real] == Modality.IMAGE).sum())
        codes = int((targets & batch.predicts_image()).sum())
    return Counts(
        tuple(np.bincount(kind, minlength=len(plan.roles[0])).tolist()),
        tuple(visible[roles] for roles in plan.roles),
        int(targets.sum()) - codes,
        images,
        codes,
    )


def with_all_logits(counts: Counts, plan: Plan) -> Counts:
    """The counts with logits for every token that is FULL in the last layer, with or without loss. Image tokens of
    several codes have code targets instead."""
    full = [n if role == Role.FULL else 0 for n, role in zip(counts.tokens, plan.roles[-1])]
    images = [n for index, n in enumerate(full) if task_and_modality(index)[1] == Modality.IMAGE]
    codes = sum(images) if counts.images else 0
    return replace(counts, logits=sum(full) - codes, codes=codes)


def forward_flops(model: ModelConfig, vocab_size: int, plan: Plan, counts: Counts) -> int:
    """FLOPs of one forward pass over the counted tokens.

    Args:
        vocab_size: rows of the output head.
    """
    ends = projector_flops(model, counts) + head_flops(model, vocab_size, counts)
    return sum(layer_flops(model, plan, counts)) + ends


def layer_flops(model: ModelConfig, plan: Plan, counts: Counts) -> list[int]:
    """FLOPs of one forward pass through each layer."""
    return [sum(classes) for classes in class_flops(model, plan, counts)]


def class_flops(model: ModelConfig, plan: Plan, counts: Counts) -> list[list[int]]:
    """FLOPs of one forward pass by layer and class of token; attention counts towards the query's class."""
    return [
        [
            2 * (n * _multiply_adds(model, plan.projections, index, role) + 2 * query_width(model) * pairs)
            for index, (n, role, pairs) in enumerate(zip(counts.tokens, roles, visible))
        ]
        for roles, visible in zip(plan.roles, counts.visible)
    ]


def projector_flops(model: ModelConfig, counts: Counts) -> int:
    """FLOPs of one forward pass through the projector of image tokens of several codes."""
    return 2 * counts.images * projector_multiply_adds(model)


def head_flops(model: ModelConfig, vocab_size: int, counts: Counts) -> int:
    """FLOPs of one forward pass through the output head and the depth head."""
    return 2 * (model.hidden_size * vocab_size * counts.logits + depth_head_multiply_adds(model) * counts.codes)


def stage_flops(
    model: ModelConfig,
    vocab_size: int,
    plan: Plan,
    counts: Counts,
    pipeline: int,
    virtual: int = 1,
    layout: str = "",
) -> list[int]:
    """FLOPs of one forward pass on each pipeline stage; the first has the projector, the last the output head and the
    depth head.

    Args:
        layout: ``parallel.layout``.
    """
    layers = layer_flops(model, plan, counts)
    stages = [sum(layers[n] for n in numbers) for numbers in stage_layers(plan.num_layers, pipeline, virtual, layout)]
    stages[0] += projector_flops(model, counts)
    stages[-1] += head_flops(model, vocab_size, counts)
    return stages


def parameter_count(model: ModelConfig, vocab_size: int, projections: Projections) -> int:
    """Parameters of the whole model, over all ranks, including those that only image tokens use.

    Args:
        vocab_size: rows of the embedding.
    """
    h = model.hidden_size
    embeddings = ((1 if model.tie_embeddings else 2) * vocab_size + model.max_image_tokens) * h
    shapes = projection_shapes(model)
    per_layer = sum(i * o for i, o in shapes.values()) + 2 * h
    per_layer += model.qkv_bias * shapes["qkv"][1] + model.qk_norm * 2 * model.head_size
    return embeddings + model.num_layers * per_layer + h + image_parameter_count(model, projections)


def image_parameter_count(model: ModelConfig, projections: Projections) -> int:
    """Parameters that text tokens never use, in all layers whatever their roles, the projector and the depth head."""
    rank = projections.rank
    shapes = [projection_shapes(model)[module] for module in projections.modules]
    component = sum(i * o if rank is None else rank * (i + o) for i, o in shapes)
    layers = model.num_layers * len(projections.components) * component
    return layers + projector_parameters(model) + depth_head_parameters(model)


def projection_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of a layer."""
    h, a, f = model.hidden_size, query_width(model), model.ffn_hidden_size
    return {"qkv": (h, a + 2 * key_width(model)), "proj": (a, h), "fc1": (h, 2 * f), "fc2": (f, h)}


def query_width(model: ModelConfig) -> int:
    """Width of a token's queries over all heads."""
    return model.head_size * model.num_attention_heads


def key_width(model: ModelConfig) -> int:
    """Width of a token's keys over all groups, which is also that of its values."""
    return model.head_size * model.num_query_groups


def products(model: ModelConfig, role: Role) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the projections that a layer computes for a token with this role."""
    if role == Role.KV_ONLY:
        return {"qkv": (model.hidden_size, 2 * key_width(model))}
    return projection_shapes(model) if role == Role.FULL else {}


def low_rank_modules(projections: Projections, index: int, role: Role) -> list[str]:
    """The projections in which a token of class ``index`` uses a low-rank delta."""
    if projections.rank is None or not projections.component(*task_and_modality(index)):
        return []
    return [m for m in projections.modules if role == Role.FULL or (role == Role.KV_ONLY and m == "qkv")]


def _multiply_adds(model: ModelConfig, projections: Projections, index: int, role: Role) -> int:
    """Multiply-adds of a layer's projections for one token of class ``index``."""
    shapes = products(model, role)
    low_rank = [shapes[module] for module in low_rank_modules(projections, index, role)]
    return sum(i * o for i, o in shapes.values()) + sum(projections.rank * (i + o) for i, o in low_rank)


def _visible(kind: np.ndarray, first: np.ndarray, roles: Sequence[Role]) -> tuple[int, ...]:
    """(query, key) pairs in a layer, by class of query.

    Args:
        kind: class of each token, [t].
        first: whether a document begins at each token, [t].
        roles: role of each class.
    """
    pairs = visible_keys(np.array(roles)[kind], first)
    return tuple(np.bincount(kind, weights=pairs, minlength=len(roles)).astype(np.int64).tolist())


def _sums(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int.__add__, left, right))
