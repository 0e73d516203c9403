"""The routed model at its plainest: every layer computes everything for every token, and a mask chooses what counts.

Nothing is gathered, sorted or saved here, and nothing is taken from the model under test but the meaning of a plan.
Works in the precision of the weights it is given.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, silu

from megatron_ext.config import ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.model_config import ImageCodesConfig
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

EMBEDDING = "embedding.word_embeddings.weight"


def logits(
    weights: Mapping[str, Tensor], model: ModelConfig, plan: Plan, batch: Batch, selection: Selection | None = None
) -> Tensor:
    """The logits of every position, [b, s, V], from the ``state_dict`` of one process."""
    head = weights[EMBEDDING if model.tie_embeddings else "output_layer.weight"]
    return final_states(weights, model, plan, batch, selection) @ head.T


def final_states(
    weights: Mapping[str, Tensor], model: ModelConfig, plan: Plan, batch: Batch, selection: Selection | None = None
) -> Tensor:
    """The hidden states after the final norm, [b, s, h]."""
    last = hidden_states(weights, model, plan, batch, selection)[-1]
    return rms_norm(last, weights["decoder.final_layernorm.weight"], model.norm_epsilon)


def code_logits(weights: Mapping[str, Tensor], model: ModelConfig, hidden: Tensor, codes: Tensor) -> Tensor:
    """The depth head's logits [n, D, K] of each code of a token, given those before it, from the ``hidden`` states
    [n, h] of the tokens before and the token's ``codes`` [n, D]."""
    head = {name.removeprefix("depth_head."): weight for name, weight in weights.items()}
    codes_of = model.image_codes
    places = [linear(head, "hidden_linear", hidden)]
    for depth in range(1, codes_of.depth):
        if codes_of.width is None:
            places.append(sum_of_vectors(head["code_embedding.embedding.weight"], codes[:, :depth], codes_of))
        else:
            places.append(linear(head, "code_linear", sum_of_vectors(weights["code_vectors.weight"], codes[:, :depth])))
    x = torch.stack(places, dim=1) + head["positions.weight"]
    later = torch.ones(codes_of.depth, codes_of.depth, dtype=torch.bool).triu(1)
    for number in range(codes_of.head.num_layers):
        layer = {n.removeprefix(f"layers.{number}."): w for n, w in head.items() if n.startswith(f"layers.{number}.")}
        qkv = linear(layer, "qkv", norm(layer, "attention_norm", x))
        query, key, value = qkv.unflatten(-1, (codes_of.head.num_attention_heads, 3, -1)).unbind(-2)
        scores = torch.einsum("nqad,nkad->naqk", query, key) / query.shape[-1] ** 0.5
        share = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        x = x + linear(layer, "proj", torch.einsum("naqk,nkad->nqad", share, value).flatten(2))
        x = x + linear(layer, "fc2", gelu(linear(layer, "fc1", norm(layer, "mlp_norm", x))))
    return linear(head, "classifier", norm(head, "norm", x))


def image_embeddings(weights: Mapping[str, Tensor], model: ModelConfig, codes: Tensor) -> Tensor:
    """What image tokens of ``codes`` [..., D] enter as, [..., h]."""
    if model.image_codes.width is None:
        return sum_of_vectors(weights["code_embedding.embedding.weight"], codes, model.image_codes)
    hidden = gelu(linear(weights, "projector.linear_in", sum_of_vectors(weights["code_vectors.weight"], codes)))
    return linear(weights, "projector.linear_out", hidden)


def sum_of_vectors(vectors: Tensor, codes: Tensor, own: ImageCodesConfig | None = None) -> Tensor:
    """Sum over depths of the vectors of ``codes`` [..., d]; with ``own``, each depth has its own vectors."""
    return sum(vectors[codes[..., d] + (d * own.codebook_size if own else 0)] for d in range(codes.shape[-1]))


