"""The depth head against torch's own Transformer, its chunks, its decoding; code vectors, learned and frozen."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import cross_entropy, embedding, linear

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.model_config import DepthHeadConfig, ImageCodesConfig
from megatron_ext.transformer import depth_layer
from megatron_ext.transformer.code_vectors import CodeVectors, LearnedCodes
from megatron_ext.transformer.config_checks import validate_image_codes
from megatron_ext.transformer.depth_head import DepthHead

N, HIDDEN, WIDTH, SIZE, HEADS, LAYERS, CODES = 11, 24, 12, 16, 4, 2, 20


@pytest.fixture(scope="module", autouse=True)
def world():
    from megatron_ext import distributed

    distributed.initialize(config_file.load(Config, [], []))
    yield
    distributed.shut_down()


def stack_config(dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, params_dtype=dtype, perform_initialization=False
    )


class Example:
    """A head with random weights, hidden states and codes."""

    def __init__(self, depth: int = 4, learned: bool = False, rows: int = N, chunk: int = 0, dtype=torch.float32):
        torch.manual_seed(0)
        shape = DepthHeadConfig(LAYERS, SIZE, HEADS, chunk)
        codes = ImageCodesConfig(depth, codebook_size=CODES, width=None if learned else WIDTH, head=shape)
        self.head = DepthHead(stack_config(dtype), codes)
        for parameter in self.head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.vectors = None if learned else CodeVectors(CODES, WIDTH).to(dtype)
        if not learned:
            self.vectors.weight.normal_()
        self.hidden = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
        self.codes = torch.randint(CODES, (rows, depth), dtype=torch.int32)
        self.inputs = self.hidden, self.codes, self.vectors

    def losses_and_gradients(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        losses = self.head.losses(*self.inputs)
        weights = torch.arange(losses.numel()).view_as(losses) / max(1, losses.numel())
        return losses, list(torch.autograd.grad((losses * weights).sum(), [*self.head.parameters(), self.hidden]))


def by_head(query_key_value: torch.Tensor) -> torch.Tensor:
    """From the rows of all heads' queries, then keys, then values, as torch has them, to the head's order."""
    return query_key_value.unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)


def torchs_layer(weights: dict[str, torch.Tensor], layer: int) -> torch.nn.Module:
    """torch's own block with the weights of the head's."""
    block = torch.nn.TransformerEncoderLayer(
        SIZE, HEADS, 4 * SIZE, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {"norm1": "attention_norm", "self_attn.in_proj": "qkv", "self_attn.out_proj": "proj", "norm2": "mlp_norm"}
    names |= {"linear1": "fc1", "linear2": "fc2"}
    order = by_head(torch.arange(3 * SIZE)).argsort()
    state = {}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            weight = weights[f"layers.{layer}.{ours}.{kind}"].detach()
            separator = "_" if theirs.endswith("in_proj") else "."
            state[f"{theirs}{separator}{kind}"] = weight[order] if ours == "qkv" else weight
    block.load_state_dict(state)
    return block


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_head_is_torchs_own_causal_transformer_between_its_entries_and_classifier(depth):
    example = Example(depth, dtype=torch.float64)
    weights = dict(example.head.named_parameters())
    blocks = [torchs_layer(weights, i) for i in range(LAYERS)]
    hidden, codes, vectors = example.inputs
    outer = {name: weight.detach().requires_grad_() for name, weight in weights.items() if "layers" not in name}
    own_hidden = hidden.detach().requires_grad_()

    places = [linear(own_hidden, outer["hidden_linear.weight"], outer["hidden_linear.bias"])]
    for place in range(1, depth):
        total = sum(vectors.weight[codes[:, d].long()] for d in range(place))
        places.append(linear(total, outer["code_linear.weight"], outer["code_linear.bias"]))
    x = torch.stack(places, 1) + outer["positions.weight"]
    for block in blocks:
        x = block(x, src_mask=torch.full((depth, depth), -torch.inf, dtype=torch.float64).triu(1), is_causal=True)
    x = torch.nn.functional.layer_norm(x, (SIZE,), outer["norm.weight"], outer["norm.bias"], eps=1e-5)
    expected = linear(x, outer["classifier.weight"], outer["classifier.bias"])

    logits = example.head.logits(*example.inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    losses = cross_entropy(expected.flatten(0, 1), codes.flatten().long(), reduction="none").view(N, depth)
    torch.testing.assert_close(example.head.losses(*example.inputs), losses.float(), rtol=0, atol=2e-6)

    weighted = torch.rand_like(logits)
    (logits * weighted).sum().backward()
    (expected * weighted).sum().backward()
    torch.testing.assert_close(hidden.grad, own_hidden.grad, rtol=0, atol=1e-10)
    for name, weight in outer.items():
        if name.startswith("code_linear") and depth == 1:  # no place reads it
            assert not weights[name].grad.any() and weight.grad is None
            continue
        torch.testing.assert_close(weights[name].grad, weight.grad, rtol=0, atol=1e-10, msg=name)
    for i, block in enumerate(blocks):
        gradient = by_head(block.self_attn.in_proj_weight.grad)
        torch.testing.assert_close(weights[f"layers.{i}.qkv.weight"].grad, gradient, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights[f"layers.{i}.fc2.bias"].grad, block.linear2.bias.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("learned", [False, True])
def test_chunks_change_neither_losses_nor_gradients(learned):
    losses, gradients = Example(learned=learned).losses_and_gradients()
    chunked, chunked_gradients = Example(learned=learned, chunk=3).losses_and_gradients()
    torch.testing.assert_close(chunked, losses, rtol=0, atol=2e-6)
    for own, expected in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=2e-6)


def saved_bytes(example: Example) -> int:
    """Bytes of the activations that a forward pass keeps for the backward pass."""
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in example.head.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept, so that no other can have its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        example.losses = example.head.losses(*example.inputs)  # its graph must outlive the count
    return sum(storage.nbytes() for storage in storages.values())


def test_with_chunks_the_forward_pass_keeps_no_activations():
    whole, chunked = saved_bytes(Example(rows=64)), saved_bytes(Example(rows=64, chunk=8))
    assert chunked < 0.05 * whole


@pytest.mark.parametrize("learned", [False, True])
def test_without_targets_every_weight_gets_a_gradient_of_zeros(learned):
    losses, gradients = Example(learned=learned, rows=0).losses_and_gradients()
    assert losses.shape == (0, 4) and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("learned", [False, True])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(learned):
    example = Example(learned=learned)
    with torch.no_grad():
        expected = example.head.logits(*example.inputs)
        decoding = example.head.decoding(example.hidden, example.vectors)
        for depth in range(4):
            torch.testing.assert_close(decoding.logits(), expected[:, depth], rtol=0, atol=1e-5)
            decoding.append(example.codes[:, depth])


def test_the_vectors_of_a_token_are_summed_and_so_are_those_of_its_first_codes():
    vectors = CodeVectors(CODES, WIDTH)
    vectors.weight.normal_()
    codes = torch.randint(CODES, (N, 4))
    rows = vectors.weight[codes]
    torch.testing.assert_close(vectors(codes), rows.sum(1))
    torch.testing.assert_close(vectors.prefixes(codes), torch.stack([rows[:, :d].sum(1) for d in (1, 2, 3)], 1))
    assert vectors(codes[:0]).shape == (0, WIDTH) and vectors.prefixes(codes[:, :1]).shape == (N, 0, WIDTH)
    assert not list(vectors.parameters()) and list(vectors.state_dict()) == ["weight"]


def test_learned_codes_have_a_row_for_each_code_of_each_depth():
    learned = LearnedCodes(stack_config(torch.float32), 3, CODES, WIDTH)
    codes = torch.randint(CODES, (N, 3))
    rows = [learned.embedding.weight[codes[:, d] + d * CODES] for d in range(3)]
    torch.testing.assert_close(learned(codes), sum(rows))
    torch.testing.assert_close(learned.prefixes(codes), torch.stack([rows[0], rows[0] + rows[1]], 1))


def test_learned_codes_of_one_depth_are_a_plain_embedding():
    learned = LearnedCodes(stack_config(torch.bfloat16), 1, CODES, WIDTH)
    codes = torch.randint(CODES, (N, 1))
    assert torch.equal(learned(codes).bfloat16(), embedding(codes[:, 0], learned.embedding.weight))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("depth=0", "'model.image_codes.depth' is 0"),
        ("head.num_layers=0", "'model.image_codes.head.num_layers' is 0"),
        ("head.chunk=-1", "'model.image_codes.head.chunk' is -1"),
        ("head.hidden_size=1000", "head.hidden_size .1000. is not divisible by .*head.num_attention_heads .16."),
        ("head.num_attention_heads=1", "head.num_attention_heads .1. is not divisible by parallel.tensor .2."),
        ("codebook_size=65538", "'model.image_codes.codebook_size' is 65538, must be at most 65536"),
        ("codebook_size=511", "codebook_size .511. is not divisible by parallel.tensor .2."),
    ],
)
def test_a_head_that_cannot_be_built_is_refused(setting, message):
    overrides = ["model.image_codes.depth=4", f"model.image_codes.{setting}", "parallel.tensor=2"]
    with pytest.raises(UserError, match=message):
        validate_image_codes(config_file.load(Config, [], overrides))


def test_any_number_of_rows_goes_through_attention_in_parts(monkeypatch):
    losses, gradients = Example().losses_and_gradients()
    monkeypatch.setattr(depth_layer, "LARGEST_BATCH", 4)
    in_parts, gradients_in_parts = Example().losses_and_gradients()
    torch.testing.assert_close(in_parts, losses)
    torch.testing.assert_close(gradients_in_parts, gradients)
    example = Example()
    decoding = example.head.decoding(example.hidden, example.vectors)
    decoding.append(example.codes[:, 0])
    torch.testing.assert_close(decoding.logits(), example.head.logits(*example.inputs)[:, 1])


def test_every_learned_vector_is_trained():
    example = Example(depth=3, learned=True, rows=200)
    example.head.losses(*example.inputs).sum().backward()
    assert example.head.code_embedding.embedding.weight.grad.any(1).all()
