"""The log-likelihood of given continuations under a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.document_batch import document_batch, row_alignment_of, split_codes
from megatron_ext.generation.generator import Generator
from megatron_ext.generation.request import Request
from megatron_ext.routing.route import Route


@torch.no_grad()
def log_likelihoods(
    generator: Generator, requests: Sequence[Request], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihood of each continuation after its request, summed over the continuation's tokens, in nats; that of an
    image token of several codes is summed over its codes.

    All are read in one forward pass without a cache: ``continuations`` are short.
    """
    vocabulary, depth = generator.vocabulary, generator.depth
    prompts = [split_codes(vocabulary, request.tokens, depth)[0] for request in requests]
    documents = [
        split_codes(vocabulary, [*request.tokens, *continuation], depth)
        for request, continuation in zip(requests, continuations)
    ]
    tokens, codes = [tokens for tokens, _ in documents], [codes for _, codes in documents]
    tasks = [
        request.prompt_tasks(prompt, vocabulary)
        + [request.generated_task(token, vocabulary) for token in document[len(prompt) :]]
        for request, prompt, document in zip(requests, prompts, tokens)
    ]
    start_positions = torch.zeros(len(documents), dtype=torch.int64)
    batch = document_batch(vocabulary, tokens, tasks, start_positions, depth, codes)
    column = torch.arange(batch.shape[1])
    # The last token of the prompt predicts the first of the continuation.
    first, end = (torch.tensor([len(row) - 1 for row in rows])[:, None] for rows in (prompts, tokens))
    predicts = (column >= first) & (column < end)
    losses = _losses(generator, batch, predicts)
    row = predicts.nonzero()[:, 0]
    return (-torch.zeros(len(documents), dtype=torch.float64).index_add_(0, row, losses)).tolist()


def _losses(generator: Generator, batch: Batch, predicts: Tensor) -> Tensor:
    """What each token that ``predicts``, bool [b, s], loses at the next one, [n], float64."""
    model = generator.model
    route = Route.of(batch, generator.plan, *row_alignment_of(model), logit_mask=predicts)
    outputs = model(route.to(model.device))

    def losses() -> Tensor:
        logits, of_codes = outputs if generator.depth > 1 else (outputs, None)
        by_token = torch.zeros(batch.tokens.numel(), dtype=torch.float64)
        if of_codes is not None:
            by_token[route.code_targets] = of_codes.cpu().double().sum(1)
        labels = batch.labels.flatten()[route.targets].to(logits.device)
        by_token[route.targets] = model.last.token_losses(logits, labels).cpu().double()
        return by_token[predicts.flatten()]

    return model.from_last_stage(losses, int(predicts.sum()), dtype=torch.float64).cpu()
