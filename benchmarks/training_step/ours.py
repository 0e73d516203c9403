"""This project's training step, and the parts of it that do not shrink with a plan."""

import torch
from megatron.core.utils import get_attr_wrapped_model

from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.transformer.resolved import resolve
from training_step.random_rows import step_input
from training_step.weights import initialized_on_device


class OurStep:
    """A training step over one global batch. Called, it runs the whole step and gives the loss."""

    def __init__(self, config: Config, vocab_size: int, batch: Batch):
        with initialized_on_device():
            self.chunks = build_model(resolve(config, vocab_size))
        self.optimizer = build_optimizer(config, self.chunks)
        self.config = config
        self.input = step_input(batch, config)
        self._logits = int((batch.loss_mask > 0).sum())

    def __call__(self) -> float:
        return train_step(self.chunks, self.optimizer, self.input, self.config).loss

    def optimizer_step(self) -> None:
        """The optimizer's part of a step, over the gradients that the last step left: their norm, clipping, AdamW."""
        self.optimizer.step()

    def output_head(self) -> None:
        """Forward and backward pass of the output layer (for several codes an image token, of the depth head) and the
        loss, over as many rows as a step has targets, micro-batch by micro-batch."""
        chunk, training = self.chunks[-1], self.config.training
        model = get_attr_wrapped_model(chunk, "token_losses", return_model_obj=True)
        micro_batches = training.global_batch_size // training.micro_batch_size
        weight = model.shared_embedding_or_output_weight()
        shape = (self._logits // micro_batches, 1, self.config.model.hidden_size)
        rows = torch.randn(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        labels = torch.zeros(shape[0], dtype=torch.int64, device=weight.device)
        with chunk.no_sync():  # an overlapped reduction would wait for the gradients of all other parameters
            for _ in range(micro_batches):
                if model.depth_head:
                    codes = labels[:, None].expand(-1, model.depth_head.depth)
                    losses = model.depth_head.losses(rows.squeeze(1), codes, model.code_vectors)
                else:
                    losses = model.token_losses(model.output_layer(rows, weight=weight)[0], labels)
                losses.sum().backward()
