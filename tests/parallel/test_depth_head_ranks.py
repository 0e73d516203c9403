"""The projector and the depth head, cut over a tensor-parallel group, equal one process."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import ModelConfig
from megatron_ext.model_config import DepthHeadConfig, ImageCodesConfig
from megatron_ext.transformer.code_vectors import CodeVectors
from megatron_ext.transformer.depth_head import DepthHead
from megatron_ext.transformer.initialization import initialize, shard
from megatron_ext.transformer.projector import Projector
from support.ranks import world

ROWS, DEPTH, HIDDEN, WIDTH, CODES = 8, 3, 16, 6, 12
SHAPE = ImageCodesConfig(DEPTH, codebook_size=CODES, width=WIDTH, head=DepthHeadConfig(2, 16, 4))


class Chunk(torch.nn.Module):
    """What a pipeline stage that is first and last has of them: in comes the projector, out goes the head."""

    def __init__(self, tensor: int, sequence: bool, chunk: int):
        super().__init__()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor)
        self.sequence = sequence
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            tensor_model_parallel_size=tensor,
            sequence_parallel=sequence,
            perform_initialization=False,
        )
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        self.code_vectors = CodeVectors(CODES, WIDTH)
        self.projector = Projector(config, WIDTH)
        self.depth_head = DepthHead(config, SHAPE)
        self.depth_head.chunk = chunk
        initialize([self], ModelConfig(init_std=0.3, image_codes=SHAPE), seed=0)
        torch.manual_seed(0)
        self.code_vectors.weight.normal_()
        with torch.no_grad():  # a bias of zeros hides that it is added on every rank
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    whole = parameter.new_empty(parameter.shape[0] * (tensor if parameter_is_cut(parameter) else 1))
                    parameter.copy_(shard(whole.normal_(std=0.3), name))
        self.codes = torch.randint(CODES, (ROWS, DEPTH))
        self.weights = torch.rand(ROWS, DEPTH)

    def run(self) -> dict[str, torch.Tensor]:
        """Losses, decoded logits, the gradients that the optimizer gets and their squared norm."""
        vectors = self.code_vectors(self.codes)
        if self.sequence:
            vectors = vectors.chunk(dist.get_world_size())[dist.get_rank()]
        hidden = self.projector(vectors).tanh()
        if self.sequence:
            hidden = gather_from_sequence_parallel_region(hidden)
        losses = self.depth_head.losses(hidden, self.codes, self.code_vectors)
        (losses * self.weights).sum().backward()
        result = {"losses": losses.detach(), "decoded logits": self.decoded(hidden.detach())}
        squares = torch.zeros(())
        for name, parameter in self.named_parameters():
            if getattr(parameter, "sequence_parallel", False):  # as Megatron-Core does at the end of a step
                dist.all_reduce(parameter.grad)
            result[name] = parameter.grad
            if param_is_not_tensor_parallel_duplicate(parameter):
                squares += parameter.grad.square().sum()
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            dist.all_reduce(squares)
        return result | {"squared norm": squares}

    @torch.no_grad()
    def decoded(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, depth, codes] of all ranks, for codes that are given."""
        decoding, logits = self.depth_head.decoding(hidden, self.code_vectors), []
        for codes in self.codes.unbind(1):
            logits.append(gather_from_tensor_model_parallel_region(decoding.logits()))
            decoding.append(codes)
        return torch.stack(logits, 1)


def parameter_is_cut(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def largest_differences(sequence: bool, chunk: int) -> dict[str, float]:
    """Between a cut model and a whole one, relative to the largest number of the whole; by name."""
    whole = Chunk(1, sequence=False, chunk=0).run()
    cut = Chunk(2, sequence, chunk).run()
    expected = {name: shard(x, name) if x.dim() and "." in name else x for name, x in whole.items()}
    return {name: float((cut[name] - x).abs().max() / whole[name].abs().max()) for name, x in expected.items()}


@pytest.mark.parametrize("sequence, chunk", [(False, 0), (True, 0), (True, 3)])
def test_losses_logits_gradients_and_norm_are_those_of_one_process(tmp_path, sequence, chunk):
    compared = {"losses", "decoded logits", "squared norm", "projector.linear_in.weight", "depth_head.classifier.bias"}
    for rank, differences in enumerate(world(2, largest_differences, sequence, chunk, folder=tmp_path)):
        assert differences.keys() >= compared
        assert not {name: x for name, x in differences.items() if not x < 1e-5}, rank


def stored_shapes(tensor: int) -> dict[str, tuple[int, ...]]:
    chunk = Chunk(tensor, sequence=False, chunk=0)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    stored = chunk.depth_head.sharded_state_dict("depth_head.", metadata=metadata)
    return {name: x.global_shape for name, x in stored.items()}


def test_a_checkpoint_has_the_same_tensors_under_any_cut(tmp_path):
    (whole,), cut = world(1, stored_shapes, 1, folder=tmp_path), world(2, stored_shapes, 2, folder=tmp_path)
    assert cut == [whole] * 2
    assert whole["depth_head.layers.0.qkv.weight"] == (48, 16) and whole["depth_head.classifier.bias"] == (CODES,)
