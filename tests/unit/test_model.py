"""The model against implementations that this project did not write, and against itself without packing."""

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ext.config import PlanConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route, image_places
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.norm import RMSNorm
from megatron_ext.transformer.resolved import resolve
from megatron_ext.transformer.rotary import rotary_table
from megatron_ext.transformer.specs import transformer_config

VOCABULARY = 160
SHAPE = ("model.num_layers=3", "model.hidden_size=64", "model.num_attention_heads=8", "model.num_query_groups=2")


def one_document_rows(rows: int, length: int) -> Batch:
    """Rows that hold one document each."""
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = Batch.zeros(rows, length)
    batch.tokens, batch.labels = tokens, tokens.roll(-1, 1)
    batch.positions = torch.arange(length).repeat(rows, 1)
    batch.loss_mask[:] = 1
    return batch


def logits_of(model, batch: Batch) -> torch.Tensor:
    """[b, s, vocabulary] of rows without padding."""
    return model(dense_route(batch, model)).view(*batch.shape, -1)


def dense_route(batch: Batch, model) -> Route:
    everywhere = torch.ones(batch.shape, dtype=torch.bool)
    return Route.of(batch, Plan.of(PlanConfig(), model.config.num_layers), logit_mask=everywhere)


def losses_of(model, batch: Batch) -> torch.Tensor:
    """[n] of the tokens that are not padding."""
    route = dense_route(batch, model)
    return model.token_losses(model(route), batch.labels.flatten()[route.targets])


def randomize(model) -> None:
    """Weights, norms included, that leave no term of the model invisible."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)


def test_learned_positions_are_added_to_image_tokens_alone(one_process):
    config = one_process(*SHAPE, "data.sequence_length=12", "model.max_image_tokens=4")
    (model,) = build_chunks(resolve(config, VOCABULARY))
    randomize(model)
    batch = one_document_rows(2, 12)
    batch.modality[0, 2:5] = batch.modality[0, 7:11] = batch.modality[1, :2] = Modality.IMAGE
    batch.document[1, 2:] = 1
    batch.modality[1, 2:4] = Modality.IMAGE  # of the next document
    expected = torch.tensor([[0, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0], [1, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert np.array_equal(image_places(batch.arrays()), expected)
    logits = logits_of(model, batch)
    table = torch.cat([torch.zeros(1, 64), model.image_positions.weight.detach()])
    added = table[expected].view(-1, 1, 64)
    model.image_positions = None
    model.embedding.register_forward_hook(lambda module, inputs, output: output + added)
    assert torch.allclose(logits, logits_of(model, batch), atol=1e-6)
    model.image_positions = torch.nn.Embedding(3, 64)
    with pytest.raises(UserError, match="an image has 4 tokens, model.max_image_tokens is 3"):
        logits_of(model, batch)


@pytest.mark.parametrize(
    "features", [[], ["model.qkv_bias=true", "model.qk_norm=true", "model.head_size=12"]], ids=["llama", "qwen"]
)
def test_logits_equal_stock_megatron(one_process, features):
    config = one_process(*SHAPE, *features, "data.sequence_length=40")
    (model,) = build_chunks(resolve(config, VOCABULARY))
    randomize(model)
    stock = GPTModel(
        config=dataclasses.replace(model.config, use_te_activation_func=False),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=bool(features)),
        vocab_size=VOCABULARY,
        max_sequence_length=40,
        position_embedding_type="rope",
    )
    stock.load_state_dict(model.state_dict())
    batch = one_document_rows(3, 40)
    causal = torch.ones(40, 40, dtype=torch.bool).triu(1)[None, None]
    expected = stock(batch.tokens, batch.positions, causal)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 16, 256)])
@pytest.mark.parametrize("head_size", [8, 128])
def test_scaled_frequencies_are_those_of_transformers_bit_for_bit(one_process, scaling, head_size):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    parameters = dict(zip(keys, scaling))
    config = one_process(
        *SHAPE, f"model.head_size={head_size}", f"model.rotary_scaling={parameters}", "model.rotary_base=500000"
    )
    (model,) = build_chunks(resolve(config, VOCABULARY))
    llama = LlamaConfig(
        head_dim=head_size, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **parameters}
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, torch.device("cpu"))
    assert torch.equal(model.rotary_pos_emb.inv_freq, expected)
    table = rotary_table(expected, 40)
    assert torch.equal(model._rotary_table_for(dense_route(one_document_rows(1, 40), model))[:, :40], table)


def test_a_document_alone_equals_the_document_in_a_packed_row(one_process):
    config = one_process(*SHAPE, "data.sequence_length=48")
    (model,) = build_chunks(resolve(config, VOCABULARY))
    randomize(model)
    lengths = [11, 1, 24, 7]  # and 5 of padding
    alone = one_document_rows(len(lengths), max(lengths))
    packed = one_document_rows(1, 48)
    packed.document[:] = PADDING_DOCUMENT
    start = 0
    for number, length in enumerate(lengths):
        row = slice(start, start + length)
        for name in ("tokens", "labels", "positions"):
            getattr(packed, name)[0, row] = getattr(alone, name)[number, :length]
        packed.document[0, row] = number
        start += length
    losses = losses_of(model, packed).split(lengths)
    for number, length in enumerate(lengths):
        document = Batch(*(getattr(alone, name)[number : number + 1, :length] for name in Batch.names()))
        expected = losses_of(model, document)
        torch.testing.assert_close(losses[number], expected, atol=1e-5, rtol=1e-5)


def test_the_norm_is_torch_s_with_its_gradients(one_process):
    config = one_process("model.hidden_size=64")
    norm = RMSNorm(transformer_config(resolve(config)), 64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    rows = torch.randn(6, 1, 64, requires_grad=True)
    expected = torch.nn.functional.rms_norm(rows, (64,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(rows), expected)
    weight = torch.randn(6, 1, 64)
    gradients = torch.autograd.grad((norm(rows) * weight).sum(), [rows, norm.weight])
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), [rows, norm.weight]))
