"""The model over documents that grow: chunks of tokens go in, what the next tokens are sampled from comes out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.cache import Cache
from megatron_ext.generation.document_batch import document_batch, row_alignment_of
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.routing.groups import token_classes
from megatron_ext.routing.layer_route import CachedLayerRoute
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import class_index
from megatron_ext.routing.route import Route, image_places
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.vocabulary import Vocabulary

PREFILL_CHUNK = 512
"""Tokens of a row in one forward pass: longer prompts are read in chunks."""


class Outputs(NamedTuple):
    """What follows each of several documents, on the last pipeline stage; zeros where it is not asked for.

    Attributes:
        logits: of the next text token, or image token of one code, [documents, vocabulary / tensor-parallel size].
        hidden: final hidden states from which the depth head predicts the codes of the next image token, [documents,
            h]; None if image tokens have one code.
    """

    logits: Tensor
    hidden: Tensor | None


class Decoder:
    """Documents that grow together.

    Every token takes part in every layer as the plan says, at the cost it has in training. Tokens of earlier calls are
    visible through the cache only.
    """

    def __init__(self, model: PipelinedModel, plan: Plan, vocabulary: Vocabulary, rows: int, cache: Cache):
        """
        Args:
            model: in evaluation mode; any tensor-parallel size and any pipeline.
            rows: number of documents.
            cache: empty, with a row for each document and enough room.
        """
        self._alignment = row_alignment_of(model)
        self._model, self._plan, self._vocabulary, self._cache = model, plan, vocabulary, cache
        self._depth = model.depth
        self._positions = torch.zeros(rows, dtype=torch.int64)
        self._images = np.zeros(rows, dtype=np.int64)  # image tokens at the end of each document
        self._single_token_routes: dict[bytes, Route] = {}  # by the tokens' classes

    @torch.no_grad()
    def advance(
        self,
        tokens: Sequence[Sequence[int]],
        tasks: Sequence[Sequence[Task]],
        codes: Sequence[Sequence[Sequence[int]]] | None = None,
        draws: Sequence[bool] | None = None,
    ) -> Outputs | None:
        """Read the next tokens of each document; a document may have none.

        Args:
            tasks: of each token.
            codes: of each document's image tokens, if there are several of each.
            draws: whether an image token of several codes follows, for each document; None: nowhere.

        Returns:
            What follows the last token of each document that has tokens; None on other pipeline stages than the last.
        """
        rows, longest = len(tokens), max(map(len, tokens))
        draws = torch.tensor([False] * rows if draws is None else draws)
        codes = [[]] * rows if codes is None else codes
        if longest <= PREFILL_CHUNK and all(tokens):
            return self._advance(tokens, tasks, codes, torch.ones(rows, dtype=torch.bool), draws)
        outputs, images = None, [0] * rows
        for start in range(0, longest, PREFILL_CHUNK):
            chunk, chunk_tasks = (
                [row[start : start + PREFILL_CHUNK] for row in rows_of] for rows_of in (tokens, tasks)
            )
            read = [sum(map(self._vocabulary.is_image, row)) for row in chunk]
            chunk_codes = [row[first : first + n] for row, first, n in zip(codes, images, read)]
            images = [first + n for first, n in zip(images, read)]
            last = [len(row) <= start + PREFILL_CHUNK and len(part) > 0 for row, part in zip(tokens, chunk)]
            last = torch.tensor(last)
            part = self._advance(chunk, chunk_tasks, chunk_codes, last, draws)
            outputs = part if outputs is None or part is None else _merged(outputs, part, last)
        return outputs

    def _advance(
        self,
        tokens: Sequence[Sequence[int]],
        tasks: Sequence[Sequence[Task]],
        codes: Sequence[Sequence[Sequence[int]]],
        last: Tensor,
        draws: Tensor,
    ) -> Outputs | None:
        """Read a chunk; outputs of the documents that are at their ``last`` token, zeros for others."""
        route = self._route(tokens, tasks, codes, last, draws)
        self._cache.begin_chunk(route.layers)
        self._positions += torch.tensor([len(row) for row in tokens])
        outputs = self._model(route, attend=self._cache.attend, hidden_rows=self._depth > 1)
        if outputs is None:
            return None
        if self._depth == 1:
            return Outputs(_at(last, outputs.squeeze(1)), None)
        logits, hidden = outputs
        return Outputs(_at(last & ~draws, logits.squeeze(1)), _at(last & draws, hidden.squeeze(1)))

    def _route(
        self,
        tokens: Sequence[Sequence[int]],
        tasks: Sequence[Sequence[Task]],
        codes: Sequence[Sequence[Sequence[int]]],
        last: Tensor,
        draws: Tensor,
    ) -> Route:
        batch = document_batch(self._vocabulary, tokens, tasks, self._positions, self._depth, codes).arrays()
        real = batch.document != PADDING_DOCUMENT
        lengths = np.array([len(row) for row in tokens])
        places = image_places(batch, self._images)
        self._images = np.where(lengths > 0, places[np.arange(len(tokens)), lengths - 1], self._images)
        single, draws = batch.shape[1] == 1, draws.numpy()
        key = np.where(real, token_classes(batch, self._plan, None), -1).tobytes() + draws.tobytes() if single else b""
        if single and key in self._single_token_routes:
            return _with_tokens(self._single_token_routes[key], batch, places)
        targets = last.numpy()[:, None] & (np.arange(batch.shape[1]) == lengths[:, None] - 1)
        route = Route.of(
            batch,
            self._plan,
            *self._alignment,
            logit_mask=targets,
            code_mask=targets & draws[:, None],
            cached=True,
            places=places,
        )
        route = route.to(self._model.device)
        if single:
            self._single_token_routes[key] = route
        return route


def _at(places: Tensor, rows: Tensor) -> Tensor:
    """``rows`` at the documents ``places``, bool [documents]; zeros at the others."""
    if places.all():
        return rows
    all_rows = rows.new_zeros(len(places), rows.shape[-1])
    all_rows[places.to(rows.device)] = rows
    return all_rows


def _merged(earlier: Outputs, later: Outputs, at: Tensor) -> Outputs:
    """``later`` outputs at the documents ``at``, ``earlier`` ones elsewhere."""
    at = at.to(earlier.logits.device)[:, None]
    return Outputs(*(None if old is None else torch.where(at, new, old) for old, new in zip(earlier, later)))


def _with_tokens(route: Route, batch: Batch, places: np.ndarray) -> Route:
    """The route of an earlier step for a batch [rows, 1] of tokens of the same classes."""
    device, positions = route.tokens.device, torch.as_tensor(batch.positions.ravel().astype(np.int32))

    def moved(layer: CachedLayerRoute) -> CachedLayerRoute:
        query_rows, key_rows = layer.places.query_rows, layer.places.key_rows
        query_positions = key_positions = positions[key_rows].to(device)
        if query_rows.numel() < key_rows.numel():
            query_positions = positions[query_rows].to(device)
        return replace(layer, query_positions=query_positions, key_positions=key_positions)

    tokens = batch.tokens if batch.codes is None else np.where(batch.modality == Modality.IMAGE, 0, batch.tokens)
    distinct = {id(layer): layer for layer in route.layers}
    layers = {key: moved(layer) for key, layer in distinct.items()}
    return replace(
        route,
        layers=[layers[id(layer)] for layer in route.layers],
        longest_document=int(positions.max()) + 1,
        tokens=torch.as_tensor(tokens.ravel()).to(device)[route.order].unsqueeze(0),
        **_codes_of(route, batch),
        image_places=torch.as_tensor(places.ravel()).to(device)[route.order],
        longest_image=int(places.max()),
    )


def _codes_of(route: Route, batch: Batch) -> dict:
    """The fields of ``route`` that hold the codes of image tokens, for those of another batch; none if they have one
    code."""
    if route.image_rows is None:
        return {}
    codes = torch.as_tensor(batch.codes).flatten(0, 1).to(route.order.device)
    of_ranks = route.order.view(len(route.image_rows), -1)
    return {"codes": [codes[order[rows]] for order, rows in zip(of_ranks, route.image_rows)]}


def tokens_by_class(vocabulary: Vocabulary, tokens: Sequence[int], tasks: Sequence[Task]) -> list[int]:
    """The number of a document's ``tokens`` in each class (by ``class_index``)."""
    counts = [0] * (len(Task) * len(Modality))
    for token, task in zip(tokens, tasks, strict=True):
        counts[class_index(task, Modality.IMAGE if vocabulary.is_image(token) else Modality.TEXT)] += 1
    return counts
