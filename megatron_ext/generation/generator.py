"""Whole continuations: answers, pictures, or both in turn."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.generation.cache import Cache, cache_bytes, layer_capacities
from megatron_ext.generation.continuation import Continuation
from megatron_ext.generation.decoder import Decoder, tokens_by_class
from megatron_ext.generation.guidance import guided_logits, guided_prompts
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling, next_tokens
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Task
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.transformer.projection import merged_weights
from megatron_ext.vocabulary import Vocabulary


class Generator:
    """Continues requests with a model.

    Args:
        model: the whole model in evaluation mode; on every tensor-parallel rank.
        grid: rows and columns of image tokens in a picture.
    """

    def __init__(self, model: UnifiedModel, plan: Plan, vocabulary: Vocabulary, grid: tuple[int, int]):
        self.model, self.plan, self.vocabulary = model, plan, vocabulary
        self.picture_tokens = grid[0] * grid[1]
        size = parallel_state.get_tensor_model_parallel_world_size()
        self._groups = model.config.num_query_groups // size
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        ids = torch.arange(vocabulary.size, device=self._device)
        ends = torch.isin(ids, torch.tensor([vocabulary.eod, vocabulary.answer_end], device=self._device))
        text = (ids < vocabulary.text_size) & (ids != vocabulary.bos) | ends
        # By the kinds of continuation.py: text, text or a picture, an image token.
        self._allowed = torch.stack([text, text | (ids == vocabulary.boi), vocabulary.is_image(ids)])

    def memory(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Memory of the cache for these requests together, in bytes on each rank."""
        rows = len(guided_prompts(requests, sampling.guidance))
        capacities = self._capacities(requests, sampling)
        return cache_bytes(capacities, rows, self._groups, self.model.config.kv_channels, self._dtype.itemsize)

    @torch.no_grad()
    def __call__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, the token that ends them and ``<eoi>`` included; the same on every rank.

        Args:
            progress: called with the number of tokens generated since its last call.
        """
        guided = sampling.guidance != 1
        prompts, capacities = guided_prompts(requests, sampling.guidance), self._capacities(requests, sampling)
        config, n = self.model.config, len(requests)
        cache = Cache(self.plan, capacities, len(prompts), self._groups, config.kv_channels, self._dtype, self._device)
        decoder = Decoder(self.model, self.plan, self.vocabulary, len(prompts), cache)
        rows = [Continuation(request, self.vocabulary, self.picture_tokens) for request in requests]
        generators = sampling.generators([request.number for request in requests])
        unread = [[*prompt, *rows[i % n].tokens] for i, prompt in enumerate(prompts)]
        tasks = [
            requests[i % n].prompt_tasks(prompt, self.vocabulary) + self._tasks(requests[i % n], rows[i % n].tokens)
            for i, prompt in enumerate(prompts)
        ]
        with merged_weights(self.model):
            while active := [i for i, row in enumerate(rows) if not row.done]:
                logits = self._logits(decoder.advance(unread, tasks), active, n, sampling)
                allowed = self._allowed[[rows[i].allowed_kind for i in active]]
                unread, before = [[] for _ in rows], sum(len(row.tokens) for row in rows)
                for i, token in zip(active, next_tokens(logits, allowed, sampling, [generators[i] for i in active])):
                    unread[i] = rows[i].append(token)
                progress(sum(len(row.tokens) for row in rows) - before)
                tasks = [self._tasks(request, tokens) for request, tokens in zip(requests, unread)]
                if guided:
                    unread, tasks = unread * 2, tasks * 2
        return [row.tokens for row in rows]

    def _tasks(self, request: Request, generated: Sequence[int]) -> list[Task]:
        return [request.generated_task(token, self.vocabulary) for token in generated]

    def _logits(self, logits: Tensor, rows: Sequence[int], n: int, sampling: Sampling) -> Tensor:
        """Logits [rows, vocabulary] of the active of n rows, whole and guided."""
        if sampling.guidance != 1:
            unconditional = self._gather(logits[[n + i for i in rows]])
            return guided_logits(self._gather(logits[rows]), unconditional, sampling.guidance)
        return self._gather(logits if len(rows) == n else logits[rows])

    def _gather(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary, without the padding of its size."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(shards, logits.contiguous(), group=group)
            logits = torch.cat(shards, -1)
        return logits[:, : self.vocabulary.size].float()

    def _capacities(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """The largest number of keys per row in each layer."""
        capacities = []
        for request in requests:
            images = [self.vocabulary.image_offset] * self.picture_tokens * request.images
            texts = [self.vocabulary.eod] * (request.text_tokens + 2 * request.images)
            tasks = self._tasks(request, [*images, *texts])
            for prompt in guided_prompts([request], sampling.guidance):
                all_tasks = request.prompt_tasks(prompt, self.vocabulary) + tasks
                counts = tokens_by_class(self.vocabulary, [*prompt, *images, *texts], all_tasks)
                capacities.append(layer_capacities(self.plan, counts))
        return [max(layer) for layer in zip(*capacities)]
