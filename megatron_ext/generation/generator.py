"""Whole continuations: answers, pictures, or both in turn."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.generation.cache import Cache, cache_bytes, layer_capacities
from megatron_ext.generation.continuation import IMAGE_TOKEN, Continuation
from megatron_ext.generation.decoder import Decoder, Outputs, tokens_by_class
from megatron_ext.generation.document_batch import split_codes, stored_ids
from megatron_ext.generation.guidance import guided_logits, guided_prompts
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling, next_tokens
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Task
from megatron_ext.transformer.projection import merged_weights
from megatron_ext.vocabulary import Vocabulary


class Generator:
    """Continues requests with a model.

    Args:
        model: in evaluation mode; all ranks that hold a part of it generate together.
        grid: rows and columns of image tokens in a picture.
    """

    def __init__(self, model: PipelinedModel, plan: Plan, vocabulary: Vocabulary, grid: tuple[int, int]):
        self.model, self.plan, self.vocabulary = model, plan, vocabulary
        self.picture_tokens = grid[0] * grid[1]
        self.depth = model.depth
        size = parallel_state.get_tensor_model_parallel_world_size()
        self._groups = model.config.num_query_groups // size
        self._dtype, self._device = model.dtype, model.device
        # With several codes an image token, the codes have a softmax of their own.
        ids = torch.arange(vocabulary.size if self.depth == 1 else vocabulary.image_offset, device=self._device)
        ends = torch.isin(ids, torch.tensor(vocabulary.ends, device=self._device))
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
        """The ids that follow each prompt, the token that ends them and ``<eoi>`` included; the same on every rank. An
        image token of D codes is D ids.

        Args:
            progress: called with the number of tokens generated since its last call.
        """
        copies, n = 1 if sampling.guidance == 1 else 2, len(requests)
        prompts = [split_codes(self.vocabulary, ids, self.depth) for ids in guided_prompts(requests, sampling.guidance)]
        decoder = self._decoder(requests, sampling)
        rows = [Continuation(request, self.vocabulary, self.picture_tokens) for request in requests]
        drawn: list[list[list[int]]] = [[] for _ in rows]  # the codes of each row's new image tokens, if several each
        generators = sampling.generators([request.number for request in requests])
        unread = [[*tokens, *rows[i % n].tokens] for i, (tokens, _) in enumerate(prompts)]
        codes = [codes for _, codes in prompts]
        tasks = [
            requests[i % n].prompt_tasks(tokens, self.vocabulary) + self._tasks(requests[i % n], rows[i % n].tokens)
            for i, (tokens, _) in enumerate(prompts)
        ]
        with merged_weights(*self.model.chunks):
            while active := [i for i, row in enumerate(rows) if not row.done]:
                draws = [i for i in active if self.depth > 1 and rows[i].allowed_kind == IMAGE_TOKEN]
                outputs = decoder.advance(unread, tasks, codes, [i in draws for i in range(n)] * copies)
                writes = [i for i in active if i not in draws]
                kinds = [rows[i].allowed_kind for i in writes]
                chosen = self._sample(outputs, writes, kinds, draws, n, sampling, generators)
                unread, codes, before = [[] for _ in rows], [[] for _ in rows], sum(len(row.tokens) for row in rows)
                for i, token in zip(writes, chosen):
                    unread[i] = rows[i].append(token)
                for place, i in enumerate(draws):
                    start = len(writes) + place * self.depth
                    of_token = chosen[start : start + self.depth]
                    drawn[i].append(of_token)
                    if more := rows[i].append(self.vocabulary.image_offset + of_token[0]):
                        unread[i], codes[i] = more, [of_token]
                progress(sum(len(row.tokens) for row in rows) - before)
                tasks = [self._tasks(request, tokens) for request, tokens in zip(requests, unread)]
                unread, codes, tasks = unread * copies, codes * copies, tasks * copies
        return [stored_ids(self.vocabulary, row.tokens, codes) for row, codes in zip(rows, drawn)]

    def _decoder(self, requests: Sequence[Request], sampling: Sampling) -> Decoder:
        rows = len(guided_prompts(requests, sampling.guidance))
        config, capacities = self.model.config, self._capacities(requests, sampling)
        cache = Cache(self.plan, capacities, rows, self._groups, config.kv_channels, self._dtype, self._device)
        return Decoder(self.model, self.plan, self.vocabulary, rows, cache)

    def _tasks(self, request: Request, generated: Sequence[int]) -> list[Task]:
        return [request.generated_task(token, self.vocabulary) for token in generated]

    def _sample(
        self,
        outputs: Outputs | None,
        writes: Sequence[int],
        kinds: Sequence[int],
        draws: Sequence[int],
        n: int,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[int]:
        """The next token of the documents ``writes``, out of n, then the codes of the next image token of each of
        ``draws``; the same on every rank.

        Args:
            outputs: None on other pipeline stages than the last, which chooses.
            kinds: of ``writes``, see :meth:`_sample_tokens`.
        """

        def choose() -> Tensor:
            chosen = []
            if writes:
                logits = _of_documents(outputs.logits, writes, n)
                chosen += self._sample_tokens(logits, kinds, sampling, [generators[i] for i in writes])
            if draws:
                hidden = _of_documents(outputs.hidden, draws, n)
                for of_token in self._sample_codes(hidden, sampling, [generators[i] for i in draws]):
                    chosen += of_token
            return torch.tensor(chosen)

        count = len(writes) + self.depth * len(draws)
        return self.model.from_last_stage(choose, count, dtype=torch.int64).tolist()

    def _sample_tokens(
        self, logits: Tensor, kinds: Sequence[int], sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> list[int]:
        """A token for each document, from logits [documents, vocabulary / tensor-parallel size].

        Args:
            logits: under guidance those without the conditions follow.
            kinds: of the tokens that may come, by ``continuation.py``.
        """
        logits = self._guided(logits, sampling)[:, : self._allowed.shape[1]]  # without the padding of its size
        return next_tokens(logits, self._allowed[list(kinds)], sampling, generators)

    def _sample_codes(
        self, hidden: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> list[list[int]]:
        """The codes of an image token for each document, one depth after the other, from hidden states [documents, h].

        Args:
            hidden: under guidance those without the conditions follow; they read the same codes.
        """
        head = self.model.last
        decoding, codes = head.depth_head.decoding(hidden, head.code_vectors), []
        for _ in range(self.depth):
            if codes:
                decoding.append(torch.tensor(codes[-1], device=self._device).repeat(len(hidden) // len(codes[-1])))
            codes.append(next_tokens(self._guided(decoding.logits(), sampling), None, sampling, generators))
        return [list(of_token) for of_token in zip(*codes)]

    def _guided(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """Float32 logits to sample from, gathered from all tensor-parallel ranks."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(shards, logits.contiguous(), group=group)
            logits = torch.cat(shards, -1)
        logits = logits.float()
        return logits if sampling.guidance == 1 else guided_logits(*logits.chunk(2), sampling.guidance)

    def _capacities(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """The largest number of keys per row in each layer; 0 in those of other pipeline stages."""
        capacities = []
        for request in requests:
            images = [self.vocabulary.image_offset] * self.picture_tokens * request.images
            texts = [self.vocabulary.eod] * (request.text_tokens + 2 * request.images)
            tasks = self._tasks(request, [*images, *texts])
            for ids in guided_prompts([request], sampling.guidance):
                prompt, _ = split_codes(self.vocabulary, ids, self.depth)
                all_tasks = request.prompt_tasks(prompt, self.vocabulary) + tasks
                counts = tokens_by_class(self.vocabulary, [*prompt, *images, *texts], all_tasks)
                capacities.append(layer_capacities(self.plan, counts))
        own = set(self.model.layers)
        return [max(keys) if layer in own else 0 for layer, keys in enumerate(zip(*capacities))]


def _of_documents(rows: Tensor, documents: Sequence[int], n: int) -> Tensor:
    """The ``rows`` of some of n documents; under guidance, which doubles the rows, then their rows without
    conditions."""
    if len(documents) == n:
        return rows
    return rows[[start + i for start in range(0, len(rows), n) for i in documents]]
