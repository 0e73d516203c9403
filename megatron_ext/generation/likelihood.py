"""The log-likelihood of given continuations under a model."""

from collections.abc import Sequence

import torch

from megatron_ext.generation.document_batch import document_batch, row_alignment_of
from megatron_ext.generation.generator import Generator
from megatron_ext.generation.request import Request
from megatron_ext.routing.route import Route


@torch.no_grad()
def log_likelihoods(
    generator: Generator, requests: Sequence[Request], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihood of each continuation after its request, summed over the continuation's tokens, in nats.

    All are read in one forward pass without a cache: ``continuations`` are short.
    """
    model, prompts = generator.model, [request.tokens for request in requests]
    vocabulary = generator.vocabulary
    documents = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations)]
    tasks = [
        request.prompt_tasks(prompt, vocabulary)
        + [request.generated_task(token, vocabulary) for token in document[len(prompt) :]]
        for request, prompt, document in zip(requests, prompts, documents)
    ]
    start_positions = torch.zeros(len(documents), dtype=torch.int64)
    batch = document_batch(vocabulary, documents, tasks, start_positions)
    column = torch.arange(batch.shape[1])
    # The last token of the prompt predicts the first of the continuation.
    first, end = (torch.tensor([len(row) - 1 for row in rows])[:, None] for rows in (prompts, documents))
    predicts = (column >= first) & (column < end)
    device = next(model.parameters()).device
    route = Route.of(batch, generator.plan, *row_alignment_of(model), logit_mask=predicts).to(device)
    losses = model.token_losses(model(route), batch.labels[predicts].to(device)).cpu().double()
    row = predicts.nonzero()[:, 0]
    return (-torch.zeros(len(documents), dtype=torch.float64).index_add_(0, row, losses)).tolist()