def objective(logits: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
    """Sum over tasks of the mean cross entropy of their loss tokens, from the [n, V], [n] and [n] of loss tokens."""
    total = 0 * logits.sum()
    for task in Task:
        chosen = tasks == task
        if chosen.any():
            total = total + cross_entropy(logits[chosen], labels[chosen])
    return total


def hidden_states(
    weights: Mapping[str, Tensor], model: ModelConfig, plan: Plan, batch: Batch, selection: Selection | None = None
) -> list[Tensor]:
    """The hidden states after each layer, before the final norm: as many tensors [b, s, h] as there are layers."""
    if batch.codes is None:
        x = weights[EMBEDDING][batch.tokens]
    else:
        image = (batch.modality == Modality.IMAGE)[..., None]
        text = weights[EMBEDDING][batch.tokens.where(~image[..., 0], 0)]
        x = torch.where(image, image_embeddings(weights, model, batch.codes), text)
    component = components_of(plan, batch)
    states = []
    for number in range(model.num_layers):
        prefix = f"decoder.layers.{number}."
        layer = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        role = roles_of(plan, number, batch, selection)
        x = torch.where((role == Role.FULL)[..., None], full_layer(layer, x, role, component, model, plan, batch), x)
        states.append(x)
    return states


def full_layer(
    layer: Mapping[str, Tensor],
    x: Tensor,
    role: Tensor,
    component: Tensor,
    model: ModelConfig,
    plan: Plan,
    batch: Batch,
) -> Tensor:
    """What the layer makes of its input [b, s, h] if every token were FULL, but saw only keys that there are."""

    def project(module: str, inputs: Tensor) -> Tensor:
        return projection(layer, module, inputs, component, plan)

    normed = rms_norm(x, layer["input_layernorm.weight"], model.norm_epsilon)
    qkv = project("self_attention.linear_qkv", normed)
    query, key, value = heads_of(qkv, model)
    if model.qk_norm:
        query = rms_norm(query, layer["self_attention.q_layernorm.weight"], model.norm_epsilon)
        key = rms_norm(key, layer["self_attention.k_layernorm.weight"], model.norm_epsilon)
    attended = attention(query, key, value, visible(role, batch), batch.positions, model.rotary_base)
    x = x + project("self_attention.linear_proj", attended)
    normed = rms_norm(x, layer["pre_mlp_layernorm.weight"], model.norm_epsilon)
    gate, up = project("mlp.linear_fc1", normed).chunk(2, dim=-1)
    return x + project("mlp.linear_fc2", silu(gate) * up)


def projection(layer: Mapping[str, Tensor], module: str, x: Tensor, component: Tensor, plan: Plan) -> Tensor:
    """``x`` [b, s, in] times the weight that each token uses, plus the bias that all use, if any: [b, s, out]."""
    shared, bias = layer[f"{module}.weight"], layer.get(f"{module}.bias", 0)
    y = x @ shared.T
    if module.split("linear_")[1] not in plan.projections.modules:
        return y + bias
    for number, name in enumerate(plan.projections.components, start=1):
        if plan.projections.kind == "separate":
            weight = layer[f"{module}.{name}_weight"]
        elif plan.projections.rank is None:
            weight = shared + layer[f"{module}.{name}_delta"]
        else:
            weight = shared + layer[f"{module}.{name}_up"] @ layer[f"{module}.{name}_down"]
        y = torch.where((component == number)[..., None], x @ weight.T, y)
    return y + bias


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, positions: Tensor, base: float) -> Tensor:
    """Attention of [b, s, heads, d] queries to as many keys and values, [b, s, heads * d]."""
    query, key = rotate(query, positions, base), rotate(key, positions, base)
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) / query.shape[-1] ** 0.5
    share = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bnqk,bknd->bqnd", share, value).flatten(2)


def heads_of(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [b, s, heads, d]; a group's key and value are repeated for its queries."""
    groups, queries = model.num_query_groups, model.num_attention_heads // model.num_query_groups
    query, key, value = qkv.view(*qkv.shape[:2], groups, queries + 2, model.head_size).split([queries, 1, 1], dim=3)
    key, value = (x.expand_as(query) for x in (key, value))
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def visible(role: Tensor, batch: Batch) -> Tensor:
    """Which keys each query sees, [b, s queries, s keys]: those of its document, up to itself, but of no SKIP token.

    Every token sees itself. For FULL tokens the rule says so already; the others, whose attention is not used,
    would average over nothing.
    """
    same_document = batch.document[:, :, None] == batch.document[:, None, :]
    not_later = batch.positions[:, None, :] <= batch.positions[:, :, None]
    has_key = (role != Role.SKIP)[:, None, :]
    return (same_document & not_later & has_key) | torch.eye(batch.shape[1], dtype=torch.bool)


def roles_of(plan: Plan, layer: int, batch: Batch, selection: Selection | None = None) -> Tensor:
    """The role of every token in a layer, [b, s]. Padding takes part nowhere."""
    role = torch.full(batch.shape, int(Role.SKIP))
    for task in Task:
        for modality in Modality:
            role[tokens_of(task, modality, batch)] = int(plan.role(layer, task, modality))
    if plan.drawn_tables:
        numbers = torch.from_numpy(plan.drawn_tables.numbers(batch, selection))
        for number in numbers.unique().tolist():
            own = roles_of(plan.with_table(number), layer, batch)
            role = torch.where(numbers == number, own, role)
    if plan.dense_share:
        role[torch.from_numpy(plan.dense_share.selected(batch, selection)) & (batch.document != PADDING_DOCUMENT)] = (
            int(Role.FULL)
        )
    return role


def components_of(plan: Plan, batch: Batch) -> Tensor:
    """Which weights every token uses, [b, s]: 0 for those of text, n for ``plan.projections.components[n - 1]``."""
    component = torch.zeros(batch.shape, dtype=torch.int64)
    for task in Task:
        for modality in Modality:
            component[tokens_of(task, modality, batch)] = plan.projections.component(task, modality)
    return component


def tokens_of(task: Task, modality: Modality, batch: Batch) -> Tensor:
    """The tokens of a class, padding left out, bool [b, s]."""
    return (batch.task == task) & (batch.modality == modality) & (batch.document != PADDING_DOCUMENT)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions [b, s] on the halves of heads [b, s, heads, d]."""
    size = x.shape[-1]
    inverse_frequencies = 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = positions[..., None, None].to(x.dtype) * inverse_frequencies.to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon) * weight


def linear(weights: Mapping[str, Tensor], module: str, x: Tensor) -> Tensor:
    """A linear layer with a bias."""
    return x @ weights[f"{module}.weight"].T + weights[f"{module}.bias"]


def norm(weights: Mapping[str, Tensor], module: str, x: Tensor) -> Tensor:
    """The depth head's LayerNorm."""
    return layer_norm(x, x.shape[-1:], weights[f"{module}.weight"], weights[f"{module}.bias"], 1e-5)
