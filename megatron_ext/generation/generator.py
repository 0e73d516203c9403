"""Whole continuations: answers, pictures, or both in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.generation.cache import Cache, cache_bytes, layer_capacities
from megatron_ext.generation.decoder import Decoder, tokens_by_class
from megatron_ext.generation.sampling import Sampling, next_tokens
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Task
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.transformer.projection import merged_weights
from megatron_ext.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """A document to go on with.

    Attributes:
        tokens: the prompt, ``bos`` included; texts and images in any order. A picture follows one that ends in
            ``<boi>``.
        task: what the document is for; its tokens are routed by that.
        text_tokens: most text tokens to generate; generation also ends at ``<eod>``.
        images: pictures to generate at most; after the last one generation ends.
        unconditional: the prompt without its condition, for classifier-free guidance.
        number: with the seed it decides what is drawn.
    """

    tokens: Sequence[int]
    task: Task
    text_tokens: int = 0
    images: int = 0
    unconditional: Sequence[int] | None = None
    number: int = 0


class Generator:
    """Continues requests with a model.

    Args:
        model: the whole model in evaluation mode; on every tensor-parallel rank.
        grid: rows and columns of image tokens in a picture.
    """

    def __init__(self, model: UnifiedModel, plan: Plan, vocabulary: Vocabulary, grid: tuple[int, int]):
        self.model, self.plan, self.vocabulary = model, plan, vocabulary
        self.picture = grid[0] * grid[1]
        size = parallel_state.get_tensor_model_parallel_world_size()
        self._groups = model.config.num_query_groups // size
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        ids = torch.arange(vocabulary.size, device=self._device)
        text = (ids < vocabulary.text_size) & (ids != vocabulary.bos) | (ids == vocabulary.eod)
        self._allowed = torch.stack([text, text | (ids == vocabulary.boi), vocabulary.is_image(ids)])

    def memory(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Bytes on each rank of the cache for these requests together."""
        rows = len(self._prompts(requests, sampling))
        capacities = self._capacities(requests, sampling)
        return cache_bytes(capacities, rows, self._groups, self.model.config.kv_channels, self._dtype.itemsize)

    @torch.no_grad()
    def __call__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, ``<eod>`` and ``<eoi>`` included; the same on every rank.

        Args:
            progress: told how many tokens have been generated since it was last called.
        """
        guided = sampling.guidance != 1
        prompts, capacities = self._prompts(requests, sampling), self._capacities(requests, sampling)
        config, n = self.model.config, len(requests)
        cache = Cache(self.plan, capacities, len(prompts), self._groups, config.kv_channels, self._dtype, self._device)
        tasks = [request.task for request in requests] * (2 if guided else 1)
        decoder = Decoder(self.model, self.plan, self.vocabulary, tasks, cache)
        rows = [_Row(self, request) for request in requests]
        generators = sampling.generators([request.number for request in requests])
        unread = [[*prompt, *rows[i % n].made] for i, prompt in enumerate(prompts)]
        with merged_weights(self.model):
            while active := [i for i, row in enumerate(rows) if not row.done]:
                logits = self._logits(decoder.advance(unread), active, n, sampling)
                allowed = self._allowed[[rows[i].may for i in active]]
                unread, before = [[] for _ in rows], sum(len(row.made) for row in rows)
                for i, token in zip(active, next_tokens(logits, allowed, sampling, [generators[i] for i in active])):
                    unread[i] = rows[i].take(token)
                progress(sum(len(row.made) for row in rows) - before)
                unread = unread * 2 if guided else unread
        return [row.made for row in rows]

    def _logits(self, logits: Tensor, rows: Sequence[int], n: int, sampling: Sampling) -> Tensor:
        """[rows, vocabulary], whole and guided."""
        if sampling.guidance != 1:
            unconditional = self._whole(logits[[n + i for i in rows]])
            return unconditional + sampling.guidance * (self._whole(logits[rows]) - unconditional)
        return self._whole(logits if len(rows) == n else logits[rows])

    def _whole(self, logits: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(parts, logits.contiguous(), group=group)
            logits = torch.cat(parts, -1)
        return logits[:, : self.vocabulary.size].float()

    def _prompts(self, requests: Sequence[Request], sampling: Sampling) -> list[Sequence[int]]:
        prompts = [request.tokens for request in requests]
        if sampling.guidance == 1:
            return prompts
        if any(request.unconditional is None for request in requests):
            raise UserError(f"guidance {sampling.guidance:g} needs a prompt without its condition")
        return prompts + [request.unconditional for request in requests]

    def _capacities(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """Keys per row that each layer may come to hold."""
        of_rows = []
        for request in requests:
            images = [self.vocabulary.image_offset] * self.picture * request.images
            texts = [self.vocabulary.eod] * (request.text_tokens + 2 * request.images)
            prompts = [request.tokens] if sampling.guidance == 1 else [request.tokens, request.unconditional]
            for prompt in prompts:
                counts = tokens_by_class(self.vocabulary, request.task, [*prompt, *images, *texts])
                of_rows.append(layer_capacities(self.plan, counts))
        return [max(layer) for layer in zip(*of_rows)]


class _Row:
    """One document while it grows: what may come next, and when it ends.

    Attributes:
        made: tokens after the prompt.
        done: whether the last of them ended the document.
    """

    def __init__(self, of: Generator, request: Request):
        self._vocabulary, self._picture, self._request = of.vocabulary, of.picture, request
        self.made: list[int] = []
        self.done = False
        self._images, self._texts = 0, 0
        self._left = of.picture if request.tokens[-1] == of.vocabulary.boi else 0
        if self._left and not request.images:
            raise UserError("a prompt ends in <boi>, but no picture is wanted after it")
        if not self._left and (forced := self._open_text()) is not None:
            self.take(forced)

    @property
    def may(self) -> int:
        """Which tokens may come next, by number in the generator's table: text, text or a picture, a picture's."""
        return 2 if self._left else int(self._images < self._request.images)

    def take(self, token: int) -> list[int]:
        """Go on with ``token`` and what must follow it; returns what is to be read before the next is chosen. What ends
        a document is not read."""
        start, following = len(self.made), token
        while following is not None:
            self.made.append(following)
            following = self._after(following)
        return [] if self.done else self.made[start:]

    def _after(self, token: int) -> int | None:
        """The token that must follow, if it is not to be chosen."""
        vocabulary = self._vocabulary
        if self._left:
            self._left -= 1
            return None if self._left else vocabulary.eoi
        if token == vocabulary.boi:
            self._left = self._picture
            return None
        if token == vocabulary.eod:
            self.done = True
            return None
        if token == vocabulary.eoi:
            self._images += 1
        else:
            self._texts += 1
        return self._open_text()

    def _open_text(self) -> int | None:
        """Outside of a picture: go on with text (None), with a picture, or end."""
        if self._images >= self._request.images > 0 or self._texts >= self._request.text_tokens:
            if self._images < self._request.images:
                return self._vocabulary.boi
            self.done = True
        return None
