"""How likely a model finds given continuations."""

from collections.abc import Sequence

import torch

from megatron_ext.generation.generator import Generator, Request
from megatron_ext.generation.prompt_batch import alignment, rows_of
from megatron_ext.routing.route import Route


@torch.no_grad()
def log_likelihoods(
    generator: Generator, requests: Sequence[Request], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihood of each continuation after its request, summed over the continuation's tokens, in nats.

    All are read together, without a cache: ``continuations`` are short.
    """
    model, prompts = generator.model, [request.tokens for request in requests]
    tasks = torch.tensor([int(request.task) for request in requests], dtype=torch.int8)
    documents = [[*prompt, *more] for prompt, more in zip(prompts, continuations)]
    batch = rows_of(generator.vocabulary, documents, tasks, torch.zeros(len(documents), dtype=torch.int64))
    place = torch.arange(batch.shape[1])
    first, end = (torch.tensor([len(x) - 1 for x in of])[:, None] for of in (prompts, documents))
    wanted = (place >= first) & (place < end)
    device = next(model.parameters()).device
    route = Route.of(batch, generator.plan, *alignment(model), wanted=wanted).to(device)
    losses = model.token_losses(model(route), batch.labels[wanted].to(device)).cpu().double()
    row = wanted.nonzero()[:, 0]
    return (-torch.zeros(len(documents), dtype=torch.float64).index_add_(0, row, losses)).tolist()
